"""Annotations: RefCOCO, RefCOCO+ and RefCOCOg as they are published, and files of one's own.

In:  a file of annotations, and the folder of their images (COCO's train2014).  Its keys tell its
     form; what is no JSON is taken for a pickle of the refer API (refer.py).
Out: images, each with its expressions and their true boxes (x1, y1, x2, y2) in pixels.
"""

import hashlib
import os
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from nanogap.checks.reading import read_documents
from nanogap.errors import ItemError, NanogapError
from nanogap.evaluate.data import Data, Example, Size, check_units
from nanogap.evaluate.refer import Entry, check_inside, corners_of, read_refs
from nanogap.image import open_image
from nanogap.prompt import check_expression

COCO = re.compile(r"^COCO_\w+2014_")
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

    def picture(self, image: str) -> str:
        """The file of a picture, without the number of a crop, which two forms put behind it."""
        if self.image == "img_id":
            stem = CROP.sub("", image) if COCO.match(image) else re.sub(r"_\d+$", "", image)
            return f"{stem}.jpg"
        return CROP.sub("", image) if self.image == "file_name" else image


FORMS = (
    Form("MiniGPT-v2", "img_id", "sents", "bbox", corners=False),
    Form("Shikra", "img_path", "expression", "bbox"),
    Form("Qwen-VL", "image", "sent", "bbox"),
    Form("VLM-R1", "image", "normal_caption", "solution"),
    Form("lmms-lab", "file_name", "answer", "bbox", corners=False, sized=False),
    Form("nanogap", "image", "expression", "box", sized=False),
)


def read_annotations(path: Path, data: bytes) -> tuple[str, list[Entry]]:
    """The form's name, and the expressions of JSON in lines or in a list."""
    form: Form | None = None
    entries: list[Entry] = []
    for where, item in read_documents(path, data):
        keys = item.keys() if isinstance(item, dict) else set()
        form = form or form_of(where, keys)
        sized = form.sized or "width" in keys
        needed = {form.image, form.expression, form.box, *(["width", "height"] if sized else [])}
        if not needed <= keys:
            raise NanogapError(f"{where} lacks {', '.join(sorted(needed - keys))}, which the form "
                               f"of {form.name} has")
        image, said = str(item[form.image]), item[form.expression]
        size = (item["width"], item["height"]) if sized else None
        box = corners_of(where, item[form.box], form.corners, size)
        several = form.name == "lmms-lab" and isinstance(said, list)
        for expression in said if several else [said]:
            entries.append(Entry(where, str(len(entries) + 1), form.picture(image), expression,
                                 box, size, image if form.name == "MiniGPT-v2" else ""))
    if form is None:
        raise NanogapError(f"{path} holds no annotation; fetch it again")
    return form.name, entries


def form_of(where: str, keys: Set[str]) -> Form:
    """The form that has these keys."""
    for form in FORMS:
        if {form.image, form.expression, form.box} <= keys:
            return form
    known = ", ".join(f"{f.name} ({f.image}, {f.expression}, {f.box})" for f in FORMS)
    raise NanogapError(f"{where} is an annotation of no form that is read here: {known}, "
                       "or the pickle refs(unc).p")


# ----- a file and a folder ------------------------------------------------------------------------


def read_file(flag: str, path: Path, otherwise: str) -> bytes:
    """The bytes of a file of any size that annotations have."""
    if not path.is_file():
        why = "it is no file" if path.exists() else "No such file or directory"
        raise NanogapError(f"{flag} {path} cannot be read ({why}); {otherwise}")
    data = path.read_bytes()
    if data.startswith(b"PAR1"):
        raise NanogapError(f"{flag} {path} is a parquet file; write its rows, without the images, "
                           "as lines of JSON: pandas does it with to_json(orient='records', "
                           "lines=True)")
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
    for entry in entries:
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
    name = f"{name} ({told}): {len(entries)} expressions about {len(groups)} images"
    digest = hashlib.sha256(repr(list(groups)).encode(errors="replace")).hexdigest()[:8]
    return Data(name, digest, examples, len(entries), missing, left_out, same)


def find_all(groups: dict[str, list[Entry]], folder: Path,
             pictures: bool) -> tuple[list[Example], list[str], dict[str, str]]:
    """Images with what is asked of them, the names of those missing, and what is left out."""
    examples, missing = [], []
    left_out: dict[str, str] = {}
    for number, (name, group) in enumerate(groups.items()):
        for entry in group:
            try:
                check_expression(entry.expression)
            except ItemError as error:
                left_out[entry.id] = f"{entry.where}: {error}"
        questions = [(entry.id, entry.expression, entry.box) for entry in group
                     if entry.id not in left_out]
        if not questions:
            continue
        file, size = find_image(folder, name), group[0].size
        path = file or folder / name
        if file is None and (pictures or size is None):
            missing.append(name)
            continue
        try:
            size = size or open_image(path, upright=False).size
        except ItemError as error:
            left_out |= {entry.id: str(error) for entry in group}
            continue
        for entry in group:
            check_inside(entry, size)
        opened = partial(open_sized, path, size)
        examples.append(Example(number, name, size, opened, questions, file))
    return examples, missing, left_out


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
    files = [folder / path.name, folder / COCO.sub("", path.name)]
    if not path.is_absolute() and ".." not in path.parts:
        files.insert(0, folder / path)
    return next(filter(os.path.isfile, files), None)


def none_there(folder: Path, missing: Sequence[str]) -> NanogapError:
    """What is said where no picture is found."""
    name = missing[0]
    whose = "COCO's train2014 (images.cocodataset.org/zips/train2014.zip, 13 GB)" \
        if COCO.match(Path(name).name) else "these"
    return NanogapError(f"none of the {len(missing)} images is in {folder}, such as {name:.200}; "
                        f"give the folder of {whose} with --images")
