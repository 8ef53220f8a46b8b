"""The language model: a LLaMA decoder that is told where every token stands.

In:  embeddings (B, T, C) and their position_ids (T,) or (B, T).  Out: hidden states or logits.
Three numbers stay apart here: `position_ids` is what RoPE sees, the cache row is where keys and
values are written (always dense: 0, 1, 2, ...), and which patch a token shows is not known here.
Source: LLaMA, arXiv 2302.13971, in the layout of its checkpoints on the hub (transformers 5.23).
Letters: B batch, T new tokens, R cache rows, C channels, H heads, G key-value heads, D head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    vocab_size: int = 32000
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False


class RMSNorm(nn.Module):
    """Divide by the root mean square over the channels: in float32, cast back, then scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def embedding(rows: int, size: int) -> nn.Embedding:
    """A table whose values are not drawn, which takes long, since a checkpoint fills it."""
    return nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)


def rope_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle by which RoPE turns each channel pair at each position.

    position_ids: integers (..., T) of any size: no table is cut to the length of the sequence, for
                  under GAP the largest ID exceeds the number of tokens
    returns:      cos, sin (..., T, D) in float32; pair i turns by position / theta^(2i/D)
    source:       RoFormer, arXiv 2104.09864
    """
    pairs = torch.arange(0, head_dim, 2, device=position_ids.device).float()  # (D/2,)
    frequencies = 1.0 / theta ** (pairs / head_dim)                           # (D/2,)
    angles = position_ids[..., None].float() * frequencies                    # (..., T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)       # (..., T, D)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of every head by their angles: half-split RoPE.

    x: (B, H, T, D); cos, sin: (T, D) or (B, 1, T, D).  LLaMA's own code pairs x[2i] and x[2i + 1].
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of the tokens so far, in rows allocated once, which know no position IDs."""

    def __init__(self, config: LlamaConfig, rows: int, like: Tensor) -> None:
        layers, G, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.keys = like.new_empty(layers, len(like), G, rows, D)          # (layers, B, G, rows, D)
        self.values = torch.empty_like(self.keys)
        self.lengths = [0] * layers                                        # rows in use, per layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, G, T, D) into the next rows; return all rows so far (B, G, R, D)."""
        start, end = self.lengths[layer], self.lengths[layer] + k.shape[2]
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        self.lengths[layer] = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def bytes_in_use(self) -> int:
        """Keys and values of the rows in use, over all layers."""
        row = self.keys[0, :, :, :1].numel() * self.keys.element_size()
        return 2 * row * sum(self.lengths)


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)           # (B, heads, T, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None,
                mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T, C), turned by the angles of their position IDs, look at all rows so far."""
        q = rotate(self.split(self.q_proj(x)), cos, sin)                      # (B, H, T, D)
        k = rotate(self.split(self.k_proj(x)), cos, sin)                      # (B, G, T, D)
        v = self.split(self.v_proj(x))                                        # (B, G, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                             # (B, G, R, D)
        y = self.attend(q, k, v, mask)                                        # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))                      # (B, T, C)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention of q (B, H, T, D) to k and v (B, G, R, D): (B, H, T, D).

        mask: (T, R), True where a token may look.  None: the whole prompt, whose tokens see the
              rows up to their own, or one new token, which sees all.  Position IDs play no part.
        """
        T, R, gqa = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
        assert mask is not None or T in (1, R), "several tokens behind others need a mask"
        causal = mask is None and T > 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))    # SwiGLU


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None,
                mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)    # (B, T, C)
        return x + self.mlp(self.post_attention_layernorm(x))                 # (B, T, C)


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        layers = [LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers: Any = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def angles(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of position_ids (T,) or (B, T): (1, T, D) or (B, 1, T, D)."""
        cos, sin = rope_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        return cos.unsqueeze(-3).to(dtype), sin.unsqueeze(-3).to(dtype)

    def forward(self, x: Tensor, position_ids: Tensor, cache: KVCache | None = None,
                mask: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, C) at position_ids (T,) or (B, T) -> hidden states (B, T, C)."""
        cos, sin = self.angles(position_ids, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, cache, mask)                               # (B, T, C)
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, cache: KVCache | None = None,
                mask: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, C) -> logits (B, T, V) in float32."""
        return self.logits(self.model(x, position_ids, cache, mask))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C), after the last norm -> logits (..., V) in float32."""
        return self.lm_head(hidden).float()
