"""The language model: a LLaMA decoder that is told where every token stands.

In:  embeddings (B, T, C) and their position_ids (T,) or (B, T).  Out: hidden states or logits.
Three numbers stay apart here: `position_ids` is what RoPE sees, the cache row is where keys and
values are written (always dense: 0, 1, 2, ...), and which patch a token shows is not known here.

Source: LLaMA, arXiv 2302.13971, in the layout of its checkpoints on the hub
(transformers 5.23 modeling_llama.py).
Letters: B batch, T new tokens, R rows in the cache, C channels, V vocabulary, H heads, G key-value
heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def embedding(rows: int, size: int) -> nn.Embedding:
    """A table without initial values: nn.Embedding draws them, which takes a second on meta."""
    return nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)


# ----- RoPE ---------------------------------------------------------------------------------------


def rope_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle by which RoPE turns each channel pair at each position.

    position_ids: integers (..., T); any size, since no table is cut to the length of the sequence:
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
    """Turn the pairs (x[i], x[i + D/2]) of every head by their angles.

    x: (B, H, T, D); cos, sin: (T, D) or (B, 1, T, D).  This is half-split RoPE, as in the
    checkpoints on the hub; the original LLaMA code pairs neighbours (x[2i], x[2i+1]), with weights
    to match.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ----- the cache ----------------------------------------------------------------------------------


class Rows(Protocol):
    """What attention asks of a cache."""

    lengths: list[int]                                                      # rows in use, per layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, G, T, D) into the next rows; return all rows so far (B, G, R, D)."""
        ...


class KVCache:
    """Keys and values of the tokens so far, in rows allocated once, which know no position IDs."""

    def __init__(self, config: LlamaConfig, rows: int, like: Tensor) -> None:
        c = config
        shape = (c.num_hidden_layers, len(like), c.num_key_value_heads, rows, c.head_dim)
        self.keys = like.new_empty(shape)                                  # (layers, B, G, rows, D)
        self.values = like.new_empty(shape)
        self.lengths = [0] * config.num_hidden_layers                       # rows in use, per layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, G, T, D) into the next rows; return all rows so far (B, G, R, D)."""
        start, end = self.lengths[layer], self.lengths[layer] + k.shape[2]
        keys, values = self.keys[layer], self.values[layer]                   # (B, G, rows, D)
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        self.lengths[layer] = end
        return keys[:, :, :end], values[:, :, :end]

    def copy(self, other: "KVCache") -> int:
        """Begin with the rows of another cache; returns how many they are."""
        rows = other.lengths[0]
        self.keys[..., :rows, :] = other.keys[..., :rows, :]
        self.values[..., :rows, :] = other.values[..., :rows, :]
        self.lengths = list(other.lengths)
        return rows

    def drop(self, rows: int) -> None:
        """Forget the last rows of every layer; the next ones overwrite them."""
        self.lengths = [length - rows for length in self.lengths]

    def retain(self, start: int, rows: Tensor) -> None:
        """Of the rows from `start` on only these (n,) stay, moved together."""
        end = start + len(rows)
        self.keys[..., start:end, :] = self.keys[..., rows, :]
        self.values[..., start:end, :] = self.values[..., rows, :]
        self.lengths = [end] * len(self.lengths)

    def bytes_in_use(self) -> int:
        """Keys and values of the rows in use, over all layers."""
        row = self.keys[0, :, :, :1].numel() * self.keys.element_size()
        return 2 * row * sum(self.lengths)


# ----- who sees whom ------------------------------------------------------------------------------


def mask_of(rows: Tensor, R: int, alternatives: int, dtype: torch.dtype) -> Tensor:
    """Which of R rows the tokens in these rows (M,) see: (M, R), 0 where they do, else -inf.

    It is added to the scores, so it has their dtype.
    alternatives: so many of the last tokens stand in each other's place: each sees the rows before
                  all of them, and its own.  1: every token sees all rows up to its own.
    """
    own, other = rows[:, None], torch.arange(R, device=rows.device)
    sees = (other < own.clamp(max=rows[-alternatives])) | (other == own)      # (M, R)
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, float("-inf"))


