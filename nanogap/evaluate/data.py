"""What is evaluated on: pictures, each with its expressions and their true boxes, in pixels.

In:  the name of a split of drawn scenes; or a file of annotations, and a folder of pictures.
Out: `Data`, of which one bad item of thousands is left out and counted.
Pictures are as they are stored: COCO's boxes take no notice of an EXIF orientation.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image

from nanogap.errors import ItemError, NanogapError
from nanogap.evaluate.refcoco import Entry, Size, read_annotations, true_box
from nanogap.image import Box, open_image
from nanogap.train.scenes import scene


@dataclass(frozen=True)
class Example:
    """One image with its expressions."""

    number: int                        # of the image in the data; it seeds what is random
    name: str                          # of the image: a file, or "scenes:val/3"
    size: Size                         # of the image
    image: Callable[[], Image.Image]   # opens or draws it
    questions: list[tuple[str, str, Box]]   # id, expression, true box in pixels


@dataclass(frozen=True)
class Data:
    """What is evaluated on."""

    name: str                          # says what it is, in a report
    expressions: int                   # those that are left out included
    examples: list[Example] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)            # images that are not there
    left_out: dict[str, str] = field(default_factory=dict)      # id -> why it cannot be asked


# ----- drawn scenes -------------------------------------------------------------------------------


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
    return Data(f"scenes:{split}", limit, first(examples, limit))


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


# ----- annotated pictures -------------------------------------------------------------------------


def read_data(path: Path, images: Path | None, split: str | None = None,
              pictures: bool = True) -> Data:
    """Read annotations and find their images: in the folder `images`, or beside the file.

    split:    as in read_annotations
    pictures: whether they will be opened; if not, the file is enough where it says their sizes
    """
    told, entries = read_annotations(path, split)
    of_image: dict[str, list[Entry]] = {}
    for entry in entries:
        of_image.setdefault(entry.image, []).append(entry)
    name = f"{path.name} {split}" if split else path.name
    name = f"{name} ({told}): {len(entries)} expressions about {len(of_image)} images"
    data = Data(name, len(entries))
    folder = images or path.parent
    for number, about in enumerate(of_image.values()):
        add_image(data, number, about, folder, pictures)
    if not data.examples:
        why = (f"none of the {len(data.missing)} images is in {folder}, such as "
               f"{data.missing[0]:.200}; give their folder with --images (COCO's train2014: "
               "images.cocodataset.org/zips/train2014.zip, 13 GB)"
               if data.missing else next(iter(data.left_out.values())))
        raise NanogapError(f"{path} holds nothing that can be asked: {why}")
    return data


def add_image(data: Data, number: int, entries: Sequence[Entry], folder: Path,
              pictures: bool) -> None:
    """Add an image and what is asked of it, or say that it is missing, or why it is left out."""
    name, size = entries[0].image, entries[0].size
    path = find_image(folder, name)
    if not os.path.isfile(path) and (pictures or size is None):
        data.missing.append(name)
        return
    try:
        size = size or open_image(path, upright=False).size
    except ItemError as error:
        data.left_out.update({entry.id: str(error) for entry in entries})
        return
    questions = [(entry.id, entry.expression, true_box(entry, size)) for entry in entries]
    data.examples.append(Example(number, name, size, partial(open_sized, path, size), questions))


def open_sized(path: Path, size: Size) -> Image.Image:
    """An image as it is stored, as large as its annotation says: the box is in its pixels."""
    image = open_image(path, upright=False)
    if image.size != size:
        raise ItemError(f"{path} is {image.width} x {image.height} pixels and was annotated at "
                        f"{size[0]} x {size[1]}; give the annotated pictures (COCO's: "
                        "train2014) with --images")
    return image


def find_image(folder: Path, name: str) -> Path:
    """Where an image is, with the folders in its name or without them.

    COCO's pictures of 2014 are there under the names of 2017 as well.
    """
    base = Path(name).name
    files = [folder / name, folder / base, folder / re.sub(r"^COCO_\w+2014_", "", base)]
    return next(filter(os.path.isfile, files), files[0])
