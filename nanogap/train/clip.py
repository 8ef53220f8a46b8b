"""CLIP as a whole, as it is trained: both towers, and their projections into one space."""

from collections.abc import Callable
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogap.clip import CLIPTextConfig, CLIPTextTower, CLIPVisionConfig, CLIPVisionTower


def pooled(tower: Any, pixel_values: Tensor) -> Tensor:
    """A tower's summary of images (B, C): CLS after all layers and the last LayerNorm."""
    if not isinstance(tower, CLIPVisionTower):
        return tower.pooled(pixel_values)
    x = tower.pre_layrnorm(tower.embeddings(pixel_values))                    # (B, 1 + N, C)
    for layer in tower.encoder.layers:
        x = layer(x)
    return tower.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    """Both towers and their projections into one space, as CLIP trains them."""

    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig, projection_dim: int,
                 tower: Callable[[Any], Any] = CLIPVisionTower) -> None:
        """tower: makes another vision tower of its sizes; it needs a `pooled` as CLIP's has."""
        super().__init__()
        self.vision_model = tower(vision)
        self.text_model = CLIPTextTower(text)
        self.visual_projection = nn.Linear(vision.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)
        # not torch.tensor(1 / 0.07).log(): on meta that imports torch's compiler, for a second
        self.logit_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> unit vectors (B, projection_dim)."""
        summary = pooled(self.vision_model, pixel_values)                     # (B, C)
        return F.normalize(self.visual_projection(summary), dim=-1)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """Texts (M, T) -> unit vectors (M, projection_dim)."""
        return F.normalize(self.text_projection(self.text_model(input_ids)), dim=-1)
