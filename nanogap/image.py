"""Pixels: from a picture to the square that the model sees, and from its boxes back to the picture.

In:  any image of the usual kinds.  Out: pixel_values (1, 3, S, S), and boxes in pixels.
LLaVA pads a picture with CLIP's mean colour to a square, and its boxes are shares of that square.
differs: the image processor on the hub crops the sides off instead, and loses targets at the edge.
"""

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from nanogap.errors import ItemError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = (122, 116, 104)   # int(255 * CLIP_MEAN)
MAX_SIDE = 8192   # a longer image is shrunk first: padded to a square it would take up all memory
# kinds of files; Pillow reads more, but an EPS file is a program, which it lets Ghostscript run
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

Box = tuple[float, float, float, float]


def open_image(image: Image.Image | str | os.PathLike, upright: bool = True) -> Image.Image:
    """A picture, or the path of one, as a new one in RGB; `upright`: turned as EXIF says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # Pillow warns of odd and of large files it can read
            if isinstance(image, Image.Image):
                return to_rgb(image, upright)
            Image.init()
            formats = [kind for kind in FORMATS if kind in Image.OPEN]
            with Image.open(image, formats=formats) as file:
                return to_rgb(file, upright)
    except (ItemError, MemoryError):
        raise
    except Exception as error:   # decoders of broken files raise almost anything
        why = getattr(error, "strerror", None) or str(error)[:200] or type(error).__name__
        raise ItemError(f"{image!s:.200} cannot be read as an image ({why}); give the path of a "
                        "whole JPEG or PNG file, such as image.jpg") from None


def to_rgb(image: Image.Image, upright: bool) -> Image.Image:
    """Any Pillow image as a new one in RGB."""
    image.load()
    if upright:
        with suppress(Exception):             # broken EXIF turns nothing
            image = ImageOps.exif_transpose(image)
    if image.mode != "RGB" or image.has_transparency_data or min(image.size) == 0:
        image = flattened(image)
    image = image.convert("RGB")                                              # a copy, always
    image.info = {}
    return image


def flattened(image: Image.Image) -> Image.Image:
    """Of 16 bits the upper 8; transparent parts show the padding colour."""
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if image.mode in ("I", "F") or min(image.size) == 0:
        raise ItemError(f"the image has {image.width} x {image.height} pixels of mode "
                        f"{image.mode}; save it with 8 bits a channel")
    if not image.has_transparency_data:
        return image
    ground = Image.new("RGBA", image.size, (*PAD_COLOUR, 255))
    return Image.alpha_composite(ground, image.convert("RGBA"))


def to_pixel_values(square: Image.Image, mean: Sequence[float] = CLIP_MEAN,
                    std: Sequence[float] = CLIP_STD) -> Tensor:
    """A square of S x S pixels as a vision tower reads it: normalised, (1, 3, S, S)."""
    width, height = square.size
    levels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    pixels = levels.view(height, width, 3).permute(2, 0, 1).float() / 255     # (3, S, S)
    return ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


@dataclass(frozen=True)
class Pad:
    """The picture in the middle of a square of one colour: LLaVA's `image_aspect_ratio: pad`."""

    colour: tuple[int, int, int] = PAD_COLOUR

    def square(self, image: Image.Image) -> Image.Image:
        """The padded picture, in its own resolution."""
        square = Image.new("RGB", (max(image.size), max(image.size)), self.colour)
        square.paste(image, self.offset(*image.size))
        return square

    def fit(self, image: Image.Image, size: int) -> Image.Image:
        """The padded picture, size x size pixels."""
        if max(image.size) > MAX_SIDE:
            scale = 4 * size / max(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return self.square(image).resize((size, size), Image.Resampling.BICUBIC)

    def offset(self, width: int, height: int) -> tuple[int, int]:
        """Where the picture begins in the square, pixels."""
        side = max(width, height)
        return (side - width) // 2, (side - height) // 2

    def to_pixels(self, box: Sequence[float], width: int, height: int) -> Box:
        """A box (x1, y1, x2, y2) in shares of the square -> pixels of the picture, inside it."""
        side, (dx, dy) = max(width, height), self.offset(width, height)
        x1, x2 = (min(max(x * side - dx, 0.0), float(width)) for x in (box[0], box[2]))
        y1, y2 = (min(max(y * side - dy, 0.0), float(height)) for y in (box[1], box[3]))
        return x1, y1, x2, y2


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), areas continuous; 0 where empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0
