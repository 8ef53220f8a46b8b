"""What is evaluated on: pictures, each with its expressions and their true boxes, in pixels.

In:  the name of a split of drawn scenes; annotations are read in refcoco.py.
Out: `Data`, of which one bad item of thousands is left out and counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image

from nanogap.image import Box
from nanogap.train.scenes import scene

Size = tuple[int, int]              # width and height, pixels
LARGEST = 1 << 31                   # bytes of a file; COCO's instances.json has 2^29


@dataclass(frozen=True)
class Example:
    """One image with its expressions."""

    number: int                        # of the image in the data; it seeds what is random
    name: str                          # of the image: a file, or "scenes:val/3"
    size: Size                         # of the image
    image: Callable[[], Image.Image]   # opens or draws it
    questions: list[tuple[str, str, Box]]   # id, expression, true box in pixels
    file: Path | None = None           # where it is, if it is a file


@dataclass(frozen=True)
class Data:
    """What is evaluated on."""

    name: str                          # says what it is, in a report
    digest: str                        # changes with an image, or their order
    expressions: int                   # those that are left out included
    examples: list[Example] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)            # images that are not there
    left_out: dict[str, str] = field(default_factory=dict)      # id -> why it cannot be asked
    groups: dict[str, list[str]] = field(default_factory=dict)  # MiniGPT-v2's img_id -> its ids


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
    return Data(f"scenes:{split}", "", limit, first(examples, limit))


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


def are_numbers(values: object, count: int) -> bool:
    """Whether something from a file is so many numbers, none of them infinite or NaN."""
    return (isinstance(values, list | tuple) and len(values) == count
            and all(type(value) in (int, float) and abs(value) < 1e6 for value in values))
