"""What is evaluated on: pictures, each with its expressions and their true boxes, in pixels.

In:  the name of a split of drawn scenes; or a folder of pictures and a file of annotations, of
     RefCOCO, RefCOCO+ and RefCOCOg as they are published or of one's own: JSON, whose keys tell
     its form, or a pickle of the refer API.
Out: `Data`, of which one bad item of thousands is left out and counted.
Pictures are as they are stored: COCO's boxes take no notice of an EXIF orientation.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from nanogap.checks.command import shown
from nanogap.checks.reading import read_documents, read_json, read_plain
from nanogap.errors import ItemError, NanogapError
from nanogap.image import Box, open_image
from nanogap.prompt import check_expression
from nanogap.train.scenes import scene

Size = tuple[int, int]              # width and height, pixels


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


# ----- annotations -------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One expression as it is annotated; of what is Any, any may stand in a file."""

    where: str                         # its place in the file
    id: str
    image: str                         # file name, with or without folders
    expression: Any                    # a text
    box: Any                           # four numbers
    size: Any                          # of the image; None where the picture must say it
    corners: bool                      # whether the box is x1, y1, x2, y2; else x, y, width, height


def are_numbers(values: object, count: int, least: float = -1e6) -> bool:
    """Whether something from a file is so many numbers, none of them infinite or NaN."""
    return (isinstance(values, list | tuple) and len(values) == count
            and all(type(value) in (int, float) and least <= value <= 1e6 for value in values))


def true_box(entry: Entry, size: Size) -> Box:
    """The box of an entry, x1, y1, x2, y2 in pixels of an image of that size; no other is taken."""
    box = entry.box
    if are_numbers(size, 2, least=1) and are_numbers(box, 4):
        x1, y1, x2, y2 = box
        if not entry.corners:
            x2, y2 = x1 + x2, y1 + y2
        inside = -1 <= x1 < x2 <= size[0] + 1 and -1 <= y1 < y2 <= size[1] + 1
        if inside and max(x2, y2) > 1:
            return x1, y1, x2, y2
    form = "x1, y1, x2, y2" if entry.corners else "x, y, width, height"
    raise NanogapError(f"{entry.where}: the box {shown(box)} is no {form} with an area inside its "
                       f"image, width and height {shown(size)}; give pixels, not shares, percent "
                       "or thousandths")


def read_refs(path: Path, split: str | None) -> tuple[str, list[Entry]]:
    """How many expressions each split has, and those of one; boxes come from instances.json.

    source: lichengunc/refer 2fe1dfe, refer.py: getRefBox, showRef
    """
    refs = read_plain(path)
    try:
        counts = Counter(ref["split"] for ref in refs for _ in ref["sentences"])
        told = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
        if split not in counts:
            raise NanogapError(f"{path} has splits; choose one with --split: {told}")
        coco = read_json(path.with_name("instances.json"))
        boxes = {item["id"]: item["bbox"] for item in coco["annotations"]}
        images = {item["id"]: item for item in coco["images"]}
        entries = []
        for ref in refs:
            for said in ref["sentences"] if ref["split"] == split else []:
                image = images[ref["image_id"]]
                entries.append(Entry(
                    f"{path}, sentence {said['sent_id']}", str(said["sent_id"]),
                    str(image["file_name"]), said["sent"], boxes[ref["ann_id"]],
                    (image["width"], image["height"]), corners=False))
    except (KeyError, TypeError) as error:
        raise NanogapError(f"{path} and instances.json beside it are not a pair of the refer API's "
                           f"({error!r:.80}); take both from one of its folders") from None
    return told, entries


class Form(NamedTuple):
    """The keys under which a form keeps image, expression and box."""

    name: str
    image: str
    expression: str
    box: str
    corners: bool = True               # x1 y1 x2 y2; else x y width height
    crop: str = ""                     # regex of a crop's number, which a picture's file has not
    ending: str = ""                   # of the file, which the name has not


FORMS = (
    Form("MiniGPT-v2", "img_id", "sents", "bbox", corners=False, crop=r"_\d{1,11}$", ending=".jpg"),
    Form("Shikra", "img_path", "expression", "bbox"),
    Form("Qwen-VL", "image", "sent", "bbox"),
    Form("VLM-R1", "image", "normal_caption", "solution"),
    Form("lmms-lab", "file_name", "answer", "bbox", corners=False, crop=r"(?<=_\d{12})_\d+(?=\.)"),
    Form("nanogap", "image", "expression", "box"),
)


def form_of(where: str, item: object) -> Form:
    """The form of an annotation, by its keys."""
    for form in FORMS:
        if isinstance(item, dict) and {form.image, form.expression, form.box} <= item.keys():
            return form
    known = ", ".join(f"{f.name} ({f.image}, {f.expression}, {f.box})" for f in FORMS)
    raise NanogapError(f"{where} is an annotation of no form that is read here: {known}, "
                       "or the pickle refs(unc).p")


def read_annotations(path: Path, split: str | None) -> tuple[str, list[Entry]]:
    """What a file of any form is, in a word, and its entries.

    split: which one of a pickle; the other forms hold one each, and take None
    """
    data = path.read_bytes()
    if data.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")[:1] not in (b"[", b"{"):
        return read_refs(path, split)
    if split:
        raise NanogapError(f"{path} holds one split only; leave --split out")
    entries: list[Entry] = []
    for where, item in read_documents(path, data):
        form = form_of(where, item)
        name, said = str(item[form.image]), item[form.expression]
        size = (item["width"], item.get("height")) if "width" in item else None
        for expression in said if isinstance(said, list) else [said]:       # lmms-lab has several
            entries.append(Entry(where, str(len(entries) + 1),
                                 re.sub(form.crop, "", name) + form.ending, expression,
                                 item[form.box], size, form.corners))
    if not entries:
        raise NanogapError(f"{path} holds no annotation; fetch it again")
    return form.name, entries


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
    questions = []
    for entry in entries:
        box = true_box(entry, size)
        try:
            check_expression(entry.expression)
            questions.append((entry.id, entry.expression, box))
        except ItemError as error:
            data.left_out[entry.id] = f"{entry.where}: {error}"
    if questions:
        opened = partial(open_sized, path, size)
        data.examples.append(Example(number, name, size, opened, questions, path))


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
