"""Pixels: from a picture to the square that the model sees, and from its boxes back to the picture.

In:  any image of the usual kinds.  Out: pixel_values (1, 3, S, S), and boxes in pixels.

A frame says how a picture becomes a square, and where a box in that square lies in the picture.
Each model has its own; LLaVA pads with CLIP's mean colour before resizing, MiniGPT-v2 stretches,
and LLaVA-1.6 stretches as well, and adds tiles: squares in a higher resolution.
differs: the image processor on the hub crops the sides off instead; the crop loses targets at the
edge, and boxes were trained in the padded square.
"""

import math
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from nanogap.checks.command import ItemError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = (122, 116, 104)   # int(255 * CLIP_MEAN)
MAX_SIDE = 8192   # a longer image is shrunk first: padded to a square it would take up all memory
# kinds of files; Pillow reads more, but an EPS file is a program, which it lets Ghostscript run
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

ORIENTATION = 0x0112           # the number of this tag in EXIF
Turn = Image.Transpose
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE,
         6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}

Box = tuple[float, float, float, float]
Size = tuple[int, int]


# ----- any picture --------------------------------------------------------------------------------


def ready(image: Image.Image | str | Path) -> Image.Image:
    """A picture, or the path of one, as upright RGB over the padding colour, without EXIF.

    raises: ItemError where it cannot be read
    """
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    if not isinstance(image, Image.Image):
        raise ItemError(f"an image cannot be of type {type(image).__name__}; give a Pillow image, "
                        "as Image.fromarray makes it, or the path of one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # as below
            return to_rgb(image)
    except (ItemError, MemoryError):
        raise
    except Exception as error:   # Pillow reads a file late, and cannot convert every mode
        raise ItemError(f"the image cannot be read ({reason(error)}); "
                        "give a whole one in RGB") from None


def open_image(path: str | os.PathLike, upright: bool = True) -> Image.Image:
    """Read an image file as RGB, the first frame of an animation, over the padding colour.

    upright: turned as EXIF says; else as it is stored: annotations are about stored pixels
    raises:  ItemError where there is no such file, or it is no whole picture of FORMATS
    """
    if not isinstance(path, str | os.PathLike):
        raise ItemError(f"an image has a path, and not one of type {type(path).__name__}; "
                        "give such as image.jpg")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ItemError(f"{path} is no regular file; give the path of a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # Pillow warns of odd and of large files it can read
            Image.init()
            formats = [name for name in FORMATS if name in Image.OPEN]   # Pillow 11.0 has no AVIF
            with Image.open(path, formats=formats) as image:
                if not upright:
                    forget_orientation(image)
                return to_rgb(image)
    except (ItemError, MemoryError):
        raise
    except FileNotFoundError:
        raise ItemError(f'there is no image "{path}"; give the path of a picture, '
                        "such as image.jpg") from None
    except IsADirectoryError:
        raise ItemError(f"{path} is a folder; give the path of one picture in it") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ItemError(f"{path} is too large to be read safely (more than {most} pixels); "
                        "give a smaller copy") from None
    except UnidentifiedImageError:
        raise ItemError(f"{path} is not an image of a kind that is read here "
                        f"({', '.join(FORMATS)}); give a JPEG or PNG file") from None
    except Exception as error:   # decoders of broken files raise almost anything
        raise ItemError(f"{path} cannot be read as an image ({reason(error)}); "
                        "give a whole JPEG or PNG file") from None


def reason(error: Exception) -> str:
    """What an exception says, in short."""
    return getattr(error, "strerror", None) or str(error)[:200] or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as a new one in upright RGB; transparent parts show the padding colour.

    This is the one place where a picture is turned: what comes out has no EXIF any more.
    """
    image.load()
    if min(image.size) == 0:
        raise ItemError("the image has no pixels; give another")
    turn = orientation(image)
    image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*PAD_COLOUR, 255))
        image = Image.alpha_composite(ground, image)
    image = image.convert("RGB")                                              # a copy, always
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}
    return image


def orientation(image: Image.Image) -> Image.Transpose | None:
    """How an image has to be turned by its EXIF; broken EXIF says what can be read of it."""
    with suppress(Exception):
        image.getexif()                       # raises once, and holds what it could read
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return None


def forget_orientation(image: Image.Image) -> None:
    """Let an image that is not read yet be one that needs no turning, also for Pillow's TIFF."""
    with suppress(Exception):
        image.getexif()
    image.getexif()[ORIENTATION] = 1


def eight_bits(image: Image.Image) -> Image.Image:
    """Levels of 16 bits, of 32 bits or in floats as levels of 8 bits; other images as they are.

    For 16 bits the mode says which level is white.  In the other two it is 1, 255 or 65535, the
    least that is not below the highest level of the image.
    raises: ItemError where that leaves levels below 0, or a picture that is all but black
    """
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if image.mode not in ("I", "F"):
        return image
    dtype = torch.int32 if image.mode == "I" else torch.float32
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=dtype)
    lowest, highest = levels.min().item(), levels.max().item()                # NaN if there is one
    scale = 255.0 if highest <= 1 else 1.0 if highest <= 255 else 1 / 256
    dark = 1 < highest and highest * scale < 16
    if not (0 <= lowest and highest <= 65535) or dark:
        raise ItemError(f"the image has levels from {lowest:g} to {highest:g}, and which of them "
                        "is white cannot be told; save it with 8 bits a channel")
    return image.point(lambda level: level * scale).convert("L")


def to_pixel_values(square: Image.Image, mean: Sequence[float] = CLIP_MEAN,
                    std: Sequence[float] = CLIP_STD) -> Tensor:
    """A square of S x S pixels as a vision tower reads it: normalised, (1, 3, S, S)."""
    width, height = square.size
    levels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    pixels = levels.view(height, width, 3).permute(2, 0, 1).float() / 255     # (3, S, S)
    return ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


# ----- frames -------------------------------------------------------------------------------------


class Frame(Protocol):
    """How a picture becomes a square, and a box in that square a box in the picture."""

    def fit(self, image: Image.Image, size: int) -> Image.Image: ...

    def to_pixels(self, box: Sequence[float], width: int, height: int) -> Box: ...

    def from_pixels(self, box: Sequence[float], width: int, height: int) -> Box: ...

    def cells(self, rows: int, columns: int, width: int, height: int) -> Tensor: ...


@dataclass(frozen=True)
class Pad:
    """A frame: the picture in the middle of a square of one colour; boxes are shares of it.

    source: LLaVA, `image_aspect_ratio: pad`; the offset is rounded down
    """

    colour: tuple[int, int, int] = PAD_COLOUR

    def square(self, image: Image.Image) -> Image.Image:
        """The padded picture, in its own resolution."""
        width, height = image.size
        side = max(width, height)
        square = Image.new("RGB", (side, side), self.colour)
        square.paste(image, self.offset(width, height))
        return square

    def fit(self, image: Image.Image, size: int) -> Image.Image:
        """The padded picture, size x size pixels."""
        if max(image.size) > MAX_SIDE:
            scale = 4 * size / max(image.size)
            small = [max(1, round(side * scale)) for side in image.size]      # a hair stays a pixel
            image = image.resize((small[0], small[1]), Image.Resampling.BICUBIC)
        return self.square(image).resize((size, size), Image.Resampling.BICUBIC)

    def offset(self, width: int, height: int) -> tuple[int, int]:
        """Where the picture begins in the square, pixels."""
        side = max(width, height)
        return (side - width) // 2, (side - height) // 2

    def to_pixels(self, box: Sequence[float], width: int, height: int) -> Box:
        """Map a box from the padded square that the model saw to pixels of the original image.

        box:     (x1, y1, x2, y2), each in [0, 1] of the square
        returns: (x1, y1, x2, y2) in pixels of the width x height image, clipped to it
        raises:  ValueError where x2 <= x1 or y2 <= y1
        source:  LLaVA pads to a square before resizing, so boxes live in that square
        """
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"not a box: {tuple(box)}")
        side, (dx, dy) = max(width, height), self.offset(width, height)
        x1, x2 = (min(max(x * side - dx, 0.0), float(width)) for x in (box[0], box[2]))
        y1, y2 = (min(max(y * side - dy, 0.0), float(height)) for y in (box[1], box[3]))
        return x1, y1, x2, y2

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

    def square(self, image: Image.Image) -> Image.Image:
        """The stretched picture, as wide and as high as its longer side."""
        return self.fit(image, max(image.size))

    def fit(self, image: Image.Image, size: int) -> Image.Image:
        """The stretched picture, size x size pixels."""
        return image.resize((size, size), Image.Resampling.BICUBIC)

    def to_pixels(self, box: Sequence[float], width: int, height: int) -> Box:
        """Map a box of shares of the picture to its pixels.

        box:     (x1, y1, x2, y2), each in [0, 1]
        returns: (x1, y1, x2, y2) in pixels of the width x height image, clipped to it
        raises:  ValueError where x2 <= x1 or y2 <= y1
        """
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"not a box: {tuple(box)}")
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


@dataclass(frozen=True)
class Tiles:
    """A frame: the whole picture stretched to a square, and tiles of it in a higher resolution.

    The tiles are cut out of a canvas, on which the picture is as large as it can be, in the middle,
    with black around it.
    pinpoints: (height, width) of each canvas that may be chosen, whole tiles, pixels
    boxes:     the frame in which boxes are said.  open: LLaVA-1.6's is stated nowhere; that of 1.5
               is the likeliest, for nothing that is known of the training changed the boxes
    source:    LLaVA-1.6, `image_aspect_ratio: anyres` and `mm_patch_merge_type: spatial_unpad`, as
               the hub's processor has it: the original reads (width, height), which changes ties
    """

    pinpoints: tuple[Size, ...]
    boxes: Pad = Pad()

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

    def to_pixels(self, box: Sequence[float], width: int, height: int) -> Box:
        """A box as the model says it -> pixels of the original image: see `Pad.to_pixels`."""
        return self.boxes.to_pixels(box, width, height)

    def from_pixels(self, box: Sequence[float], width: int, height: int) -> Box:
        """The way there."""
        return self.boxes.from_pixels(box, width, height)


# ----- boxes --------------------------------------------------------------------------------------


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), areas continuous; 0 where empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0
