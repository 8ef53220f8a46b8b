"""Annotations of RefCOCO, RefCOCO+ and RefCOCOg, in the forms in which they are published.

In:  a file of annotations, and the folder of COCO's train2014 images.
Out: images, each with its expressions and their true boxes (x1, y1, x2, y2) in pixels.

A form is told by what is in the file, never by its name: JSON and lines of JSON by their keys
(FORMS); what is neither is taken for a pickle of the refer API, `refs(unc).p`, which needs
`instances.json` beside it.  Every expression counts: RefCOCO val has 10834, about 3811 things.
"""

import hashlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

from nanogap.cli import NanogapError
from nanogap.image import Box, open_image
from nanogap.prompt import where_is


@dataclass(frozen=True)
class Example:
    """One image with its expressions: (id, expression, true box in pixels)."""

    number: int                        # of the image in the data; it seeds what is random
    image: Callable[[], Image.Image]   # opens or draws it
    questions: list[tuple[str, str, Box]]


@dataclass(frozen=True)
class Data:
    """What is evaluated on."""

    name: str                          # says what it is, in a report
    digest: str                        # changes when an expression or a box does
    examples: list[Example]
    expressions: int                   # those without an image included
    missing: list[str]                 # images that are not there


@dataclass(frozen=True)
class Entry:
    """One expression as it is annotated."""

    id: str
    image: str                         # file name, with or without folders
    expression: str
    box: Box
    size: tuple[int, int]              # width and height of the image


@dataclass(frozen=True)
class Form:
    """The keys under which a published form keeps image, expression and box."""

    name: str
    image: str
    expression: str
    box: str
    corners: bool                      # x1 y1 x2 y2; else x y width height


FORMS = (
    Form("MiniGPT-v2", "img_id", "sents", "bbox", corners=False),
    Form("Shikra", "img_path", "expression", "bbox", corners=True),
    Form("Qwen-VL", "image", "sent", "bbox", corners=True),
    Form("VLM-R1", "image", "normal_caption", "solution", corners=True),
)


def entry(where: str, id_: object, image: object, expression: object, box: object, corners: bool,
          size: tuple[object, object]) -> Entry:
    """Check one expression: what is wrong is named with its place in the file."""
    if not (isinstance(image, str) and isinstance(expression, str)
            and all(type(side) is int and side > 0 for side in size)):
        raise NanogapError(f"{where}: the image and the expression must be text, "
                           "and its width and height whole numbers")
    try:
        where_is(expression)
    except NanogapError as error:
        raise NanogapError(f"{where}: {error}") from None
    if not (isinstance(box, (list, tuple)) and len(box) == 4
            and all(type(v) in (int, float) and abs(v) < 1e6 for v in box)):      # no NaN either
        raise NanogapError(f"{where}: the box {box!r:.80} is not four numbers")
    x1, y1, x2, y2 = box if corners else (box[0], box[1], box[0] + box[2], box[1] + box[3])
    if not (x1 < x2 and y1 < y2):
        raise NanogapError(f"{where}: the box {box!r:.80} has no area")
    if min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:
        raise NanogapError(f"{where}: the box {box!r:.80} reaches out of its image, "
                           f"{size[0]} x {size[1]} pixels")
    return Entry(str(id_), image, expression, (x1, y1, x2, y2), size)


# ----- JSON, and lines of JSON --------------------------------------------------------------------


def parse(where: str, text: bytes) -> object:
    """One JSON document; a broken one is named with its place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the bytes may be no text, too
        line = getattr(error, "lineno", 1)
        place = where if line == 1 else f"{where}, line {line}"
        raise NanogapError(f"{place}: broken JSON ({getattr(error, 'msg', error)}); "
                           "fetch the file again") from None


def documents(path: Path, data: bytes) -> Iterator[tuple[str, object]]:
    """Each annotation with its place in the file: the entries of a JSON list, or the lines."""
    if data.lstrip().startswith(b"["):
        for number, item in enumerate(parse(str(path), data), 1):
            yield f"{path}, entry {number}", item
    else:
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                yield f"{path}, line {number}", parse(f"{path}, line {number}", line)


def read_json(path: Path, data: bytes) -> tuple[str, list[Entry]]:
    """The form's name, and the expressions of a JSON list or of lines of JSON."""
    form, entries = None, []
    for where, item in documents(path, data):
        keys = set(item) if isinstance(item, dict) else set()
        form = form or next((f for f in FORMS if {f.image, f.expression, f.box} <= keys), None)
        if form is None:
            known = ", ".join(f"{f.name} ({f.image}, {f.expression}, {f.box})" for f in FORMS)
            raise NanogapError(f"{where} is an annotation of no form that is read here: {known}, "
                               "or the pickle refs(unc).p")
        lacking = {form.image, form.expression, form.box, "width", "height"} - keys
        if lacking:
            raise NanogapError(f"{where} lacks {', '.join(sorted(lacking))}, "
                               f"which the form of {form.name} has")
        image = item[form.image]
        if form.image == "img_id" and isinstance(image, str):
            image = image[:27] + ".jpg"            # COCO_train2014_000000580957_4: the fourth of it
        entries.append(entry(where, len(entries) + 1, image, item[form.expression], item[form.box],
                             form.corners, (item["width"], item["height"])))
    if not entries:
        raise NanogapError(f"{path} holds no annotation; fetch it again")
    return form.name, entries


