"""Frames: how a picture becomes a square, and where boxes and patches of it lie in the picture.

LLaVA-1.5 and Shikra pad, and MiniGPT-v2 stretches; LLaVA-1.6 has its frame in its own file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from nanogap.image import Box, Pad


def cells(rows: int, columns: int, area: Box) -> Tensor:
    """Where the cells of a grid over (left, top, width, height) lie: (rows * columns, 4)."""
    left, top, across, down = area
    index = torch.arange(rows * columns)
    x = index % columns * across / columns + left
    y = index // columns * down / rows + top
    return torch.stack([x, y, x + across / columns, y + down / rows], dim=1)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