def causal_mask(T: int, R: int, alternatives: int, like: Tensor) -> Tensor | None:
    """A mask (M, R) for the last M of T tokens, which stand in the last of R rows.

    The others need none: among themselves they are causal.  None where no token needs one.
    """
    M = T if 1 < T < R else alternatives
    if M == 1:
        return None
    return mask_of(torch.arange(R - M, R, device=like.device), R, alternatives, like.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in which the last query sees all keys, the one before it one key less, ...

    q: (B, H, T, D); k, v: (B, G, R, D) with R >= T; returns (B, H, T, D).
    mask: (M, R), added to the scores of the last M queries; the others see the first T - M keys.
          None only where T is 1 or R.  Position IDs play no part.
    """
    gqa, T = q.shape[1] != k.shape[1], q.shape[2]
    if mask is None and T == 1 and q.device.type == "cpu":
        # one query in half precision takes the CPU's kernel three times as long as this
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=gqa)
        return y.to(q.dtype)                                                  # (B, H, 1, D)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=gqa)
    first = T - len(mask)                                                     # without a mask
    y = F.scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=mask, enable_gqa=gqa)
    if first == 0:
        return y                                                              # (B, H, T, D)
    before = causal_attention(q[:, :, :first], k[:, :, :first], v[:, :, :first])
    return torch.cat([before, y], dim=2)                                      # (B, H, T, D)


# ----- the decoder --------------------------------------------------------------------------------


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Rows | None = None,
                mask: Tensor | None = None, first: int = 0) -> Tensor:
        """Tokens (B, T, C), turned by the angles of their position IDs, look at all rows so far.

        first: only the tokens from this one on look, and come back (B, T - first, C)
        """
        q = self.split(self.q_proj(x[:, first:]))                             # (B, H, T - first, D)
        q = rotate(q, cos[..., first:, :], sin[..., first:, :])
        k = rotate(self.split(self.k_proj(x)), cos, sin)                      # (B, G, T, D)
        v = self.split(self.v_proj(x))                                        # (B, G, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                             # (B, G, R, D)
        y = causal_attention(q, k, v, mask)                                   # (B, H, T - first, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))                      # (B, T - first, C)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Rows | None = None,
                mask: Tensor | None = None, first: int = 0) -> Tensor:
        seen = self.self_attn(self.input_layernorm(x), cos, sin, cache, mask, first)
        x = x[:, first:] + seen                                               # (B, T - first, C)
        return x + self.mlp(self.post_attention_layernorm(x))                 # (B, T - first, C)


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i)
                                    for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, position_ids: Tensor, cache: Rows | None = None,
                alternatives: int = 1, mask: Tensor | None = None,
                last: int | None = None) -> Tensor:
        """Embeddings (B, T, C) at position_ids (T,) or (B, T) -> hidden states (B, T, C)."""
        return self.norm(self.run(x, position_ids, cache, 0, None, alternatives, mask, last))

    def run(self, x: Tensor, position_ids: Tensor, cache: Rows | None = None, start: int = 0,
            stop: int | None = None, alternatives: int = 1, mask: Tensor | None = None,
            last: int | None = None) -> Tensor:
        """The same through the layers from `start` up to but without `stop`, before the last norm.

        alternatives: so many of the last tokens do not see one another (see mask_of)
        mask:         (T, R), where the new rows are not the next of the cache; None: made here
        last:         only so many tokens look in the last of these layers, and come back
        """
        cos, sin = rope_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        if position_ids.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]                             # (B, 1, T, D)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        T = x.shape[1]
        R = T + (cache.lengths[start] if cache is not None else 0)
        if mask is None:
            mask = causal_mask(T, R, alternatives, x)
        layers = list(self.layers)[start:stop]                                # not a new ModuleList
        for layer in layers:
            if last is not None and layer is layers[-1]:
                mask = causal_mask(last, R, alternatives, x)
                return layer(x, cos, sin, cache, mask, T - last)              # (B, last, C)
            x = layer(x, cos, sin, cache, mask)                               # (B, T, C)
        return x


class LlamaForCausalLM(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, cache: Rows | None = None,
                alternatives: int = 1, last: int | None = None) -> Tensor:
        """Embeddings (B, T, C) -> logits (B, T, V) in float32, or of so many `last` tokens."""
        return self.logits(self.model(x, position_ids, cache, alternatives, last=last))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, C), after the last norm -> logits (B, T, V) in float32."""
        return self.lm_head(hidden).float()


# a pass: embeddings (1, T, C), position_ids (T,), cache, alternatives -> logits (1, T, V)
Decoder = Callable[[Tensor, Tensor, KVCache, int], Tensor]
