"""LLaVA-1.6: the whole picture and tiles of it in a higher resolution, each seen by CLIP alone.

In:  a picture.
Out: the visual tokens of its base view, row by row, and then those of its tiles, as one grid.

    base view     grid x grid patches of the whole picture, stretched to a square
    tiles         R rows of C patches that show more than padding, each closed by a newline token

so N = grid^2 + R (C + 1) depends on the picture: 640 x 480 pixels are 576 + 36 * 49 = 2340 tokens.
The decoder may be a Mistral, whose template is another; all else is as in LLaVA-1.5.
Source: llava-hf's repositories on the hub, as transformers 5.23 reads them.  open: with which of
LLaVA's two system sentences its Vicunas were trained; here it is that of its demo and converter.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from nanogap.errors import NanogapError
from nanogap.image import to_pixel_values
from nanogap.llava import VICUNA, EncodedImage, LlavaConfig
from nanogap.methods.in_decoder import settings_of
from nanogap.models.base import VLM, Padded, Stretch, cells
from nanogap.prompt import Template
from nanogap.prune import STRATEGIES, Kept, needs_of

SYSTEM = ("A chat between a curious human and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the human's questions.")
TEMPLATES = {   # by `model_type` in text_config
    "llama": replace(VICUNA, before=f"{SYSTEM} USER: "),
    "mistral": Template(before="[INST] ", after="\n{} [/INST]", where_is=VICUNA.where_is),
}
# what they leave out where it is not LLaMA's: a Mistral is a LLaMA with other numbers
MISTRAL = {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8}
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))   # (rows, columns) of tiles, as published
Size = tuple[int, int]


@dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    image_grid_pinpoints: tuple[Size, ...] = ()   # (height, width) of canvases; (): as published
    decoder: str = "llama"                        # or "mistral", which has a template of its own


@dataclass(frozen=True, kw_only=True)
class Tiles(Padded):
    """The whole picture stretched to a square, and tiles of it in a higher resolution.

    The tiles are cut out of a canvas, on which the picture is as large as it can be, in the middle,
    with black around it.  source: anyres and spatial_unpad, as the hub's processor has them.
    open: the frame of boxes is stated nowhere; here it is the padded square, as in 1.5
    pinpoints: (height, width) of each canvas that may be chosen, whole tiles, pixels
    size:      pixels along a side of a tile, which are `grid` patches
    """
    pinpoints: tuple[Size, ...]
    size: int = 336
    grid: int = 24

    def canvas(self, width: int, height: int) -> Size:
        """(height, width) of the first canvas that shows most of a picture, and wastes least."""
        def merit(canvas: Size) -> tuple[int, int]:
            H, W = canvas
            scale = min(W / width, H / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - H * W
        return max(self.pinpoints, key=merit)

    def placed(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Where the picture lies on its canvas: left, top, width, height, pixels."""
        H, W = self.canvas(width, height)
        scale = min(W / width, H / height)
        across, down = min(math.ceil(width * scale), W), min(math.ceil(height * scale), H)
        return (W - across) // 2, (H - down) // 2, across, down

    def views(self, image: Image.Image) -> list[Image.Image]:
        """The base view, and the tiles row by row."""
        H, W = self.canvas(*image.size)
        left, top, width, height = self.placed(*image.size)
        canvas = Image.new("RGB", (W, H))                                     # black
        canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        tiles = [canvas.crop((x, y, x + self.size, y + self.size))
                 for y in range(0, H, self.size) for x in range(0, W, self.size)]
        return [Stretch().fit(image, self.size), *tiles]

    def number(self, width: int, height: int) -> tuple[Tensor, int, int]:
        """Which visual token each patch of a picture's canvas is; and R rows of C of them stay.

        -1 where rows or columns show only black.  source: transformers 5.23: by the proportions
        """
        H, W = self.canvas(width, height)
        rows, columns = H // self.size * self.grid, W // self.size * self.grid
        canvas = torch.full((rows, columns), -1)
        if width / height > columns / rows:
            cut = (rows - int(round(height * (columns / width), 7))) // 2
            shown = canvas[cut:rows - cut]
        else:
            cut = (columns - int(round(width * (rows / height), 7))) // 2
            shown = canvas[:, cut:columns - cut]
        R, C = shown.shape
        tokens = self.grid ** 2 + torch.arange(R * (C + 1)).view(R, C + 1)
        shown[:] = tokens[:, :C]                                              # newlines come last
        return canvas, R, C


@dataclass(kw_only=True)
class EncodedTiles(EncodedImage):
    """A picture as base view and tiles; `rows` and `columns` are those of the tiles' grid."""
    parts: list[EncodedImage]   # the base view, and what is left of each tile, as seen alone
    views: list[Tensor]         # of each (rows, columns): which visual token a patch of it is
    row_end: Tensor             # (N,) the newline that closes each token's row, -1 in the base view

    @property
    def n_patches(self) -> int:
        """How many visual tokens a strategy can choose from: not the newlines."""
        return self.n_visual - self.rows


