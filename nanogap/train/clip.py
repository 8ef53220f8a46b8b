"""CLIP as a whole, as it is trained: both towers, their projections into one space, and the loss.

Source: arXiv 2103.00020.
Letters: B images, C captions or channels, E channels of CLIP's space.
"""

import random
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
from nanogap.models.eva import EvaTower
from nanogap.models.saving import save_tensors
from nanogap.train.questions import Batch
from nanogap.train.scenes import COLOURS, KINDS, Scene, Thing, caption, contents

SINGLES = [Thing(kind, colour, (0.0, 0.0, 1.0, 1.0)) for kind in KINDS for colour in COLOURS]


def pooled(tower: CLIPVisionTower | EvaTower, pixel_values: Tensor) -> Tensor:
    """A tower's summary of images (B, C): CLS after all layers and the last LayerNorm.

    EVA's has none of its own: CLS is normalised as MiniGPT-v2 normalises what it reads.
    """
    if isinstance(tower, EvaTower):
        _, x = tower(pixel_values)                                            # (B, 1 + N, C)
        return F.layer_norm(x[:, 0], x.shape[-1:])
    x = tower.pre_layrnorm(tower.embeddings(pixel_values))                    # (B, 1 + N, C)
    for layer in tower.encoder.layers:
        x = layer(x)
    return tower.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig, projection_dim: int,
                 tower: Callable[[Any], Any] = CLIPVisionTower) -> None:
        """tower: makes the vision tower of these sizes; EVA's is the other one."""
        super().__init__()
        self.vision_model = tower(vision)
        self.text_model = CLIPTextTower(text)
        self.visual_projection = nn.Linear(vision.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)
        # not torch.tensor(1 / 0.07).log(): on meta that imports torch's compiler, for a second
        self.logit_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> unit vectors (B, E)."""
        seen = pooled(self.vision_model, pixel_values)                        # (B, C)
        return F.normalize(self.visual_projection(seen), dim=-1)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """Texts (M, T) -> unit vectors (M, E)."""
        return F.normalize(self.text_projection(self.text_model(input_ids)), dim=-1)


def captions(scenes: list[Scene], rng: random.Random) -> tuple[list[str], list[str]]:
    """A caption for each scene, which names everything in it, and for each thing that can be."""
    return ([caption(scene.things, rng) for scene in scenes],
            [caption([thing], rng) for thing in SINGLES])


def clip_loss(clip: CLIP, tokenizer: Tokenizer, batch: Batch, device: torch.device) -> Tensor:
    """The symmetric contrastive loss between B images and C captions that may be true of them.

    Several are true of an image, so the targets are equal shares.
    """
    pixels, scenes, (wholes, singles) = batch
    held = [contents(scene.things) for scene in scenes]
    claims = held + [contents([thing]) for thing in SINGLES]
    truth = torch.tensor([[float(claim <= have) for claim in claims] for have in held])
    truth = truth.to(device)                                                  # (B, C)
    # each list is padded to its own longest
    ids = [[encoded.ids for encoded in tokenizer.encode_batch(said)] for said in (wholes, singles)]
    texts = torch.cat([clip.text_features(torch.tensor(rows, device=device)) for rows in ids])
    first_views = torch.cat([views[:1] for views in pixels])                  # (B, 3, S, S)
    images = clip.image_features(first_views.to(device))                      # (B, E)
    logits = clip.logit_scale.exp() * images @ texts.T                        # (B, C)
    by_image = F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
    true = truth.sum(0) > 0                                                   # (C,) of any image
    by_text = F.cross_entropy(logits.T[true], (truth / truth.sum(0)).T[true])
    return (by_image + by_text) / 2


def save_clip(folder: Path, clip: CLIP, tokenizer: Tokenizer,
              dtype: torch.dtype = torch.bfloat16) -> None:
    """Write both towers in the layout of openai/clip-vit-large-patch14-336."""
    folder.mkdir(parents=True, exist_ok=True)
    start, end = map(tokenizer.token_to_id, ("<|startoftext|>", "<|endoftext|>"))
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
    tokenizer.save(str(folder / "tokenizer.json"))
    save_tensors(folder / "model.safetensors", clip, dtype)
