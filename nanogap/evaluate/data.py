"""What is evaluated on: pictures, each with its expressions and their true boxes, in pixels.

In:  the name of a split of drawn scenes; or entries of annotations, and a folder of pictures.
Out: `Data`, of which one bad item of thousands is left out and counted.
Pictures are as they are stored: COCO's boxes take no notice of an EXIF orientation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image

from nanogap.errors import NanogapError
from nanogap.image import Box
from nanogap.train.scenes import scene

Size = tuple[int, int]              # width and height, pixels


@dataclass(frozen=True)
class Example:
    """One image with its expressions: (id, expression, true box in pixels)."""

    number: int                        # of the image in the data; it seeds what is random
    name: str                          # of the image: a file, or "scenes:val/3"
    size: Size                         # of the image
    image: Callable[[], Image.Image]   # opens or draws it
    questions: list[tuple[str, str, Box]]
    file: Path | None = None           # where it is, if it is a file


@dataclass(frozen=True)
class Data:
    """What is evaluated on."""

    name: str                          # says what it is, in a report
    digest: str                        # changes with an image, or their order
    examples: list[Example]
    expressions: int                   # those that are left out included
    missing: list[str]                 # images that are not there
    left_out: dict[str, str]           # id -> why it cannot be asked, of expressions
    groups: dict[str, list[str]] = field(default_factory=dict)   # MiniGPT-v2's img_id -> its ids


drawn = lru_cache(256)(scene)       # of thousands some are held, and the others are drawn again


def drawn_image(split: str, number: int) -> Image.Image:
    return drawn(split, number).image


def drawn_data(split: str, limit: int) -> Data:
    """The first expressions about drawn scenes; the split's name seeds them (see scenes.py)."""
    examples: list[Example] = []
    count = 0
    while count < limit:
        number = len(examples)
        seen = drawn(split, number)
        questions = [(f"{split}/{number}/{i}", expression, seen.things[thing].box)
                     for i, (expression, thing) in enumerate(seen.expressions)]
        examples.append(Example(number, f"scenes:{split}/{number}", seen.image.size,
                                partial(drawn_image, split, number), questions))
        count += len(questions)
    return Data(f"scenes:{split}", "", first(examples, limit), limit, [], {})


def first(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """As many of the images as hold the first `limit` expressions."""
    if limit is None:
        return list(examples)
    chosen: list[Example] = []
    left = limit
    for example in examples:
        if left > 0:
            chosen.append(replace(example, questions=example.questions[:left]))
            left -= len(example.questions)
    return chosen


def is_size(size: object) -> bool:
    """Whether something from a file is width and height in pixels."""
    return (isinstance(size, list | tuple) and len(size) == 2
            and all(isinstance(side, int) and side > 0 for side in size))


def is_box(box: object) -> bool:
    """Whether something from a file is four numbers, none of them infinite or NaN."""
    return (isinstance(box, list | tuple) and len(box) == 4
            and all(type(v) in (int, float) and abs(v) < 1e6 for v in box))


def is_outside(box: Sequence[float], size: Size) -> bool:
    """Whether a box reaches out of an image of that size by more than a pixel."""
    x1, y1, x2, y2 = box
    return min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1


def check_units(path: Path, boxes: Sequence[tuple[Sequence[float], Size | None]]) -> None:
    """Refuse boxes of a file, each with the size of its image, most of which are no pixels.

    The same is asked of annotations and of answers; a few odd ones among many decide nothing.
    """
    wrong = [box for box, size in boxes if max(box) <= 1 or size and is_outside(box, size)]
    if 2 * len(wrong) > len(boxes):
        raise NanogapError(f"{path}: {len(wrong)} of {len(boxes)} boxes are no pixels of their "
                           f"images, such as {list(wrong[0])}; give x1, y1, x2, y2 in pixels, and "
                           "not normalised, in percent or in thousandths")
