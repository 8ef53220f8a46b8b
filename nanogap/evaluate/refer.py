"""The pickles of the refer API, refs(unc).p, and what any annotation must be.

In:  refs(unc).p and instances.json beside it.  Out: an entry for each sentence of a split.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogap.checks.command import shown
from nanogap.checks.pickles import read_plain
from nanogap.checks.reading import read_bytes, read_documents
from nanogap.errors import ItemError, NanogapError
from nanogap.evaluate.data import Size, is_box, is_outside, is_whole
from nanogap.image import Box
from nanogap.prompt import check_expression

LARGEST = 1 << 31        # bytes; COCO's instances.json has 2^29


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
    group: str = ""                    # MiniGPT-v2's img_id


def checked(where: str, id_: object, image: Any, expression: Any, box: Any, corners: bool,
            size: tuple[Any, Any] | None, group: str = "") -> Entry:
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
    entry = Entry(str(id_), image, expression, (x1, y1, x2, y2), size, where, wrong, group)
    if entry.size:
        check_inside(entry, entry.size)
    return entry


def check_inside(entry: Entry, size: Size) -> None:
    """Refuse a true box that reaches out of its image."""
    if is_outside(entry.box, size):
        raise NanogapError(f"{entry.where}: the box {list(entry.box)} (x1, y1, x2, y2) reaches out "
                           f"of its image, {size[0]} x {size[1]} pixels; boxes are in pixels here, "
                           "not in percent or thousandths")


# ----- the pickles of the refer API ---------------------------------------------------------------


def read_refs(path: Path, split: str | None) -> tuple[str, list[Entry]]:
    """How many expressions each split has, and those of one; boxes come from instances.json."""
    refs = read_plain(path, LARGEST)
    needed = {"ann_id", "image_id", "split", "sentences"}
    if not (isinstance(refs, list) and refs and all(
            isinstance(ref, dict) and needed <= set(ref) and isinstance(ref["split"], str)
            and isinstance(ref["sentences"], list) for ref in refs)):
        raise NanogapError(f"{path} is a pickle, but not a list of {', '.join(sorted(needed))}; "
                           "give refs(unc).p of the refer API")
    counts: Counter[str] = Counter()
    for ref in refs:
        counts[ref["split"]] += len(ref["sentences"])
    told = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
    if split not in counts:
        what = f"no split {split!r}" if split else "several splits"
        raise NanogapError(f"{path} has {what}; choose one with --split: {told}")
    boxes, sizes, names = read_instances(path.with_name("instances.json"))
    try:
        return told, [
            checked(f"{path}, sentence {whole(said['sent_id'])}", said["sent_id"],
                    picture_of(ref, names), said["sent"],
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


def picture_of(ref: dict, names: dict) -> str:
    """The picture of a reference: COCO's by its number, another data set's by its name."""
    number = whole(ref["image_id"])
    own = ref.get("file_name", names.get(number))
    if not isinstance(own, str) or own.startswith("COCO_"):
        return f"COCO_train2014_{number:012}.jpg"
    return names.get(number) or own


def read_instances(path: Path) -> tuple[dict, dict, dict]:
    """COCO's boxes (x, y, width, height) by annotation; (width, height) and file by image."""
    if not path.is_file():
        raise NanogapError(f"{path} is not there, or is no regular file, and the pickle holds no "
                           "boxes; put instances.json of the refer API there")
    documents = list(read_documents(path, read_bytes(path, LARGEST)))
    try:
        (_, coco), = documents
        return ({item["id"]: item["bbox"] for item in coco["annotations"]},
                {item["id"]: (item["width"], item["height"]) for item in coco["images"]},
                {item["id"]: item.get("file_name") for item in coco["images"]})
    except (KeyError, TypeError, ValueError) as error:
        raise NanogapError(f"{path} does not have COCO's annotations and images ({error!r:.80}); "
                           "fetch it again") from None
