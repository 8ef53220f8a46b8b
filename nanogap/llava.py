"""LLaVA-1.5: CLIP's vision tower, two linear layers, and Vicuna; the mini model is one of these.

In:  a picture in a padded square of S x S pixels, and token IDs.
Out: one visual token for each of its patches; the embeddings of a prompt; boxes in pixels.
Source: LLaVA-1.5, arXiv 2310.03744, as llava-hf publishes it; the template is LLaVA's vicuna_v1.
Letters: P tokens before the image, N visual tokens, K of them kept, M added, A tokens after it.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Generator, Tensor, nn

from nanogap.clip import CLIPText, CLIPVisionConfig, CLIPVisionTower
from nanogap.errors import NanogapError
from nanogap.image import CLIP_MEAN, CLIP_STD, Box, Pad, open_image, to_pixel_values
from nanogap.llama import LlamaConfig, LlamaForCausalLM
from nanogap.prompt import TWO_DECIMALS, BoxFormat, Template
from nanogap.prune import STRATEGIES, Kept, VisualTokens, needs_of

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")
VICUNA = Template(
    before=f"{SYSTEM} USER: ",
    after="\n{} ASSISTANT:",
    where_is=("Please provide the bounding box coordinate of the region "
              "this sentence describes: {}."))


@dataclass(frozen=True)
class LlavaConfig:
    text: LlamaConfig
    vision: CLIPVisionConfig
    image_token: int = 32000
    vision_feature_layer: int = -2
    projector_bias: bool = True
    bos_token: int = 1
    eos_token: int = 2
    other_ends: tuple[int, ...] = ()       # tokens that end an answer as well
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    dtype: str = "float32"        # of the checkpoint on disk


@dataclass
class EncodedImage:
    """A picture as a model sees it, which any number of questions can share."""
    width: int
    height: int
    features: Tensor          # (N, C) before the projector, in the order of the prompt
    rows: int
    columns: int
    hidden: Any               # states before and after the feature layer, for `fields`: clip.py
    fields: dict[str, Tensor] = field(default_factory=dict)   # those that were: see prune.FIELDS
    vision_ms: float = 0.0

    @property
    def n_visual(self) -> int:
        """N: visual tokens before pruning."""
        return len(self.features)

    n_patches = n_visual      # how many of them a strategy can choose from


def clock_ms(device: torch.device) -> float:
    """Milliseconds, after all that the device has been asked to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


