"""Annotations: RefCOCO, RefCOCO+ and RefCOCOg as they are published, and files of one's own.

In:  a file of annotations, and the folder of their images (COCO's train2014).
Out: images, each with its expressions and their true boxes (x1, y1, x2, y2) in pixels.

Boxes are in pixels as they are stored: a picture with an EXIF orientation is not turned, for COCO's
annotations count like this.  One bad item of thousands does not end a run: a picture that is not
there or is broken, and an expression that is blank, are left out, and the report says so.
A form is told by what is in the file, never by its name: JSON and lines of JSON by their keys
(FORMS); what is neither is taken for a pickle of the refer API, `refs(unc).p`, which needs
`instances.json` beside it.  A file of one's own has lines of
{"image": "a.jpg", "expression": "the man", "box": [x1, y1, x2, y2]}, in pixels.
Every expression counts: RefCOCO val has 10834, about 3811 things.
"""

import errno
import hashlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from nanogap.checks.command import shown
from nanogap.checks.pickles import look_through
from nanogap.errors import ItemError, NanogapError
from nanogap.image import Box, open_image
from nanogap.prompt import check_expression

Size = tuple[int, int]   # width and height, pixels
LARGEST = 1 << 31        # bytes; COCO's instances.json has 2^29


@dataclass(frozen=True)
class Example:
    """One image with its expressions: (id, expression, true box in pixels)."""

    number: int                        # of the image in the data; it seeds what is random
    name: str                          # of the image: a file, or "scenes:val/3"
    size: Size                         # of the image
    image: Callable[[], Image.Image]   # opens or draws it
    questions: list[tuple[str, str, Box]]


@dataclass(frozen=True)
class Data:
    """What is evaluated on."""

    name: str                          # says what it is, in a report
    digest: str                        # changes with an image, or their order
    examples: list[Example]
    expressions: int                   # those that are left out included
    missing: list[str]                 # images that are not there
    left_out: dict[str, str]           # id -> why it cannot be asked, of expressions


@dataclass(frozen=True)
class Entry:
    """One expression as it is annotated."""

    id: str
    image: str                         # file name, with or without folders
    expression: str
    box: Box
    size: Size | None                  # of the image; None where the picture must say it
    where: str = field(repr=False, compare=False)   # its place in the file
    wrong: str = field(repr=False, compare=False, default="")   # why it cannot be asked


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
    Form("nanogap", "image", "expression", "box", sized=False),
)


def checked(where: str, id_: object, image: Any, expression: Any, box: Any, corners: bool,
            size: tuple[Any, Any] | None) -> Entry:
    """One expression whose parts are in order: what is wrong is named with its place in the file.

    size: None where the annotation does not say it; then its picture is asked
    """
    sides = size or (1, 1)
    if not (isinstance(image, str) and isinstance(expression, str)
            and all(is_whole(side) and side > 0 for side in sides)):
        raise NanogapError(f"{where}: the image and the expression must be text, "
                           "and its width and height whole numbers")
    wrong = ""
    try:
        check_expression(expression)
    except ItemError as error:
        wrong = f"{where}: {error}"
    if not is_box(box):
        raise NanogapError(f"{where}: the box {shown(box)} is not four numbers")
    x1, y1, x2, y2 = box
    if not corners:
        x2 += x1
        y2 += y1
    if not (x1 < x2 and y1 < y2):
        raise NanogapError(f"{where}: the box {shown(box)} has no area")
    entry = Entry(str(id_), image, expression, (x1, y1, x2, y2), size, where, wrong)
    if entry.size:
        check_inside(entry, entry.size)
    return entry


def is_whole(value: object) -> bool:
    """Whether something from a file is a whole number that is no longer than any real one."""
    return type(value) is int and abs(value) < 1 << 53   # of 5,000 digits none can be printed


def is_box(box: object) -> bool:
    """Whether something from a file is four numbers, none of them infinite or NaN."""
    return (isinstance(box, list | tuple) and len(box) == 4
            and all(type(v) in (int, float) and abs(v) < 1e6 for v in box))


def check_inside(entry: Entry, size: Size) -> None:
    """Refuse a box that reaches out of an image of that size by more than a pixel."""
    x1, y1, x2, y2 = entry.box
    if min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:
        raise NanogapError(f"{entry.where}: the box {list(entry.box)} (x1, y1, x2, y2) reaches out "
                           f"of its image, {size[0]} x {size[1]} pixels; boxes are in pixels here, "
                           "not in percent or thousandths")


def check_pixels(path: Path, boxes: Sequence[Box]) -> None:
    """Refuse boxes that all lie in the first pixel of their images: they are shares of the sides.
    """
    if boxes and all(max(box) <= 1 for box in boxes):
        raise NanogapError(f"{path}: all corners lie between 0 and 1, so the boxes are normalised "
                           "and not in pixels; multiply them with width and height of the image")


# ----- JSON, and lines of JSON --------------------------------------------------------------------