def shared_out(budget: int, sizes: Sequence[int], equally: bool = False) -> list[int]:
    """Whole shares of a budget: in proportion to sizes, the largest fractions rounded up.

    equally: the same for each, as in published codes.  differs: they count padding too; here a part
             that has fewer patches leaves the rest to the others
    """
    due = [budget / len(sizes) if equally else budget * size / sum(sizes) for size in sizes]
    shares = [0] * len(sizes)
    for _ in range(budget):
        lacking = {i: due[i] - shares[i] for i, size in enumerate(sizes) if shares[i] < size}
        shares[max(lacking, key=lacking.__getitem__)] += 1
    return shares


def close_rows(ranked: Sequence[int], row_end: Sequence[int]) -> list[int]:
    """Put the newline that closes a row behind the last patch of it that was kept, (K,) by rank.

    differs: published codes leave newlines out; here they stay, as other tokens that are no patches
    """
    last = {row_end[token]: token for token in ranked}        # of each row
    closed = []
    for token in ranked:
        closed.append(token)
        if row_end[token] >= 0 and last[row_end[token]] == token:
            closed.append(row_end[token])
    return closed


class LlavaNext(VLM):
    Config = LlavaNextConfig
    download = ("`hf download llava-hf/llava-v1.6-mistral-7b-hf "
                "--local-dir weights/llava-v1.6-mistral-7b-hf` (15 GB)")
    template = TEMPLATES["llama"]
    pictures_alike = False
    fixed = VLM.fixed | {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "use_image_newline_parameter": True}
    rename = (*VLM.rename, (r"^model\.image_newline$", "image_newline"))      # since 4.52

    config: LlavaNextConfig

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__(config)
        size, grid = config.vision.image_size, config.vision.grid
        published = tuple((rows * size, columns * size) for rows, columns in GRIDS)
        self.frame = Tiles(pinpoints=config.image_grid_pinpoints or published, size=size, grid=grid)
        self.template = TEMPLATES[config.decoder]
        if config.decoder == "mistral":
            self.later = "[INST] {} [/INST]"
        newline = torch.empty(config.text.hidden_size)                        # (C',)
        self.image_newline = nn.Parameter(newline.normal_(std=len(newline) ** -0.5))

    def pixel_values(self, image: Image.Image) -> Tensor:
        """A picture -> (1 + tiles, 3, S, S), the base view first, on the model's device."""
        views = [to_pixel_values(view, self.config.image_mean, self.config.image_std)
                 for view in self.frame.views(image)]
        return torch.cat(views).to(self.device, self.dtype)

    def encode_pixels(self, pixel_values: Tensor, width: int, height: int) -> EncodedTiles:
        """The base view and what is left of each tile; newlines have zeros: see visual_tokens."""
        n, (canvas, R, C) = self.config.vision.grid, self.frame.number(width, height)
        base = torch.arange(n * n).view(1, n, n)
        tiles = canvas.unflatten(1, (-1, n)).unflatten(0, (-1, n))            # (down, n, across, n)
        squares = torch.cat([base, tiles.transpose(1, 2).flatten(0, 1)])      # (1 + tiles, n, n)
        if len(pixel_values) != len(squares):
            raise NanogapError(f"a picture of {width} x {height} pixels is {len(squares)} squares, "
                               f"and pixel_values holds {len(pixel_values)}: give its size")
        before, after = self.vision_tower(pixel_values)               # (1 + tiles, 1 + n * n, C)
        ends = n * n - 1 + torch.arange(1, R + 1) * (C + 1)                   # (R,) newlines
        row_end = torch.cat([base.new_full((n * n,), -1), ends.repeat_interleave(C + 1)])
        features = after.new_zeros(len(row_end), after.shape[-1])             # (N, C)
        parts, views = [], []
        for square, token in enumerate(squares):
            shown = token >= 0                                                # (n, n)
            patches = shown.flatten().nonzero()[:, 0].to(after.device)        # (k,)
            if len(patches) == 0:
                continue
            view = token[shown.any(1)][:, shown.any(0)]                       # (rows, columns)
            seen = after[square, 1:][patches]                                 # (k, C)
            features[view.flatten().to(after.device)] = seen
            views.append(view)
            rows, columns = view.shape
            parts.append(EncodedImage(width, height, seen, rows, columns,
                                      (before[square], after[square], patches)))
        return EncodedTiles(width, height, features, R, C, None, parts=parts, views=views,
                            row_end=row_end)

    def fields(self, image: EncodedImage, needs: Collection[str]) -> dict[str, Tensor]:
        """What the tower tells of a square and its own CLS, of the patches that are left of it."""
        before, after, patches = image.hidden                                 # (1 + n, C), (k,)
        with_cls = torch.cat([patches.new_zeros(1), 1 + patches])             # (1 + k,)
        stays = {"cls_attention": (slice(None), patches), "keys": patches,    # (H, k), (k, D)
                 "last_queries": with_cls, "last_keys": with_cls}             # (1 + k, C)
        fields = self.vision_tower.fields(before, after, needs)
        return {name: value[stays.get(name, ...)] for name, value in fields.items()}

    def select(self, image: EncodedImage, expression: str, prune: str, budget: int | None,
               seed: int) -> Kept:
        """Which patches a strategy keeps of each part, by its share of the budget; and newlines."""
        assert isinstance(image, EncodedTiles)
        sizes = [part.n_visual for part in image.parts]
        equally = settings_of(prune).get("crops") == "equal"
        shares = [None] * len(sizes) if budget is None else shared_out(budget, sizes, equally)
        generator = Generator().manual_seed(seed)             # one for all parts: they differ
        features = image.features.clone()                                     # (N, C)
        ranked, added = [], []
        for part, view, share in zip(image.parts, image.views, shares, strict=True):
            if share == 0:
                continue
            kept = STRATEGIES[prune](self.see(part, needs_of(prune), expression), share, generator)
            tokens = view.flatten()[kept.ranked.cpu()]                        # (k,)
            if kept.features is not None:
                features[tokens.to(features.device)] = kept.features
            if kept.added is not None:
                added.append(kept.added)
            ranked += tokens.tolist()
        keep = torch.tensor(close_rows(ranked, image.row_end.tolist()))       # (K,)
        return Kept(keep, features[keep.to(features.device)], torch.cat(added) if added else None)

    def visual_tokens(self, image: EncodedImage, kept: Kept, order: Tensor) -> Tensor:
        """Patches go through the projector, and a newline is the same vector everywhere."""
        assert isinstance(image, EncodedTiles)
        visual = super().visual_tokens(image, kept, order)                    # (K + M, C')
        indices = kept.ranked[order]                                          # (K,)
        newline = (image.row_end[indices] == indices).nonzero()[:, 0]
        visual[newline.to(visual.device)] = self.image_newline
        return visual

    def views(self, image: Any) -> list[Tensor]:
        return image.views

    def cells(self, image: EncodedImage) -> Tensor:
        width, height, n = image.width, image.height, self.config.vision.grid
        (H, W), (canvas, _, _) = self.frame.canvas(width, height), self.frame.number(width, height)
        left, top, across, down = self.frame.placed(width, height)
        rows, columns = canvas.shape
        x, y = width / across, height / down      # pixels of the picture to one of its canvas
        tiles = cells(rows, columns, (-left * x, -top * y, W * x, H * y))     # of all its patches
        at = torch.zeros(image.n_visual, 4)
        at[:n * n] = cells(n, n, (0, 0, width, height))
        at[canvas[canvas >= 0]] = tiles[canvas.flatten() >= 0]
        return at

    def walk(self, image: EncodedImage) -> tuple[list[str], list[str]]:
        _, tower = super().walk(image)
        S, (H, W) = self.frame.size, self.frame.canvas(image.width, image.height)
        square = [f"{image.width} x {image.height} pixels, stretched to a base view of {S} x {S};",
                  f"and as large as fits on a black canvas of {W} x {H}, cut into tiles:",
                  f"pixel_values ({1 + H // S * (W // S)}, 3, {S}, {S})"]
        tower += [f"the base view first; of the tiles {image.rows} x {image.columns} patches show "
                  "more than black, and a",
                  f"newline closes each row: N = {self.frame.grid ** 2} + {image.rows} x "
                  f"({image.columns} + 1) = {image.n_visual}"]
        return square, tower

    @classmethod
    def complete(cls, config: dict) -> dict:
        """config.json with a Mistral's defaults, where the decoder is one."""
        text = config.get("text_config") or {}
        decoder = text.get("model_type") or "llama"
        pinpoints = config.get("image_grid_pinpoints") or ()
        return config | {
            "decoder": decoder, "image_grid_pinpoints": tuple(map(tuple, pinpoints)),
            "text_config": (MISTRAL if decoder == "mistral" else {}) | text}

    def settings(self, dtype: str) -> dict[str, dict]:
        files = super().settings(dtype)
        pinpoints = {"image_grid_pinpoints": self.frame.pinpoints}
        files["config.json"] |= pinpoints
        files["config.json"]["text_config"]["model_type"] = self.config.decoder
        if self.config.decoder == "mistral":
            files["config.json"]["text_config"]["sliding_window"] = None
        files["preprocessor_config.json"] |= pinpoints | {
            "image_processor_type": "LlavaNextImageProcessor", "aspect_ratio_setting": "anyres",
            "do_pad": True}
        return files