class LlavaProjector(nn.Module):
    """From CLIP's channels to the decoder's, patch by patch; GELU is the exact one here."""

    def __init__(self, vision: int, text: int, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision, text, bias=bias)
        self.linear_2 = nn.Linear(text, text, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class Llava(nn.Module):
    Config: ClassVar[type[LlavaConfig]] = LlavaConfig
    template: Template = VICUNA
    box_format: BoxFormat = TWO_DECIMALS
    # names on disk -> ours; transformers has written them in four ways over time
    rename: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^model\.language_model\.", "language_model.model."),               # since 4.52
        (r"^lm_head\.", "language_model.lm_head."),                           # since 4.52
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),          # since 4.52
        (r"^vision_tower\.vision_model\.", "vision_tower."))                  # before 5
    get_clip: ClassVar[str] = "give the folder of its CLIP by --clip"

    tokenizer: Tokenizer
    text_guide: CLIPText | None          # for strategies that read the expression

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config, self.text_guide = config, None
        red, green, blue = (int(255 * share) for share in config.image_mean)
        self.frame: Any = Pad((red, green, blue))    # LLaVA pads with the preprocessor's mean
        self.vision_tower: Any = CLIPVisionTower(config.vision, config.vision_feature_layer)
        self.multi_modal_projector: nn.Module = LlavaProjector(
            config.vision.hidden_size, config.text.hidden_size, config.projector_bias)
        self.language_model = LlamaForCausalLM(config.text)

    @classmethod
    def complete(cls, config: dict) -> dict:
        """config.json with what published files leave out, where that is not the usual."""
        return config

    @property
    def device(self) -> torch.device:
        return self.language_model.model.norm.weight.device

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return (self.config.eos_token, *self.config.other_ends)      # any of them ends an answer

    def pixel_values(self, image: Image.Image) -> Tensor:
        """A picture in RGB -> (1, 3, S, S), on the model's device."""
        square = self.frame.fit(image, self.config.vision.image_size)
        pixels = to_pixel_values(square, self.config.image_mean, self.config.image_std)
        return pixels.to(self.language_model.model.norm.weight)      # its device and precision

    @torch.no_grad()
    def encode_image(self, image: Image.Image | str | Path | EncodedImage) -> EncodedImage:
        """Run the vision tower on a picture, once for all the questions about it."""
        if isinstance(image, EncodedImage):
            return image
        image, start = open_image(image), clock_ms(self.device)
        encoded = self.encode_pixels(self.pixel_values(image), *image.size)
        encoded.vision_ms = clock_ms(self.device) - start
        return encoded

    def encode_pixels(self, pixel_values: Tensor, width: int, height: int) -> EncodedImage:
        """What it sees of a picture of that size: grid x grid patches; CLS is left out."""
        before, after = self.vision_tower(pixel_values)                       # (1, 1 + N, C) each
        grid = self.config.vision.grid
        return EncodedImage(width, height, after[0, 1:], grid, grid, (before[0], after[0]))

    def see(self, image: EncodedImage, needs: Collection[str], expression: str) -> VisualTokens:
        """A picture with what a strategy needs to see of it, and nothing else."""
        missing = set(needs) - set(image.fields) - {"text"}
        if missing:
            image.fields |= self.fields(image, missing)
        if "projected" in missing:
            image.fields["projected"] = self.project(image.features)          # (N, C')
        if "aligned" in missing:
            image.fields["aligned"] = self.guide().visual_projection(
                self.vision_tower.post_layernorm(image.features))             # (N, E)
        fields = {name: image.fields[name] for name in needs if name != "text"}
        if "text" in needs:      # open: which words the paper reads; here it is the expression
            fields["text"] = self.guide().embed(expression)                   # (E,)
        return VisualTokens(image.features, image.rows, image.columns, fields)

    def fields(self, image: EncodedImage, needs: Collection[str]) -> dict[str, Tensor]:
        """What the vision tower tells of a picture: see FIELDS in prune.py."""
        return self.vision_tower.fields(*image.hidden, needs)

    def select(self, image: EncodedImage, expression: str, prune: str, budget: int | None,
               seed: int) -> Kept:
        """Which patches a strategy keeps."""
        seen = self.see(image, needs_of(prune), expression)
        kept = STRATEGIES[prune](seen, budget, Generator().manual_seed(seed))
        return Kept(kept.ranked.cpu(), kept.features, kept.added)

    def project(self, features: Tensor) -> Tensor:
        """Visual tokens (K, C) -> as the decoder is fed them (K, C')."""
        return self.multi_modal_projector(features)

    def guide(self) -> CLIPText:
        """CLIP's text tower; no LLaVA checkpoint holds it."""
        if self.text_guide is None:
            raise NanogapError("to compare patches with words takes CLIP's text tower, which the "
                               f"model's checkpoints do not hold; {self.get_clip}")
        return self.text_guide

    def encode_question(self, question: str) -> Tensor:
        """A whole question as input_ids (P + 1 + A,) with one image token, on the CPU."""
        bos, image = self.config.bos_token, self.config.image_token
        return torch.tensor(self.template.encode(self.tokenizer, question, bos, image))

    def around_image(self, input_ids: Tensor) -> tuple[int, int]:
        """P and A: how many tokens stand before and after the one image token."""
        P = input_ids.tolist().index(self.config.image_token)
        return P, len(input_ids) - P - 1

    def embed(self, input_ids: Tensor, image: EncodedImage, kept: Kept, order: Tensor) -> Tensor:
        """The prompt with what is kept in place of its image token: (1, P + K + M + A, C')."""
        visual = self.visual_tokens(image, kept, order)                       # (K + M, C')
        P, _ = self.around_image(input_ids)
        embed_tokens, input_ids = self.language_model.model.embed_tokens, input_ids.to(self.device)
        before, after = embed_tokens(input_ids[:P]), embed_tokens(input_ids[P + 1:])
        return torch.cat([before, visual, after])[None]

    def visual_tokens(self, image: EncodedImage, kept: Kept, order: Tensor) -> Tensor:
        """What is kept of a picture, in that order, as the decoder is fed it (K + M, C')."""
        features, device = kept.features, self.device
        if features is None:
            features = image.features[kept.ranked.to(device)]                 # (K, C)
        added = [] if kept.added is None else [kept.added]
        return self.project(torch.cat([features[order.to(device)], *added]))

    def box_in(self, text: str, width: int, height: int) -> Box | None:
        """The box in an answer, in pixels; None where there is none, or only padding lies in it."""
        said = self.box_format.parse(text)
        box = said and self.frame.to_pixels(said, width, height)
        return box if box and box[0] < box[2] and box[1] < box[3] else None
