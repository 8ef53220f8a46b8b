"""What commands ask of a model on top of the lesson's LLaVA: this is LLaVA-1.5.

The other families stand on it, in a file each, which says what differs: what it sees, what it is
asked and how it says a box, the way from the tower to the decoder, its files.
Letters: P tokens before the image, N visual tokens, K of them kept, A tokens after it.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from nanogap.clip import CLIPVisionTower
from nanogap.errors import ItemError, NanogapError
from nanogap.fast.ground_all import describe, ground, ground_all, ground_runs
from nanogap.gap import lay_out
from nanogap.image import Box, Pad, open_image
from nanogap.llava import EncodedImage, Llava, LlavaConfig
from nanogap.prompt import Shares
from nanogap.prune import Kept, VisualTokens


def cells(rows: int, columns: int, area: Box) -> Tensor:
    """Where the cells of a grid over (left, top, width, height) lie: (rows * columns, 4)."""
    left, top, across, down = area
    index = torch.arange(rows * columns)
    x = index % columns * across / columns + left
    y = index // columns * down / rows + top
    return torch.stack([x, y, x + across / columns, y + down / rows], dim=1)


class Padded(Pad):
    """The lesson's frame, and the way from pixels to it."""

    def area(self, width: int, height: int) -> Box:
        """Where the square lies: left, top, width, height, in pixels of the picture."""
        side, (dx, dy) = max(width, height), self.offset(width, height)
        return -dx, -dy, side, side

    def from_pixels(self, box: Sequence[float], width: int, height: int) -> Box:
        """A box (x1, y1, x2, y2) in pixels of the picture -> shares of the square."""
        left, top, across, down = self.area(width, height)
        return ((box[0] - left) / across, (box[1] - top) / down,
                (box[2] - left) / across, (box[3] - top) / down)

    def cells(self, rows: int, columns: int, width: int, height: int) -> Tensor:
        """Which part of the picture each patch shows: (rows * columns, 4), pixels, not clipped."""
        return cells(rows, columns, self.area(width, height))


class Stretch(Padded):
    """Nothing is padded: the picture is stretched to a square.  Source: blip_processors.py."""

    def area(self, width: int, height: int) -> Box:
        return 0, 0, width, height

    def fit(self, image: Image.Image, size: int) -> Image.Image:
        """The stretched picture, size x size pixels."""
        return image.resize((size, size), Image.Resampling.BICUBIC)

    def to_pixels(self, box: Sequence[float], width: int, height: int) -> Box:
        """A box of shares (x1, y1, x2, y2) -> pixels of the picture, clipped to it."""
        x1, y1, x2, y2 = (min(max(share, 0.0), 1.0) for share in box)
        return x1 * width, y1 * height, x2 * width, y2 * height


