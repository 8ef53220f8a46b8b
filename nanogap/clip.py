"""CLIP's vision tower, as LLaVA uses it, what pruning strategies look at in it, and its text tower.

In:  pixel_values (B, 3, S, S), normalised; or the tokens of a text.
Out: patch features (B, N, C) in raster order; or the text in the space that CLIP shares with them.
Source: CLIP, arXiv 2103.00020, in the layout of its checkpoints on the hub (transformers 5.23).
LLaVA takes the features one layer before the end, without CLS and without the last LayerNorm.
Letters: B batch, T tokens (CLS and N patches, or a text), C channels, H heads, D head dim.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap.llama import embedding


@dataclass(frozen=True)
class CLIPVisionConfig:
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size      # patches along one side of the square


@dataclass(frozen=True)
class CLIPTextConfig:
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    layer_norm_eps: float = 1e-5


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU; the exact one would shift every feature a little."""
    return x * torch.sigmoid(1.702 * x)


class CLIPAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)          # (B, H, T, D)

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        q, k = self.split(self.q_proj(x)), self.split(self.k_proj(x))         # (B, H, T, D)
        v = self.split(self.v_proj(x))                                        # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)      # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).flatten(2))                    # (B, T, C)

    def cls_row(self, x: Tensor) -> Tensor:
        """The attention weights with which CLS looks at the patches: (B, 1 + N, C) -> (B, H, N)."""
        q = self.split(self.q_proj(x[:, :1]))                                 # (B, H, 1, D)
        k = self.split(self.k_proj(x))                                        # (B, H, 1 + N, D)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # (B,H,1,D) x (B,H,D,1+N)
        return scores.float().softmax(-1)[:, :, 0, 1:]


class CLIPMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """One pre-norm transformer block; those of the text tower are the same, with a causal mask."""

    def __init__(self, config: CLIPVisionConfig | CLIPTextConfig) -> None:
        super().__init__()
        C, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = CLIPAttention(C, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(C, eps=eps)
        self.mlp = CLIPMLP(C, config.intermediate_size)
        self.layer_norm2 = nn.LayerNorm(C, eps=eps)

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), is_causal)                # (B, T, C)
        return x + self.mlp(self.layer_norm2(x))                              # (B, T, C)


class CLIPEncoder(nn.Module):
    def __init__(self, config: CLIPVisionConfig | CLIPTextConfig) -> None:
        super().__init__()
        layers = [CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.layers: Any = nn.ModuleList(layers)


class CLIPVisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        C, P = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=P, stride=P, bias=False)
        self.position_embedding = embedding(1 + config.grid ** 2, C)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)   # (B, N, C)
        cls = self.class_embedding.expand(len(patches), 1, -1)                # (B, 1, C)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight   # (B, 1 + N, C)


class CLIPVisionTower(nn.Module):
    def __init__(self, config: CLIPVisionConfig, feature_layer: int = -2) -> None:
        super().__init__()
        self.config = config
        # of transformers' hidden_states, embeddings first: -2 is what the last layer but one gives
        self.depth = feature_layer % (config.num_hidden_layers + 1)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)   # sic
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) -> hidden states (B, 1 + N, C) before and after the feature layer."""
        x = self.pre_layrnorm(self.embeddings(pixel_values))                  # (B, 1 + N, C)
        for layer in self.encoder.layers[:self.depth - 1]:
            x = layer(x)                                                      # (B, 1 + N, C)
        return x, self.encoder.layers[self.depth - 1](x)

    def fields(self, before: Tensor, after: Tensor, needs: Collection[str]) -> dict[str, Tensor]:
        """What strategies need to see in one image, (1 + N, C) each: see FIELDS in prune.py."""
        fields: dict[str, Tensor] = {}
        if "cls" in needs:
            fields["cls"] = after[0]                                          # (C,)
        layer = self.encoder.layers[self.depth - 1]                           # the feature layer
        x = layer.layer_norm1(before[None])                                   # (1, 1 + N, C)
        if "cls_attention" in needs:
            fields["cls_attention"] = layer.self_attn.cls_row(x)[0]           # (H, N)
        if "keys" in needs:
            keys = layer.self_attn.split(layer.self_attn.k_proj(x))           # (1, H, 1 + N, D)
            fields["keys"] = keys.mean(1)[0, 1:]                              # (N, D)
        layer = self.encoder.layers[self.depth]                               # the next one
        x = layer.layer_norm1(after[None])                                    # (1, 1 + N, C)
        if "last_queries" in needs:
            fields["last_queries"] = layer.self_attn.q_proj(x)[0]             # (1 + N, C)
        if "last_keys" in needs:
            fields["last_keys"] = layer.self_attn.k_proj(x)[0]                # (1 + N, C)
        return fields


class CLIPTextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[:input_ids.shape[1]]


class CLIPTextTower(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token IDs (B, T) -> (B, C): the channels of each text's end token, the highest ID."""
        x = self.embeddings(input_ids)                                        # (B, T, C)
        for layer in self.encoder.layers:
            x = layer(x, is_causal=True)                                      # (B, T, C)
        ends = torch.arange(len(x), device=x.device), input_ids.argmax(-1)
        return self.final_layer_norm(x)[ends]


class CLIPText(nn.Module):
    """What CLIP adds to LLaVA's vision tower: words and patches in one space."""
    tokenizer: Tokenizer

    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig, projection_dim: int) -> None:
        super().__init__()
        self.text_model = CLIPTextTower(text)
        self.visual_projection = nn.Linear(vision.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)

    def embed(self, text: str) -> Tensor:
        """A text (E,), not normalised; what is longer than the text tower reads is cut off."""
        ids = self.tokenizer.encode(text).ids
        longest = self.text_model.config.max_position_embeddings
        ids = ids[:longest - 1] + ids[-1:]                                    # the end token stays
        device = self.text_model.final_layer_norm.weight.device
        return self.text_projection(self.text_model(torch.tensor([ids], device=device)))[0]