# ----- the pickles of the refer API ---------------------------------------------------------------


class Unpickler(pickle.Unpickler):
    """Reads lists, dicts, text and numbers: a pickle that names a function could run anything."""

    def find_class(self, module: str, name: str) -> None:
        raise NanogapError(f"it names {module}.{name}, and annotations need no code")


def unpickle(path: Path, data: bytes) -> list[dict]:
    """The references of refs(unc).p: dicts of text, numbers and lists, nothing else."""
    needed = {"ann_id", "image_id", "split", "sentences"}
    try:
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
    refs, counts = unpickle(path, data), Counter()
    for ref in refs:
        counts[ref["split"]] += len(ref["sentences"])
    told = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
    if split not in counts:
        what = f"no split {split!r}" if split else "several splits"
        raise NanogapError(f"{path} has {what}; choose one with --split: {told}")
    boxes, sizes = read_instances(path.with_name("instances.json"))
    try:
        return told, [
            entry(f"{path}, sentence {said['sent_id']}", said["sent_id"],
                  f"COCO_train2014_{ref['image_id']:012}.jpg", said["sent"], boxes[ref["ann_id"]],
                  False, sizes[ref["image_id"]])
            for ref in refs if ref["split"] == split for said in ref["sentences"]]
    except (KeyError, TypeError) as error:
        raise NanogapError(f"{path} and instances.json do not fit together ({error!r}); "
                           "take both from one folder of the refer API") from None


def read_instances(path: Path) -> tuple[dict, dict]:
    """COCO's boxes (x, y, width, height) by annotation, and (width, height) by image."""
    try:
        coco = parse(str(path), path.read_bytes())
        return ({item["id"]: item["bbox"] for item in coco["annotations"]},
                {item["id"]: (item["width"], item["height"]) for item in coco["images"]})
    except OSError as error:
        raise NanogapError(f"{path} cannot be read ({error.strerror}), and the pickle holds "
                           "no boxes; put instances.json of the refer API there") from None
    except (KeyError, TypeError) as error:
        raise NanogapError(f"{path} does not have COCO's annotations and images ({error!r}); "
                           "fetch it again") from None


# ----- a file and a folder ------------------------------------------------------------------------


def open_sized(path: Path, size: tuple[int, int]) -> Image.Image:
    """An image, which must be as large as its annotation says: the box is in its pixels."""
    image = open_image(path)
    if image.size != size:
        raise NanogapError(f"{path} is {image.width} x {image.height} pixels and was annotated at "
                           f"{size[0]} x {size[1]}; fetch COCO's own, or take this one away")
    return image


def read_data(path: Path, images: Path | None, split: str | None = None) -> Data:
    """Read annotations and find their images: in the folder `images`, or beside the file.

    split:  which one of a pickle; the other forms hold one each, and take None
    raises: NanogapError that names file and line, for whatever is broken or not there
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NanogapError(f"--data {path} cannot be read ({error.strerror}); "
                           "give scenes:val or annotations of RefCOCO") from None
    data = data.removeprefix(b"\xef\xbb\xbf")    # a byte order mark
    json_like = data.lstrip()[:1] in (b"[", b"{")
    if json_like and split:
        raise NanogapError(f"{path} holds one split only; leave --split out")
    told, entries = read_json(path, data) if json_like else read_refs(path, data, split)
    groups: dict[str, list[Entry]] = {}
    for e in entries:
        groups.setdefault(e.image, []).append(e)
    folder, examples, missing = images or path.parent, [], []
    for number, (name, group) in enumerate(groups.items()):
        file = next((f for f in (folder / name, folder / Path(name).name) if os.path.isfile(f)), None)
        if file is None:
            missing.append(name)
        else:
            examples.append(Example(number, partial(open_sized, file, group[0].size),
                                    [(e.id, e.expression, e.box) for e in group]))
    if not examples:
        raise NanogapError(
            f"none of the {len(groups)} images is in {folder}, such as {missing[0]}; get COCO "
            "train2014 (images.cocodataset.org/zips/train2014.zip, 13 GB) and give its folder "
            "with --images")
    name = f"{path.name} {split}" if split else path.name
    digest = hashlib.sha256(repr(entries).encode()).hexdigest()[:8]
    name = f"{name} ({told}): {len(entries)} expressions about {len(groups)} images"
    return Data(name, digest, examples, len(entries), missing)