class VLM(Llava):
    """A model as `nanogap.load` gives it: it answers the fast way, and can be written."""

    # our names -> the published ones
    on_disk: ClassVar[tuple] = ((r"^vision_tower\.", "vision_tower.vision_model."),)
    Tower: ClassVar[type] = CLIPVisionTower    # of its configuration's `vision`
    frame: Any = Padded()                      # in which boxes are said
    pictures_alike: ClassVar[bool] = True      # whether all have as many visual tokens
    # the commands that fetch its published weights
    download: ClassVar[str] = (
        "`hf download llava-hf/llava-1.5-7b-hf --local-dir weights/llava-1.5-7b-hf` (14 GB)")
    clip_download: ClassVar[str] = (
        "`hf download openai/clip-vit-large-patch14-336 pytorch_model.bin config.json "
        "tokenizer.json --local-dir weights/clip-vit-large-patch14-336` (1.7 GB)")
    get_clip = f"get it with {clip_download} and give it by --clip"
    special_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<pad>")   # the image's comes first
    next_pass: Any = None                      # a pass behind the prompt: see fast/graph.py
    later: str = "USER: {} ASSISTANT:"         # a question that follows an answer
    fixed: ClassVar[dict] = {                  # keys of config.json that never differ
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}

    ground = ground                            # as model.ground(image, expression, ...)
    ground_all = ground_all                    # many expressions at once
    ground_runs = ground_runs                  # and under several prunings
    describe = describe

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.frame = Padded(self.frame.colour)

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.norm.weight.dtype

    def prepare_image(self, image: Image.Image | str | Path) -> Tensor:
        """Any picture, or the path of one -> pixel_values (views, 3, S, S)."""
        return self.pixel_values(open_image(image))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, keep: Tensor | None = None,
                mode: str = "gap", size: tuple[int, int] | None = None) -> Tensor:
        """Logits (P + K + A, V) in float32 of a prompt (T,) with one image token; None keeps all.

        size: (width, height) of the picture, where the visual tokens depend on it
        """
        width, height = size or (pixel_values.shape[-1], pixel_values.shape[-2])
        image = self.encode_pixels(pixel_values.to(self.device, self.dtype), width, height)
        kept = Kept(torch.arange(image.n_visual) if keep is None else keep.cpu())
        P, A = self.around_image(input_ids)
        layout = lay_out(kept.ranked, P, image.n_visual, A, mode)
        x = self.embed(input_ids, image, kept, layout.order)                  # (1, P + K + A, C')
        return self.language_model(x, layout.position_ids.to(self.device))[0]

    def question(self, expression: str) -> str:
        return self.template.question(expression)

    def prompt(self, expression: str) -> Tensor:
        """The question about an expression as input_ids (P + 1 + A,), on the CPU."""
        return self.encode_question(self.question(expression))

    def parse_box(self, text: str) -> Shares | None:
        """The first box in an answer: four numbers in [0, 1] of the model's own frame, or None."""
        return self.box_format.parse(text)

    def to_pixels(self, box: Shares, width: int, height: int) -> Box:
        """A box of the model's frame in pixels of the original image."""
        return self.frame.to_pixels(box, width, height)

    def around_image(self, input_ids: Tensor) -> tuple[int, int]:
        """P and A: how many tokens stand before and after the one image token."""
        images = int((input_ids == self.config.image_token).sum())
        if images != 1:
            raise NanogapError(f"the prompt must hold one image token, not {images}")
        return super().around_image(input_ids)

    def check_length(self, positions: int) -> None:
        """Reject a question whose position IDs leave the range that the model was made for."""
        most = self.config.text.max_position_embeddings
        if positions > most:
            raise ItemError("the expression is too long: with the image and room for the answer "
                            f"the model would need {positions} positions and has {most}; shorten "
                            "it, or lower --max-new-tokens")

    def follow(self, question: str) -> str:
        """A question that follows an answer: the image is where it was."""
        return self.later.format(question.replace(" <image>", ""))

    def see(self, image: EncodedImage, needs: Collection[str], expression: str) -> VisualTokens:
        """A picture with what a strategy needs to see of it, the whole question among it."""
        seen = super().see(image, set(needs) - {"question"}, expression)
        if "question" in needs:
            guide = self.guide()
            ids = torch.tensor(guide.tokenizer.encode(self.question(expression)).ids)     # (T,)
            longest = guide.text_model.config.max_position_embeddings
            rows = [guide.text_projection(guide.text_model(part[None]))
                    for part in ids.to(self.device).split(longest)]           # (1, E) each
            seen.fields["question"] = torch.cat(rows)                         # (S, E)
            seen.fields.setdefault("text", seen.fields["question"][0])        # for those of one row
        return seen

    def views(self, image: EncodedImage) -> list[Tensor]:
        """The rectangles that a picture is seen as: which visual token each patch is."""
        return [torch.arange(image.n_visual).view(image.rows, image.columns)]

    def newlines(self, image: EncodedImage) -> set[int]:
        """The visual tokens that close rows, and show nothing."""
        x1, _, x2, _ = self.cells(image).T
        return set((x1 == x2).nonzero()[:, 0].tolist())

    def cells(self, image: EncodedImage) -> Tensor:
        """Which part of the picture each visual token shows: (N, 4), pixels; newlines: nothing."""
        return self.frame.cells(image.rows, image.columns, image.width, image.height)

    def padding(self, image: EncodedImage, kept: Tensor) -> float:
        """Which share of the patches among (K,) tokens shows only padding; 0 of none."""
        x1, y1, x2, y2 = self.cells(image)[kept.cpu()].T
        outside = (x2 <= 0) | (y2 <= 0) | (x1 >= image.width) | (y1 >= image.height)
        patches = x1 < x2                                            # the others are newlines
        return float((outside & patches).sum() / patches.sum().clamp(min=1))

    def walk(self, image: EncodedImage) -> tuple[list[str], list[str]]:
        """For --explain: how a picture becomes squares; what the tower does, a heading first."""
        c, side = self.config.vision, max(image.width, image.height)
        square = [f"{image.width} x {image.height} pixels, padded to {side} x {side},",
                  f"resized to pixel_values (1, 3, {c.image_size}, {c.image_size})"]
        tower = ["CLIP turns patches into features",
                 f"{c.grid} x {c.grid} patches of {c.patch_size} pixels and CLS through "
                 f"{self.vision_tower.depth} of {c.num_hidden_layers} layers:",
                 f"features {tuple(image.features.shape)}, in raster order: row by row"]
        return square, tower

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


def write_json(path: Path, value: dict) -> None:
    """A JSON file that a person can read."""
    path.write_text(json.dumps(value, indent=2) + "\n")
