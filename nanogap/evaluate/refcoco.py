"""Annotations: RefCOCO, RefCOCO+ and RefCOCOg as they are published, and files of one's own.

In:  a file of annotations, and the folder of their images (COCO's train2014).  Its keys tell its
     form; what is no JSON is taken for a pickle of the refer API (refer.py).
Out: images, each with its expressions and their true boxes (x1, y1, x2, y2) in pixels.
Pictures are as they are stored: COCO's boxes take no notice of an EXIF orientation.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from nanogap.checks.command import shown
from nanogap.checks.reading import read_bytes, read_documents
from nanogap.errors import ItemError, NanogapError
from nanogap.evaluate.data import LARGEST, Data, Example, Size, are_numbers
from nanogap.evaluate.refer import Entry, read_refs
from nanogap.image import Box, open_image
from nanogap.prompt import check_expression


class Form(NamedTuple):
    """The keys under which a form keeps image, expression and box."""

    name: str
    image: str
    expression: str
    box: str
    corners: bool = True               # x1 y1 x2 y2; else x y width height
    crop: str = ""                     # regex of a crop's number, which a picture's file has not
    ending: str = ""                   # of the file, where a picture is named without one


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


def read_annotations(path: Path, data: bytes) -> tuple[str, list[Entry]]:
    """The form's name, and the expressions of JSON in lines or in a list."""
    entries: list[Entry] = []
    for where, item in read_documents(path, data):
        form = form_of(where, item)
        name, said = str(item[form.image]), item[form.expression]
        size = (item["width"], item.get("height")) if "width" in item else None
        for expression in said if isinstance(said, list) else [said]:       # lmms-lab has several
            entries.append(Entry(where, str(len(entries) + 1),
                                 re.sub(form.crop, "", name) + form.ending, expression,
                                 item[form.box], size, form.corners, name))
    if not entries:
        raise NanogapError(f"{path} holds no annotation; fetch it again")
    return form.name, entries


def read_data(path: Path, images: Path | None, split: str | None = None,
              pictures: bool = True) -> Data:
    """Read annotations and find their images: in the folder `images`, or beside the file.

    split:    which one of a pickle; the other forms hold one each, and take None
    pictures: whether they will be opened; if not, one that is not there is not missed where its
              size is known
    raises:   NanogapError that names file and line, for what is broken in the file
    """
    content = read_bytes(path, LARGEST)
    is_json = content.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")[:1] in (b"[", b"{")
    if is_json and split:
        raise NanogapError(f"{path} holds one split only; leave --split out")
    told, entries = (read_annotations(path, content) if is_json
                     else read_refs(path, content, split))
    of_image: dict[str, list[Entry]] = {}
    groups: dict[str, list[str]] = {}
    for entry in entries:
        of_image.setdefault(entry.image, []).append(entry)
        groups.setdefault(entry.group, []).append(entry.id)
    name = f"{path.name} {split}" if split else path.name
    name = f"{name} ({told}): {len(entries)} expressions about {len(of_image)} images"
    digest = hashlib.sha256(repr(list(of_image)).encode(errors="replace")).hexdigest()[:8]
    data = Data(name, digest, len(entries), groups=groups)
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
    file = find_image(folder, name)
    if file is None and (pictures or size is None):
        data.missing.append(name)
        return
    path = file or folder / name
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


def true_box(entry: Entry, size: Size) -> Box:
    """The box of an entry, x1, y1, x2, y2 in pixels of an image of that size; no other is taken."""
    box = entry.box
    if are_numbers(size, 2) and min(size) >= 1 and are_numbers(box, 4):
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


def open_sized(path: Path, size: Size) -> Image.Image:
    """An image as it is stored, as large as its annotation says: the box is in its pixels."""
    image = open_image(path, upright=False)
    if image.size != size:
        raise ItemError(f"{path} is {image.width} x {image.height} pixels and was annotated at "
                        f"{size[0]} x {size[1]}; give the annotated pictures (COCO's: "
                        "train2014) with --images")
    return image


def find_image(folder: Path, name: str) -> Path | None:
    """The file of an image, with the folders in its name or without them, and in the folder only.

    COCO's pictures of 2014 are there under the names of 2017 as well.
    """
    path = Path(name)
    files = [folder / path.name, folder / re.sub(r"^COCO_\w+2014_", "", path.name)]
    if not path.is_absolute() and ".." not in path.parts:
        files.insert(0, folder / path)
    return next(filter(os.path.isfile, files), None)
