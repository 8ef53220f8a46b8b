"""Annotations: RefCOCO, RefCOCO+ and RefCOCOg as they are published, and files of one's own.

In:  a file of annotations, and the folder of their images (COCO's train2014).
Out: images, each with its expressions and their true boxes (x1, y1, x2, y2) in pixels.

A form is told by what is in the file, never by its name: JSON and lines of JSON by their keys
(FORMS); what is neither is taken for a pickle of the refer API, `refs(unc).p`, which needs
`instances.json` beside it.  A file of one's own has lines of
{"image": "a.jpg", "expression": "the man", "box": [x1, y1, x2, y2]}, in pixels.
Every expression counts: RefCOCO val of UNC has 10834, about 3811 things.  The `val` of
lmms-lab/RefCOCO is another: 8811 things and 23962 expressions, UNC's and Google's in one.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanogap.checks.reading import read_bytes, read_documents
from nanogap.errors import ItemError, NanogapError
from nanogap.evaluate.data import Data, Example, check_units, find_image, none_there, open_sized
from nanogap.evaluate.refer import LARGEST, Entry, check_inside, checked, read_refs
from nanogap.image import open_image

CROP = re.compile(r"(?<=_\d{12})_\d+(?=\.|$)")     # behind the name of a picture of COCO's


@dataclass(frozen=True)
class Form:
    """The keys under which a form keeps image, expression and box."""

    name: str
    image: str
    expression: str
    box: str
    corners: bool = True               # x1 y1 x2 y2; else x y width height
    sized: bool = True                 # with width and height of the image


FORMS = (
    Form("MiniGPT-v2", "img_id", "sents", "bbox", corners=False),
    Form("Shikra", "img_path", "expression", "bbox"),
    Form("Qwen-VL", "image", "sent", "bbox"),
    Form("VLM-R1", "image", "normal_caption", "solution"),
    Form("lmms-lab", "file_name", "answer", "bbox", corners=False, sized=False),
    Form("nanogap", "image", "expression", "box", sized=False),
)


# ----- JSON, and lines of JSON --------------------------------------------------------------------


def form_of(where: str, keys: set[str]) -> Form:
    """The form that has these keys."""
    for form in FORMS:
        if {form.image, form.expression, form.box} <= keys:
            return form
    known = ", ".join(f"{f.name} ({f.image}, {f.expression}, {f.box})" for f in FORMS)
    raise NanogapError(f"{where} is an annotation of no form that is read here: {known}, "
                       "or the pickle refs(unc).p")


def read_annotations(path: Path, data: bytes) -> tuple[str, list[Entry]]:
    """The form's name, and the expressions of JSON in lines or in a list."""
    form: Form | None = None
    entries: list[Entry] = []
    for where, item in read_documents(path, data):
        keys = set(item) if isinstance(item, dict) else set()
        form = form or form_of(where, keys)
        sides = {"width", "height"}
        sized = form.sized or not keys.isdisjoint(sides)
        lacking = ({form.image, form.expression, form.box} | (sides if sized else set())) - keys
        if lacking:
            raise NanogapError(f"{where} lacks {', '.join(sorted(lacking))}, "
                               f"which the form of {form.name} has")
        image, said, group = item[form.image], item[form.expression], ""
        if form.image == "img_id" and isinstance(image, str):
            group = image                # COCO_train2014_000000580957_4: the fourth of it
            known = re.match(r"COCO_\w+2014_\d{12}", group)
            image = (known[0] if known else re.sub(r"_\d+$", "", group)) + ".jpg"
        if form.image == "file_name" and isinstance(image, str):
            image = CROP.sub("", image)
        size = (item["width"], item["height"]) if sized else None
        several = form.expression == "answer" and isinstance(said, list)
        for expression in said if several else [said]:
            entries.append(checked(where, len(entries) + 1, image, expression, item[form.box],
                                   form.corners, size, group))
    if form is None:
        raise NanogapError(f"{path} holds no annotation; fetch it again")
    return form.name, entries


# ----- a file and a folder ------------------------------------------------------------------------


def read_file(flag: str, path: Path, otherwise: str) -> bytes:
    """The bytes of a regular file of any size that annotations have."""
    if not path.is_file():
        what = "it is no regular file" if path.exists() else "No such file or directory"
        raise NanogapError(f"{flag} {path} cannot be read ({what}); {otherwise}")
    data = read_bytes(path, LARGEST)
    if data.startswith(b"PAR1"):
        lines = path.with_suffix(".jsonl")
        raise NanogapError(
            f"{flag} {path} is a parquet file; two lines of Python make lines of JSON of it: "
            f"`import pandas` and `pandas.read_parquet({str(path)!r}).drop(columns='image', "
            f"errors='ignore').to_json({str(lines)!r}, orient='records', lines=True)`; then give "
            f"--data {lines}")
    return data


def read_data(path: Path, images: Path | None, split: str | None = None,
              pictures: bool = True) -> Data:
    """Read annotations and find their images: in the folder `images`, or beside the file.

    split:    which one of a pickle; the other forms hold one each, and take None
    pictures: whether they will be opened; if not, one that is not there is not missed where its
              size is known
    raises:   NanogapError that names file and line, for what is broken in the file
    """
    data = read_file("--data", path, "give scenes:val or annotations of RefCOCO")
    json_like = data.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")[:1] in (b"[", b"{")
    if json_like and split:
        raise NanogapError(f"{path} holds one split only; leave --split out")
    told, entries = read_annotations(path, data) if json_like else read_refs(path, split)
    groups: dict[str, list[Entry]] = {}
    same: dict[str, list[str]] = {}
    seen: set[str] = set()
    for entry in entries:
        if entry.id in seen:             # only one of its answers would count
            raise NanogapError(f"{entry.where} is there twice; take one of them out")
        seen.add(entry.id)
        groups.setdefault(entry.image, []).append(entry)
        if entry.group:
            same.setdefault(entry.group, []).append(entry.id)
    check_units(path, [(entry.box, entry.size) for entry in entries])
    examples, missing, left_out = find_all(groups, images or path.parent, pictures)
    if missing and not examples:
        raise none_there(images or path.parent, missing)
    if not examples:
        why = next(iter(left_out.values()), "it has no expression")
        raise NanogapError(f"{path} holds nothing that can be asked: {why}")
    name = f"{path.name} {split}" if split else path.name
    digest = hashlib.sha256(repr(list(groups)).encode(errors="replace")).hexdigest()[:8]
    name = f"{name} ({told}): {len(entries)} expressions about {len(groups)} images"
    return Data(name, digest, examples, len(entries), missing, left_out, same)


def find_all(groups: dict[str, list[Entry]], folder: Path,
             pictures: bool) -> tuple[list[Example], list[str], dict[str, str]]:
    """Images with what is asked of them, the names of those missing, and what is left out."""
    examples, missing = [], []
    left_out = {entry.id: entry.wrong for group in groups.values() for entry in group
                if entry.wrong}
    for number, (name, group) in enumerate(groups.items()):
        questions = [(entry.id, entry.expression, entry.box) for entry in group if not entry.wrong]
        if not questions:
            continue
        file = find_image(folder, name)
        size = next((entry.size for entry in group if entry.size), None)
        try:
            if file and size is None:
                size = open_image(file, upright=False).size
        except ItemError as error:
            left_out |= {entry.id: str(error) for entry in group}
            continue
        if size is None or (pictures and file is None):
            missing.append(name)
            continue
        for entry in group:
            check_inside(entry, size)
        opened = partial(open_sized, file or folder / name, size)
        examples.append(Example(number, name, size, opened, questions, file))
    return examples, missing, left_out
