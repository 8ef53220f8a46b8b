"""Frames: how a picture becomes squares, and where boxes and patches of these lie in the picture.

In:  a picture.  Out: squares of S x S pixels; boxes in pixels, and where patches lie.

LLaVA-1.5 and Shikra pad, MiniGPT-v2 stretches, and LLaVA-1.6 stretches as well and adds tiles:
squares in a higher resolution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from nanogap.image import Box, Pad

Size = tuple[int, int]


@dataclass(frozen=True)
class Padded(Pad):
    """The lesson's frame, and the way from pixels to it."""

    def from_pixels(self, box: Sequence[float], width: int, height: int) -> Box:
        """The way there: a box in pixels of the image -> shares of the padded square."""
        side, (dx, dy) = max(width, height), self.offset(width, height)
        return ((box[0] + dx) / side, (box[1] + dy) / side,
                (box[2] + dx) / side, (box[3] + dy) / side)

    def cells(self, rows: int, columns: int, width: int, height: int) -> Tensor:
        """Which part of the picture each patch shows: (rows * columns, 4), pixels, not clipped."""
        side, (dx, dy) = max(width, height), self.offset(width, height)
        index = torch.arange(rows * columns)
        x, y = index % columns * side / columns - dx, index // columns * side / rows - dy
        return torch.stack([x, y, x + side / columns, y + side / rows], dim=1)


@dataclass(frozen=True)
class Stretch:
    """A frame: the picture is stretched to a square, whatever its shape; boxes are shares of it.

    source: MiniGPT-v2, blip_processors.py
    """

    def fit(self, image: Image.Image, size: int) -> Image.Image:
        """The stretched picture, size x size pixels."""
        return image.resize((size, size), Image.Resampling.BICUBIC)

    def to_pixels(self, box: Sequence[float], width: int, height: int) -> Box:
        """A box of shares (x1, y1, x2, y2) -> pixels of the picture, clipped to it."""
        x1, y1, x2, y2 = (min(max(share, 0.0), 1.0) for share in box)
        return x1 * width, y1 * height, x2 * width, y2 * height

    def from_pixels(self, box: Sequence[float], width: int, height: int) -> Box:
        """The way there: a box in pixels of the image -> shares of its sides."""
        return box[0] / width, box[1] / height, box[2] / width, box[3] / height

    def cells(self, rows: int, columns: int, width: float, height: float) -> Tensor:
        """Which part of the picture each token shows: (rows * columns, 4), pixels."""
        index = torch.arange(rows * columns)
        x, y = index % columns * width / columns, index // columns * height / rows
        return torch.stack([x, y, x + width / columns, y + height / rows], dim=1)


@dataclass(frozen=True, kw_only=True)
class Tiles(Padded):
    """A frame: the whole picture stretched to a square, and tiles of it in a higher resolution.

    The tiles are cut out of a canvas, on which the picture is as large as it can be, in the middle,
    with black around it.  Boxes are shares of the padded square all the same.  open: LLaVA-1.6's
    frame of boxes is stated nowhere; that of 1.5 is the likeliest, for nothing that is known of the
    training changed it.
    pinpoints: (height, width) of each canvas that may be chosen, whole tiles, pixels
    source:    LLaVA-1.6, `image_aspect_ratio: anyres` and `mm_patch_merge_type: spatial_unpad`, as
               the hub's processor has it: the original reads (width, height), which changes ties
    """

    pinpoints: tuple[Size, ...]

    def canvas(self, width: int, height: int) -> Size:
        """(height, width) of the canvas that shows most of a picture's pixels, and wastes least.

        The first of those that are equally good.
        """
        def merit(canvas: Size) -> tuple[int, int]:
            H, W = canvas
            scale = min(W / width, H / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - H * W
        return max(self.pinpoints, key=merit)

    def placed(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Where the picture lies on its canvas: left, top, width, height, pixels."""
        H, W = self.canvas(width, height)
        across, down = W / width, H / height
        if across < down:
            size = W, min(math.ceil(height * across), H)
        else:
            size = min(math.ceil(width * down), W), H
        return (W - size[0]) // 2, (H - size[1]) // 2, *size

    def fit(self, image: Image.Image, size: int) -> Image.Image:
        """The base view: the whole picture, stretched to size x size pixels."""
        return Stretch().fit(image, size)

    def views(self, image: Image.Image, size: int) -> list[Image.Image]:
        """The base view, and the tiles of size x size pixels, row by row."""
        H, W = self.canvas(*image.size)
        left, top, width, height = self.placed(*image.size)
        canvas = Image.new("RGB", (W, H))                                     # black
        canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        tiles = [canvas.crop((x, y, x + size, y + size))
                 for y in range(0, H, size) for x in range(0, W, size)]
        return [self.fit(image, size), *tiles]

    def unpadded(self, width: int, height: int, rows: int, columns: int) -> tuple[slice, slice]:
        """Which rows and columns of the canvas's patches stay: those that show only black do not.

        source: transformers 5.23; the proportions decide, and not where the picture was placed
        """
        if width / height > columns / rows:
            cut = (rows - int(round(height * (columns / width), 7))) // 2
            return slice(cut, rows - cut), slice(0, columns)
        cut = (columns - int(round(width * (rows / height), 7))) // 2
        return slice(0, rows), slice(cut, columns - cut)

    def cells(self, rows: int, columns: int, width: int, height: int) -> Tensor:
        """Which part of the picture each patch of the base view shows: (rows * columns, 4)."""
        return Stretch().cells(rows, columns, width, height)

    def canvas_cells(self, rows: int, columns: int, width: int, height: int) -> Tensor:
        """The same of the canvas's patches; some show black beside the picture: not clipped."""
        H, W = self.canvas(width, height)
        left, top, across, down = self.placed(width, height)
        x, y = width / across, height / down                  # pixels of the picture to one of it
        corner = torch.tensor([left * x, top * y, left * x, top * y])
        return Stretch().cells(rows, columns, W * x, H * y) - corner
