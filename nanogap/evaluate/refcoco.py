"""Annotations: RefCOCO, RefCOCO+ and RefCOCOg as they are published, and files of one's own.

In:  a file of annotations: JSON, whose keys tell its form, or a pickle of the refer API.
Out: an entry for each expression, and its true box.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from nanogap.checks.command import shown
from nanogap.checks.reading import read_documents, read_json, read_plain
from nanogap.errors import NanogapError
from nanogap.image import Box

Size = tuple[int, int]              # width and height, pixels


class Entry(NamedTuple):
    """One expression as it is annotated; of what is Any, any may stand in a file."""

    where: str                         # its place in the file
    id: str
    image: str                         # file name, with or without folders
    expression: Any                    # a text
    box: Any                           # four numbers
    size: Any                          # of the image; None where the picture must say it
    corners: bool                      # whether the box is x1, y1, x2, y2; else x, y, width, height
    group: str = ""                    # MiniGPT-v2's img_id


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


# ----- the pickles of the refer API ---------------------------------------------------------------


def read_refs(path: Path, split: str | None) -> tuple[str, list[Entry]]:
    """How many expressions each split has, and those of one; boxes come from instances.json.

    source: lichengunc/refer 2fe1dfe, refer.py: getRefBox, showRef
    """
    refs = read_plain(path)
    try:
        counts = Counter(ref["split"] for ref in refs for _ in ref["sentences"])
        told = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
        if split not in counts:
            asked = f"has no split {split!r}" if split else "has splits"
            raise NanogapError(f"{path} {asked}; choose one with --split: {told}")
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
    if len({entry.id for entry in entries}) < len(entries):
        raise NanogapError(f"{path} holds a sent_id twice, so one of its answers would be lost; "
                           "take one of the sentences out")
    return told, entries


# ----- the forms of JSON --------------------------------------------------------------------------


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


def read_annotations(path: Path, split: str | None) -> tuple[str, list[Entry]]:
    """What a file of any form is, in a word, and its entries.

    split:  which one of a pickle; the other forms hold one each, and take None
    raises: NanogapError that names file and line, for what is broken in the file
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
                                 item[form.box], size, form.corners, name))
    if not entries:
        raise NanogapError(f"{path} holds no annotation; fetch it again")
    return form.name, entries