def parse_json(where: str, text: bytes) -> Any:
    """One JSON document; a broken one is named with its place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the bytes may be no text, too
        line = getattr(error, "lineno", 1)
        place = where if line == 1 else f"{where}, line {line}"
        raise NanogapError(f"{place}: broken JSON ({getattr(error, 'msg', error)}); "
                           "fetch the file again") from None


def documents(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    """Each document with its place in the file: the entries of a JSON list, or the lines."""
    if data.lstrip().startswith(b"["):
        for number, item in enumerate(parse_json(str(path), data), 1):
            yield f"{path}, entry {number}", item
    else:
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                yield f"{path}, line {number}", parse_json(f"{path}, line {number}", line)


def form_of(where: str, keys: set[str]) -> Form:
    """The form that has these keys."""
    for form in FORMS:
        if {form.image, form.expression, form.box} <= keys:
            return form
    known = ", ".join(f"{f.name} ({f.image}, {f.expression}, {f.box})" for f in FORMS)
    raise NanogapError(f"{where} is an annotation of no form that is read here: {known}, "
                       "or the pickle refs(unc).p")


def read_annotations(path: Path, data: bytes) -> tuple[str, list[Entry]]:
    """The form's name, and the expressions of a JSON list or of lines of JSON."""
    form: Form | None = None
    entries: list[Entry] = []
    for where, item in documents(path, data):
        keys = set(item) if isinstance(item, dict) else set()
        form = form or form_of(where, keys)
        sized = form.sized or not keys.isdisjoint({"width", "height"})
        needed = {form.image, form.expression, form.box}
        if sized:
            needed |= {"width", "height"}
        if needed - keys:
            raise NanogapError(f"{where} lacks {', '.join(sorted(needed - keys))}, "
                               f"which the form of {form.name} has")
        image = item[form.image]
        if form.image == "img_id" and isinstance(image, str):
            image = image[:27] + ".jpg"            # COCO_train2014_000000580957_4: the fourth of it
        size = (item["width"], item["height"]) if sized else None
        entries.append(checked(where, len(entries) + 1, image, item[form.expression],
                               item[form.box], form.corners, size))
    if form is None:
        raise NanogapError(f"{path} holds no annotation; fetch it again")
    return form.name, entries


# ----- the pickles of the refer API ---------------------------------------------------------------


MOST_STEPS = 50_000_000                # RefCOCO's own pickles have some millions


class Unpickler(pickle.Unpickler):
    """Reads lists, dicts, text and numbers: a pickle that names a function could run anything."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise NanogapError(f"it names {module}.{name}, and annotations need no code")


def unpickle(path: Path, data: bytes) -> list[dict]:
    """The references of refs(unc).p: dicts of text, numbers and lists, nothing else."""
    needed = {"ann_id", "image_id", "split", "sentences"}
    try:
        look_through(BytesIO(data), most=MOST_STEPS)
        refs = Unpickler(BytesIO(data), encoding="latin1").load()
    except NanogapError as error:
        raise NanogapError(f"{path} is refused: {error}; "
                           "give refs(unc).p of the refer API") from None
    except Exception:                              # a broken pickle raises almost anything
        raise NanogapError(f"{path} is neither JSON nor a whole pickle; "
                           "give annotations of RefCOCO, such as refs(unc).p") from None
    if not (isinstance(refs, list) and refs and all(
            isinstance(ref, dict) and needed <= set(ref) and isinstance(ref["split"], str)
            and isinstance(ref["sentences"], list) for ref in refs)):
        raise NanogapError(f"{path} is a pickle, but not a list of {', '.join(sorted(needed))}; "
                           "give refs(unc).p of the refer API")
    return refs


def read_refs(path: Path, data: bytes, split: str | None) -> tuple[str, list[Entry]]:
    """How many expressions each split has, and those of one; boxes come from instances.json."""
    refs = unpickle(path, data)
    counts: Counter[str] = Counter()
    for ref in refs:
        counts[ref["split"]] += len(ref["sentences"])
    told = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
    if split not in counts:
        what = f"no split {split!r}" if split else "several splits"
        raise NanogapError(f"{path} has {what}; choose one with --split: {told}")
    boxes, sizes = read_instances(path.with_name("instances.json"))
    try:
        return told, [
            checked(f"{path}, sentence {whole(said['sent_id'])}", said["sent_id"],
                    f"COCO_train2014_{whole(ref['image_id']):012}.jpg", said["sent"],
                    boxes[whole(ref["ann_id"])], False, sizes[ref["image_id"]])
            for ref in refs if ref["split"] == split for said in ref["sentences"]]
    except (KeyError, TypeError) as error:
        raise NanogapError(f"{path} and instances.json do not fit together ({error!r:.80}); "
                           "take both from one folder of the refer API") from None


def whole(value: Any) -> int:
    """A number that names something; TypeError for anything else."""
    if not is_whole(value):
        raise TypeError(f"{shown(value)} is no number of an annotation")
    return value


def read_instances(path: Path) -> tuple[dict, dict]:
    """COCO's boxes (x, y, width, height) by annotation, and (width, height) by image."""
    try:
        coco = parse_json(str(path), read_regular(path))
        return ({item["id"]: item["bbox"] for item in coco["annotations"]},
                {item["id"]: (item["width"], item["height"]) for item in coco["images"]})
    except OSError as error:
        raise NanogapError(f"{path} cannot be read ({error.strerror}), and the pickle holds "
                           "no boxes; put instances.json of the refer API there") from None
    except (KeyError, TypeError) as error:
        raise NanogapError(f"{path} does not have COCO's annotations and images ({error!r:.80}); "
                           "fetch it again") from None


