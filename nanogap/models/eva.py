"""EVA's vision tower, as MiniGPT-v2 uses it.

What differs from CLIP's (nanogap/clip.py): queries, keys and values come from one matrix, and keys
have no bias; the patches' convolution has one; GELU is the exact one; no LayerNorm stands before
the blocks or behind them.  Modules are named as in the published eva_vit_g.pth.
Source: EVA, arXiv 2211.07636; eva_vit.py of Vision-CAIR/MiniGPT-4.
Letters: B batch, N patches, C channels, H heads, D head dim; T tokens, or 1 + N with CLS first.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogap.clip import CLIPMLP, CLIPVisionConfig

# 39 of its 40 blocks, as MiniGPT-v2 runs them, on pictures twice as wide as in its training
VIT_G_14 = CLIPVisionConfig(
    hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16,
    image_size=448, patch_size=14, layer_norm_eps=1e-6)


def interpolate_positions(table: Tensor, grid: int) -> Tensor:
    """A position table (1, 1 + n * n, C) -> (1, 1 + grid * grid, C) in float32; CLS's row stays.

    source: interpolate_pos_embed of MiniGPT-4, bicubic; EVA was trained on 16 x 16 patches
    """
    cls, patches = table.float().split([1, table.shape[1] - 1], dim=1)        # (1, n * n, C)
    n = isqrt(patches.shape[1])
    square = patches.unflatten(1, (n, n)).permute(0, 3, 1, 2)                 # (1, C, n, n)
    square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, square.flatten(2).transpose(1, 2)], dim=1)


def fit_positions(tower: Any, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Interpolate the position table of a state that is loaded, where it has another size."""
    name, grid = f"{prefix}pos_embed", tower.config.grid
    if name in state and state[name].shape[1] != 1 + grid ** 2:
        state[name] = interpolate_positions(state[name], grid).to(state[name].dtype)


class EvaAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(hidden_size))                  # keys have none
        self.proj = nn.Linear(hidden_size, hidden_size)

    def queries_keys_values(self, x: Tensor) -> Sequence[Tensor]:
        """Tokens (B, T, C) -> queries, keys and values (B, T, C) each, heads not split."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)          # (B, H, T, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split, self.queries_keys_values(x))                # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v)                           # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))                        # (B, T, C)


class EvaMLP(CLIPMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class EvaBlock(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.norm1 = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.attn = EvaAttention(C, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.mlp = EvaMLP(C, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))                                      # (B, T, C)
        return x + self.mlp(self.norm2(x))                                    # (B, T, C)


class EvaTower(nn.Module):
    blocks: Sequence[EvaBlock]

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.depth = config.num_hidden_layers           # the features are those of the last block
        C, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid ** 2, C))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, C, patch, stride=patch)})
        self.blocks = nn.ModuleList(                                 # type: ignore[assignment]
            EvaBlock(config) for _ in range(config.num_hidden_layers))
        self.register_load_state_dict_pre_hook(fit_positions)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) -> hidden states (B, 1 + N, C) before and after the last block.

        differs: in half precision the original has sums, positions and CLS in float32
        """
        patches = self.patch_embed["proj"](pixel_values)                      # (B, C, grid, grid)
        patches = patches.flatten(2).transpose(1, 2)                          # (B, N, C)
        cls = self.cls_token.expand(len(patches), -1, -1)                     # (B, 1, C)
        x = torch.cat([cls, patches], dim=1) + self.pos_embed                 # (B, 1 + N, C)
        for block in self.blocks[:-1]:
            x = block(x)                                                      # (B, 1 + N, C)
        return x, self.blocks[-1](x)

    def fields(self, before: Tensor) -> dict[str, Tensor]:
        """What strategies may see of the last block, whose input is (1 + N, C): see FIELDS."""
        attn = self.blocks[-1].attn
        queries, keys, _ = attn.queries_keys_values(self.blocks[-1].norm1(before[None]))
        q, k = attn.split(queries[:, :1]), attn.split(keys)                   # (1, H, 1 + N, D)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5   # (1,H,1,D) x (1,H,D,1+N)
        return {"cls_attention": scores.float().softmax(-1)[0, :, 0, 1:],     # (H, N)
                "keys": k.mean(1)[0, 1:],                                     # (N, D)
                "last_queries": queries[0], "last_keys": keys[0]}             # (1 + N, C)
