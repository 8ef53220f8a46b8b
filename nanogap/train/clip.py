"""CLIP as a whole, as it is trained: both towers, their projections into one space, and the loss.

Source: arXiv 2103.00020.
Letters: B images, C captions or channels, E channels of CLIP's space.
"""

from collections.abc import Callable
from dataclasses import asdict
from math import log
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap.clip import CLIPTextConfig, CLIPTextTower, CLIPVisionConfig, CLIPVisionTower
from nanogap.models.base import write_json
from nanogap.models.saving import save_tensors
from nanogap.train.questions import SINGLES, Batch
from nanogap.train.scenes import contents


class CLIP(nn.Module):
    tokenizer: Tokenizer

    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig, projection_dim: int,
                 tower: Callable[[Any], Any] = CLIPVisionTower) -> None:
        super().__init__()
        self.vision_model = tower(vision)
        self.vision_model.depth = vision.num_hidden_layers     # LLaVA takes the last layer but one
        self.text_model = CLIPTextTower(text)
        self.visual_projection = nn.Linear(vision.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)
        # not torch.tensor(1 / 0.07).log(): on meta that imports torch's compiler, for a second
        self.logit_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> unit vectors (B, E), of CLS after all layers and a LayerNorm."""
        _, x = self.vision_model(pixel_values)                                # (B, 1 + N, C)
        cls = x[:, 0]                                                         # (B, C)
        own = getattr(self.vision_model, "post_layernorm", None)              # EVA has none
        seen = own(cls) if own else F.layer_norm(cls, cls.shape[-1:])
        return F.normalize(self.visual_projection(seen), dim=-1)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """Texts (M, T) -> unit vectors (M, E)."""
        return F.normalize(self.text_projection(self.text_model(input_ids)), dim=-1)


def clip_loss(clip: CLIP, batch: Batch) -> Tensor:
    """The symmetric contrastive loss; of C captions, those true of an image have equal shares."""
    pixels, scenes, captions = batch
    device = clip.logit_scale.device
    held = [contents(scene.things) for scene in scenes]
    claims = held + [contents([thing]) for thing in SINGLES]
    truth = torch.tensor([[float(claim <= have) for claim in claims] for have in held],
                         device=device)                                       # (B, C)
    ids = [[encoded.ids for encoded in clip.tokenizer.encode_batch(said)]     # padded to the
           for said in captions]                                              # longest of each list
    texts = torch.cat([clip.text_features(torch.tensor(rows, device=device)) for rows in ids])
    first_views = torch.cat([views[:1] for views in pixels])                  # (B, 3, S, S)
    images = clip.image_features(first_views.to(device))                      # (B, E)
    logits = clip.logit_scale.exp() * images @ texts.T                        # (B, C)
    by_image = F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
    true = truth.sum(0) > 0                                                   # (C,) of any image
    by_text = F.cross_entropy(logits.T[true], (truth / truth.sum(0)).T[true])
    return (by_image + by_text) / 2


def save_clip(folder: Path, clip: CLIP, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write both towers in the layout of openai/clip-vit-large-patch14-336."""
    folder.mkdir(parents=True, exist_ok=True)
    start, end = map(clip.tokenizer.token_to_id, ("<|startoftext|>", "<|endoftext|>"))
    width = clip.visual_projection.out_features
    shared = {"projection_dim": width, "hidden_act": "quick_gelu"}
    config = {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "text_config": asdict(clip.text_model.config) | shared | {
            "bos_token_id": start, "eos_token_id": end, "pad_token_id": end,
            "model_type": "clip_text_model"},
        "vision_config": asdict(clip.vision_model.config) | shared | {
            "model_type": "clip_vision_model"}}
    write_json(folder / "config.json", config)
    clip.tokenizer.save(str(folder / "tokenizer.json"))
    save_tensors(folder / "model.safetensors", clip, dtype)
