"""LLaVA-1.6: the whole picture and tiles of it in a higher resolution, each seen by CLIP alone.

In:  a picture.  Out: the visual tokens of its base view, row by row, and then those of its tiles,
as one grid without what shows only padding; behind each row of the grid stands a newline token.

    base view     grid x grid patches of the whole picture, stretched to a square
    tiles         R rows of C patches, and a newline: R (C + 1) tokens

so N = grid^2 + R (C + 1) depends on the picture: 640 x 480 pixels are 576 + 36 * 49 = 2340 tokens.
All else is as in LLaVA-1.5, but that the decoder may be a Mistral, whose template is another.

Source: LLaVA-1.6, in the layouts of llava-hf's repositories on the hub, as transformers 5.23 reads
them.  open: with which of LLaVA's two system sentences its Vicunas were trained is not published;
here it is the one that its demo and the hub's converter use.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from nanogap.checks.command import NanogapError
from nanogap.checks.config import read_json, section
from nanogap.checks.settings import MISTRAL, PIXELS, VICUNAS, Chat, read_processor
from nanogap.ground import EncodedImage
from nanogap.image import Size, Tiles, to_pixel_values
from nanogap.models.llava import REQUIRED, VICUNA, Llava, LlavaConfig
from nanogap.models.llava import SYSTEM as OF_1_5
from nanogap.prompt import Template
from nanogap.prune import View, VisualTokens

DOWNLOAD = ("`hf download llava-hf/llava-v1.6-mistral-7b-hf "
            "--local-dir weights/llava-v1.6-mistral-7b-hf` (15 GB)")
SYSTEM = ("A chat between a curious human and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the human's questions.")
TEMPLATES = {   # by `model_type` in text_config
    "llama": replace(VICUNA, before=f"{SYSTEM} USER: "),
    "mistral": Template(before="[INST] ", after="\n{} [/INST]", where_is=VICUNA.where_is,
                        later="[INST] {} [/INST]"),
}
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))   # (rows, columns) of tiles, as published
MOST_TILES = 64                                     # far above any model
PROCESSORS = tuple(f"LlavaNextImageProcessor{kind}" for kind in ("", "Fast", "Pil"))


@dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    image_grid_pinpoints: tuple[Size, ...] = ()   # (height, width) of canvases; (): as published
    decoder: str = "llama"                        # or "mistral", which has a template of its own

    @property
    def pinpoints(self) -> tuple[Size, ...]:
        """(height, width) of each canvas that may be cut into tiles, pixels."""
        size = self.vision.image_size
        return self.image_grid_pinpoints or tuple((r * size, c * size) for r, c in GRIDS)


@dataclass(frozen=True)
class Part:
    """A rectangle of patches of one of the squares that the tower sees: what is left of it."""

    square: int               # 0 the base view, 1.. the tiles
    rows: int
    columns: int
    patches: Tensor           # (k,) raster indices of its patches in the square
    index: Tensor             # (k,) which visual token each of them is
    at: Tensor                # (k, 4) which part of the picture it shows, pixels


def parts(frame: Tiles, width: int, height: int, grid: int,
          size: int) -> tuple[list[Part], Tensor]:
    """Which visual token each patch of a picture is: the base view and the tiles, and `row_end`.

    grid:    patches along a side of a square of `size` pixels
    returns: the parts, and (N,) the newline that closes the row of each token, -1 in the base view
    """
    H, W = frame.canvas(width, height)
    down, across = H // size * grid, W // size * grid                         # patches
    rows, columns = frame.unpadded(width, height, down, across)
    canvas = torch.full((down, across), -1)                                   # -1: only padding
    R, C = canvas[rows, columns].shape
    n = grid ** 2                                                             # of the base view
    tokens = n + torch.arange(R * (C + 1)).view(R, C + 1)                     # newlines come last
    canvas[rows, columns] = tokens[:, :C]
    at = frame.canvas_cells(down, across, width, height).view(down, across, 4)
    base = torch.arange(n)
    found = [Part(0, grid, grid, base, base, frame.cells(grid, grid, width, height))]
    squares = [(y, x) for y in range(0, down, grid) for x in range(0, across, grid)]
    for square, (y, x) in enumerate(squares, 1):
        index, cells = canvas[y:y + grid, x:x + grid], at[y:y + grid, x:x + grid]
        stays = index >= 0                                                    # (grid, grid)
        if stays.any():
            found.append(Part(square, int(stays.any(1).sum()), int(stays.any(0).sum()),
                              stays.flatten().nonzero()[:, 0], index[stays], cells[stays]))
    closed = tokens[:, -1:].expand(R, C + 1).flatten()
    return found, torch.cat([torch.full((n,), -1), closed])


class LlavaNext(Llava):
    Config = LlavaNextConfig
    download = DOWNLOAD
    template = TEMPLATES["llama"]
    pictures_alike = False
    chats = {"llama": Chat("Vicuna", VICUNAS, (SYSTEM, OF_1_5)), "mistral": MISTRAL}
    required = REQUIRED | {"use_image_newline_parameter": (True,)}
    pixels = PIXELS | {"image_processor_type": PROCESSORS, "aspect_ratio_setting": ("anyres",)}
    fixed = Llava.fixed | {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "use_image_newline_parameter": True}
    rename = (*Llava.rename, (r"^model\.image_newline$", "image_newline"))    # (c), (d)

    config: LlavaNextConfig
    frame: Tiles = Tiles(tuple((rows * 336, columns * 336) for rows, columns in GRIDS))

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__(config)
        self.frame = Tiles(config.pinpoints)
        self.template = TEMPLATES[config.decoder]
        newline = torch.empty(config.text.hidden_size)                        # (C',)
        self.image_newline = nn.Parameter(newline.normal_(std=len(newline) ** -0.5))

    # ----- what it sees ---------------------------------------------------------------------------

    def pixel_values(self, image: Image.Image) -> Tensor:
        """A picture -> (1 + tiles, 3, S, S), the base view first, on the model's device."""
        c = self.config
        views = [to_pixel_values(view, c.image_mean, c.image_std)
                 for view in self.frame.views(image, c.vision.image_size)]
        return torch.cat(views).to(self.device, self.dtype)

    def encode_pixels(self, pixel_values: Tensor, width: int, height: int) -> EncodedImage:
        """The base view and what is left of each tile are views; newlines are in none of them."""
        size, grid = self.config.vision.image_size, self.config.vision.grid
        H, W = self.frame.canvas(width, height)
        if len(pixel_values) != 1 + H // size * (W // size):
            raise NanogapError(f"a picture of {width} x {height} pixels has a base view and tiles "
                               f"of {W} x {H} pixels, and there are {len(pixel_values)} views in "
                               "pixel_values: give the size of the picture that they show")
        before, after = self.vision_tower(pixel_values)                       # (views, 1 + n, C)
        found, row_end = parts(self.frame, width, height, grid, size)
        features = after.new_zeros(len(row_end), after.shape[-1])             # (N, C)
        at = torch.zeros(len(row_end), 4)                                     # newlines: nothing
        views, hidden = [], []
        for part in found:
            patches = part.patches.to(after.device)
            seen = after[part.square, 1:][patches]                            # (k, C)
            features[part.index.to(after.device)] = seen
            at[part.index] = part.at
            views.append(View(VisualTokens(seen, part.rows, part.columns), part.index))
            hidden.append((before[part.square], after[part.square], patches))
        return EncodedImage(width, height, features, views, at, hidden, row_end)

    def fields(self, image: EncodedImage, view: int, needs: Collection[str]) -> dict[str, Tensor]:
        """What strategies need to see: as the tower saw the square, of the patches that are left.

        CLS is the square's own, and what it gives to patches of padding is missing.
        """
        before, after, patches = image.hidden[view]                           # (1 + n, C), (k,)
        fields = self.vision_tower.fields(before, after, needs)
        with_cls = torch.cat([patches.new_zeros(1), 1 + patches])             # (1 + k,)
        for name, value in fields.items():
            if name == "cls_attention":
                fields[name] = value[:, patches]                              # (H, k)
            elif name == "keys":
                fields[name] = value[patches]                                 # (k, D)
            elif name in ("last_queries", "last_keys"):
                fields[name] = value[with_cls]                                # (1 + k, C)
        return fields

    def fed(self, features: Tensor, keep: Tensor, image: EncodedImage) -> Tensor:
        """Patches go through the projector, and a newline is the same vector everywhere."""
        visual = self.project(features)                                       # (K + M, C')
        if image.row_end is not None:
            newline = (image.row_end.to(keep.device)[keep] == keep).nonzero()[:, 0]
            visual[newline] = self.image_newline
        return visual

    def walk(self, image: EncodedImage) -> tuple[list[str], list[str]]:
        """What becomes of a picture, for --explain."""
        c, size = self.config.vision, (image.width, image.height)
        H, W = self.frame.canvas(*size)
        _, _, width, height = self.frame.placed(*size)
        down, across = H // c.image_size, W // c.image_size
        newlines = len(image.newlines)
        n, N, squares = c.grid ** 2, image.n_visual, 1 + down * across
        columns = (N - n) // newlines - 1 if newlines else 0
        square = [f"{image.width} x {image.height} pixels, stretched to a base view of "
                  f"{c.image_size} x {c.image_size};",
                  f"and {width} x {height} in the middle of a black canvas of {W} x {H},",
                  f"cut into {down} rows of {across} tiles: "
                  f"pixel_values ({squares}, 3, {c.image_size}, {c.image_size})"]
        tower = ["CLIP turns patches into features, and sees every square alone",
                 f"{c.grid} x {c.grid} patches of {c.patch_size} pixels and CLS through "
                 f"{self.vision_tower.depth} of {c.num_hidden_layers} layers;",
                 f"of {down * c.grid} x {across * c.grid} patches of the tiles "
                 f"{newlines} x {columns} stay, the others show only black,",
                 f"and a newline closes each row: N = {n} + {newlines} x ({columns} + 1) = {N},",
                 f"features {tuple(image.features.shape)}, the base view first, row by row"]
        return square, tower

    # ----- its files ------------------------------------------------------------------------------

    @classmethod
    def read_config(cls, folder: Path) -> LlavaNextConfig:
        """The same files as LLaVA-1.5's, and in them the sizes of canvases and the decoder's type.

        raises: NanogapError where one is broken, or describes a model that is not LLaVA-1.6
        """
        read = super().read_config(folder)
        assert isinstance(read, LlavaNextConfig)
        config = read_json(folder / "config.json")
        size = read.vision.image_size
        published = [[336 * rows, 336 * columns] for rows, columns in GRIDS]
        pinpoints = read_pinpoints(config, "config.json", published, size)
        file, processor = read_processor(folder)
        theirs = read_pinpoints(processor, file, list(map(list, pinpoints)), size)
        if theirs != pinpoints:
            raise NanogapError(f"{file}: image_grid_pinpoints are {theirs!r:.80}, and config.json "
                               f"has {pinpoints!r:.80}; one of them is another checkpoint's")
        decoder = section(config, "text_config").get("model_type") or "llama"
        return replace(read, image_grid_pinpoints=pinpoints, decoder=decoder)

    def settings(self, dtype: str) -> dict[str, dict]:
        """What is written into each of these files."""
        files = super().settings(dtype)
        pinpoints = {"image_grid_pinpoints": self.config.pinpoints}
        files["config.json"] |= pinpoints
        files["config.json"]["text_config"]["model_type"] = self.config.decoder
        if self.config.decoder == "mistral":
            files["config.json"]["text_config"]["sliding_window"] = None
        files["preprocessor_config.json"] |= pinpoints | {
            "image_processor_type": PROCESSORS[0], "aspect_ratio_setting": "anyres",
            "do_pad": True}
        return files


def read_pinpoints(part: dict, file: str, default: list, size: int) -> tuple[Size, ...]:
    """(height, width) of canvases, whole squares of `size` pixels; the default where none are said.

    source: the hub's processor; LLaVA's own code reads its list as (width, height)
    """
    found = part.get("image_grid_pinpoints")
    found = default if found is None else found
    sides = [side for pair in found for side in pair] if is_pairs(found) else [0]
    if not all(0 < side <= size * MOST_TILES and side % size == 0 for side in sides):
        raise NanogapError(f"{file}: image_grid_pinpoints is {found!r:.80}, and it must be pairs "
                           f"[height, width] of canvases, multiples of {size} pixels")
    return tuple((height, width) for height, width in found)


def is_pairs(found: object) -> bool:
    """Whether JSON holds some pairs of whole numbers."""
    return isinstance(found, list) and found != [] and all(
        isinstance(pair, list) and [type(side) for side in pair] == [int, int] for pair in found)