# ----- a file and a folder ------------------------------------------------------------------------


def open_sized(path: Path, size: Size) -> Image.Image:
    """An image as it is stored, as large as its annotation says: the box is in its pixels."""
    image = open_image(path, upright=False)
    if image.size != size:
        raise ItemError(f"{path} is {image.width} x {image.height} pixels and was annotated at "
                        f"{size[0]} x {size[1]}; fetch COCO's own, or take this one away")
    return image


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file of any size that annotations have.

    raises: OSError, also for a pipe, which would be waited for, and a device, which has no end
    """
    size = path.stat().st_size
    if not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file")
    if size > LARGEST:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than any annotations")
    return path.read_bytes()


def read_file(flag: str, path: Path, otherwise: str) -> bytes:
    """The bytes of a file, without a byte order mark."""
    try:
        return read_regular(path).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise NanogapError(f"{flag} {path} cannot be read ({error.strerror}); "
                           f"{otherwise}") from None


def find_image(folder: Path, name: str) -> Path | None:
    """The file of an image, with the folders in its name or without them, and in the folder only.
    """
    path = Path(name)
    outside = path.is_absolute() or ".." in path.parts
    for file in ([] if outside else [folder / path]) + [folder / path.name]:
        if os.path.isfile(file):
            return file
    return None


def size_of(group: list[Entry], file: Path | None) -> Size | None:
    """The size of an image as its annotations say, else as the picture says; boxes lie in it."""
    size = next((entry.size for entry in group if entry.size), None)
    if size is None and file is not None:
        size = open_image(file, upright=False).size
    if size is not None:
        for entry in group:
            check_inside(entry, size)
    return size


def read_data(path: Path, images: Path | None, split: str | None = None,
              pictures: bool = True) -> Data:
    """Read annotations and find their images: in the folder `images`, or beside the file.

    split:    which one of a pickle; the other forms hold one each, and take None
    pictures: whether they will be opened; if not, one that is not there is not missed where its
              size is known
    raises:   NanogapError that names file and line, for what is broken in the file
    """
    data = read_file("--data", path, "give scenes:val or annotations of RefCOCO")
    json_like = data.lstrip()[:1] in (b"[", b"{")
    if json_like and split:
        raise NanogapError(f"{path} holds one split only; leave --split out")
    told, entries = read_annotations(path, data) if json_like else read_refs(path, data, split)
    check_ids(entries)
    check_pixels(path, [entry.box for entry in entries])
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.image, []).append(entry)
    folder = images or path.parent
    examples, missing = [], []
    left_out = {entry.id: entry.wrong for entry in entries if entry.wrong}
    for number, (name, group) in enumerate(groups.items()):
        questions = [(entry.id, entry.expression, entry.box) for entry in group if not entry.wrong]
        if not questions:
            continue
        file = find_image(folder, name)
        try:
            size = size_of(group, file)
        except ItemError as error:
            left_out |= {entry.id: str(error) for entry in group}
            continue
        if size is None or (pictures and file is None):
            missing.append(name)
        else:
            opened = partial(open_sized, file or folder / name, size)
            examples.append(Example(number, name, size, opened, questions))
    if missing and not examples:
        raise NanogapError(
            f"none of the {len(groups)} images is in {folder}, such as {missing[0]}; get COCO "
            "train2014 (images.cocodataset.org/zips/train2014.zip, 13 GB) and give its "
            "folder with --images")
    if not examples:
        why = next(iter(left_out.values()), "it has no expression")
        raise NanogapError(f"{path} holds nothing that can be asked: {why}")
    name = f"{path.name} {split}" if split else path.name
    digest = hashlib.sha256(repr(list(groups)).encode()).hexdigest()[:8]
    name = f"{name} ({told}): {len(entries)} expressions about {len(groups)} images"
    return Data(name, digest, examples, len(entries), missing, left_out)


def check_ids(entries: list[Entry]) -> None:
    """Refuse an expression that is there twice: only one of its answers would count."""
    seen: set[str] = set()
    for entry in entries:
        if entry.id in seen:
            raise NanogapError(f"{entry.where} is there twice; take one of them out")
        seen.add(entry.id)
