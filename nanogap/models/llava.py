"""LLaVA-1.5: CLIP's eyes, two linear layers, and Vicuna; the mini model is one of these.

In:  a picture in a padded square of S x S pixels.  Out: one visual token for each of its patches.

Source: LLaVA-1.5, arXiv 2310.03744, in the layouts of llava-hf's repositories on the hub, as
transformers 5.23 reads them.  The template is vicuna_v1 of haotian-liu/LLaVA; that of the hub's
processor lacks the system sentence, and LLaVA was trained with it.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nanogap.checks.checkpoint import OWN_LAYOUT
from nanogap.checks.command import NanogapError
from nanogap.checks.config import (
    HUGE,
    LAYERS,
    integer,
    own_layout,
    read_decoder,
    read_json,
    read_vision,
    refuse_quantised,
    require_all,
    section,
    write_json,
)
from nanogap.checks.settings import PIXELS, VICUNAS, Chat, check_question, read_ends, read_pixels
from nanogap.clip import CLIPVisionConfig, CLIPVisionTower
from nanogap.ground import EncodedImage
from nanogap.image import CLIP_MEAN, CLIP_STD, Frame, Pad, to_pixel_values
from nanogap.llama import LlamaConfig, LlamaForCausalLM
from nanogap.models.base import VLM
from nanogap.prompt import TWO_DECIMALS, Template
from nanogap.prune import View, VisualTokens

DOWNLOAD = "`hf download llava-hf/llava-1.5-7b-hf --local-dir weights/llava-1.5-7b-hf` (14 GB)"
CLIP_DOWNLOAD = ("`hf download openai/clip-vit-large-patch14-336 pytorch_model.bin config.json "
                 "tokenizer.json --local-dir weights/clip-vit-large-patch14-336` (1.7 GB)")
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")
VICUNA = Template(
    before=f"{SYSTEM} USER: ",
    after="\n{} ASSISTANT:",
    where_is=("Please provide the bounding box coordinate of the region "
              "this sentence describes: {}."))
# what would change an answer and is not implemented: key -> the values that change nothing
REQUIRED: dict[str, tuple] = {
    "projector_hidden_act": ("gelu",), "vision_feature_select_strategy": ("default",),
    "auto_map": (None, {})}


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


class LlavaProjector(nn.Module):
    """From CLIP's channels to the decoder's, patch by patch; GELU is the exact one here."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        vision, text = config.vision.hidden_size, config.text.hidden_size
        self.linear_1 = nn.Linear(vision, text, bias=config.projector_bias)
        self.linear_2 = nn.Linear(text, text, bias=config.projector_bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class Llava(VLM):
    Config = LlavaConfig
    download = DOWNLOAD
    frame: Frame = Pad()
    template = VICUNA
    box_format = TWO_DECIMALS
    special_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<pad>")
    chats: ClassVar[dict[str, Chat]] = {"llama": Chat("Vicuna", VICUNAS, (SYSTEM,))}
    own_layout: ClassVar[str] = OWN_LAYOUT         # what a folder as its authors have it is told
    required: ClassVar[dict[str, tuple]] = REQUIRED
    pixels: ClassVar[dict[str, tuple]] = PIXELS    # what preprocessor_config.json may say
    # keys of config.json that never differ
    fixed: ClassVar[dict] = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
    # four layouts: (a) the published one; (b), (c), (d) as transformers has written it since.
    # Modules are named as in (b):
    rename: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^model\.language_model\.", "language_model.model."),               # (c), (d)
        (r"^lm_head\.", "language_model.lm_head."),                           # (c), (d)
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),          # (c), (d)
        (r"^vision_tower\.vision_model\.", "vision_tower."),                  # (a), (c)
    )
    on_disk = ((r"^vision_tower\.", "vision_tower.vision_model."),)           # (a)
    Tower = CLIPVisionTower

    multi_modal_projector: nn.Module

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        red, green, blue = (int(255 * share) for share in config.image_mean)
        self.frame = Pad((red, green, blue))     # LLaVA pads with the mean of the preprocessor
        self.vision_tower = CLIPVisionTower(config.vision, config.vision_feature_layer)
        self.multi_modal_projector = LlavaProjector(config)
        self.language_model = LlamaForCausalLM(config.text)

    # ----- what it sees ---------------------------------------------------------------------------

    def pixel_values(self, image: Image.Image) -> Tensor:
        """A picture -> (1, 3, S, S), padded to a square, on the model's device."""
        c = self.config
        square = self.frame.fit(image, c.vision.image_size)
        return to_pixel_values(square, c.image_mean, c.image_std).to(self.device, self.dtype)

    def encode_pixels(self, pixel_values: Tensor, width: int, height: int) -> EncodedImage:
        """One view of grid x grid patches; CLS is left out."""
        before, after = self.vision_tower(pixel_values)                       # (1, 1 + N, C) each
        features, grid = after[0, 1:], self.config.vision.grid                # (N, C)
        view = View(VisualTokens(features, grid, grid), torch.arange(len(features)))
        at = self.frame.cells(grid, grid, width, height)
        return EncodedImage(width, height, features, [view], at, hidden=(before[0], after[0]))

    def fields(self, image: EncodedImage, view: int, needs: Collection[str]) -> dict[str, Tensor]:
        """What strategies need to see."""
        before, after = image.hidden                                          # (1 + N, C) each
        return self.vision_tower.fields(before, after, needs)

    def project(self, features: Tensor) -> Tensor:
        """Visual tokens (K, C) -> as the decoder is fed them (K, C')."""
        return self.multi_modal_projector(features)

    def align(self, features: Tensor) -> Tensor:
        """Visual tokens (N, C) -> in CLIP's space of images and texts (N, E)."""
        return self.guide().clip.visual_projection(self.vision_tower.post_layernorm(features))

    def clip_download(self) -> str:
        return CLIP_DOWNLOAD

    def walk(self, image: EncodedImage) -> tuple[list[str], list[str]]:
        """What becomes of a picture, for --explain."""
        c, side = self.config.vision, max(image.width, image.height)
        square = [f"{image.width} x {image.height} pixels, padded to {side} x {side},",
                  f"resized to pixel_values (1, 3, {c.image_size}, {c.image_size})"]
        tower = ["CLIP turns patches into features",
                 f"{c.grid} x {c.grid} patches of {c.patch_size} pixels and CLS through "
                 f"{self.vision_tower.depth} of {c.num_hidden_layers} layers:",
                 f"features {tuple(image.features.shape)}, in raster order: row by row"]
        return square, tower

    # ----- its files ------------------------------------------------------------------------------

    @classmethod
    def read_config(cls, folder: Path) -> LlavaConfig:
        """config.json, and what generation_config.json and preprocessor_config.json add to it.

        raises: NanogapError where one is broken, or describes a model that is not LLaVA-1.5
        """
        config = read_json(folder / "config.json")
        own = own_layout(config)
        if own:
            says = cls.own_layout.format(folder=folder)
            raise NanogapError(f"{folder} {says} (config.json has {own})")
        refuse_quantised(folder, config, section(config, "text_config"))
        require_all(config, cls.required)
        tied = {"tie_word_embeddings": True} if config.get("tie_word_embeddings") else {}
        text = read_decoder(section(config, "text_config") | tied, list(cls.chats))
        kind = section(config, "text_config").get("model_type") or "llama"
        check_question(folder, cls.chats[kind])
        vision = read_vision(config)
        layer = integer(config, "vision_feature_layer", -2, LAYERS, -LAYERS)
        layers = vision.num_hidden_layers
        if not 0 < (layer if layer >= 0 else layer + layers + 1) < layers:
            raise NanogapError(f"config.json: vision_feature_layer is {layer}; it must leave a "
                               f"layer before and after the features, of {layers}")
        tokens = {key: config[key] for key in ("image_token_index", "image_token_id")
                  if config.get(key) is not None}
        if len(set(map(str, tokens.values()))) > 1:
            raise NanogapError(f"config.json: {tokens} name two image tokens; leave one of them")
        token = next(iter(tokens), "image_token_index")
        pixels = read_pixels(folder, vision.image_size, vision.patch_size, cls.pixels)
        ends = read_ends(folder, config, section(config, "text_config"), text.vocab_size)
        most = text.vocab_size - 1
        return cls.Config(
            text, vision, vision_feature_layer=layer,
            image_token=integer(config, token, 32000, HUGE, 0),
            projector_bias=bool(config.get("multimodal_projector_bias", True)),
            bos_token=integer(section(config, "text_config"), "bos_token_id", 1, most, 0),
            eos_token=ends[0], other_ends=ends[1:],
            image_mean=pixels.mean, image_std=pixels.std,
            dtype=str(config.get("torch_dtype") or config.get("dtype") or ""))

    def write_config(self, folder: Path, dtype: str) -> None:
        """config.json as the hub has it, every key spelled out, and the two files beside it."""
        for name, value in self.settings(dtype).items():
            write_json(folder / name, value)

    def settings(self, dtype: str) -> dict[str, dict]:
        """What is written into each of these files."""
        c = self.config
        text = asdict(c.text) | {
            "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
            "bos_token_id": c.bos_token, "eos_token_id": c.eos_token}
        vision = asdict(c.vision) | {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
        size = c.vision.image_size
        ends = [c.eos_token, *c.other_ends] if c.other_ends else c.eos_token
        return {
            "config.json": {
                **self.fixed,
                "image_token_index": c.image_token, "image_seq_length": c.vision.grid ** 2,
                "multimodal_projector_bias": c.projector_bias,
                "text_config": text, "vision_config": vision, "torch_dtype": dtype,
                "tie_word_embeddings": c.text.tie_word_embeddings,
                "vision_feature_layer": c.vision_feature_layer},
            "generation_config.json": {"bos_token_id": c.bos_token, "eos_token_id": ends},
            "preprocessor_config.json": {
                "image_processor_type": "CLIPImageProcessor", "image_mean": c.image_mean,
                "image_std": c.image_std, "do_resize": True, "size": {"shortest_edge": size},
                "resample": 3, "do_center_crop": True,
                "crop_size": {"height": size, "width": size}, "do_rescale": True,
                "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True}}
