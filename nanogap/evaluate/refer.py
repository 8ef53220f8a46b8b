"""The pickles of the refer API, refs(unc).p, and what any annotation must be.

In:  refs(unc).p and instances.json beside it.  Out: an entry for each sentence of a split.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogap.checks.command import shown
from nanogap.checks.pickles import read_plain
from nanogap.checks.reading import read_documents
from nanogap.errors import NanogapError
from nanogap.evaluate.data import Size, is_box, is_outside, is_size
from nanogap.image import Box


@dataclass(frozen=True)
class Entry:
    """One expression as it is annotated."""

    where: str                         # its place in the file
    id: str
    image: str                         # file name, with or without folders
    expression: str
    box: Box
    size: Size | None                  # of the image; None where the picture must say it
    group: str = ""                    # MiniGPT-v2's img_id


def corners_of(where: str, box: Any, corners: bool, size: Any) -> Box:
    """A box as x1, y1, x2, y2; what is no box, or no size of an image, is named with its place.

    corners: whether it is like this in the file, and not x, y, width, height
    """
    if not is_box(box) or not (size is None or is_size(size)):
        raise NanogapError(f"{where}: the box {shown(box)} is not four numbers, or width and "
                           f"height {shown(size)} are no whole ones")
    x1, y1, x2, y2 = box
    return (x1, y1, x2, y2) if corners else (x1, y1, x1 + x2, y1 + y2)


def check_inside(entry: Entry, size: Size) -> None:
    """Refuse a true box without area, or one that reaches out of its image."""
    x1, y1, x2, y2 = entry.box
    if x1 >= x2 or y1 >= y2 or is_outside(entry.box, size):
        raise NanogapError(f"{entry.where}: the box {list(entry.box)} (x1, y1, x2, y2) has no "
                           f"area, or reaches out of its image, {size[0]} x {size[1]} pixels; "
                           "boxes are in pixels here, not in percent or thousandths")


def read_refs(path: Path, split: str | None) -> tuple[str, list[Entry]]:
    """How many expressions each split has, and those of one; boxes come from instances.json."""
    refs = read_plain(path)
    try:
        counts = Counter(ref["split"] for ref in refs for _ in ref["sentences"])
    except (KeyError, TypeError):
        raise NanogapError(f"{path} is a pickle, but not a list with split and sentences; give "
                           "refs(unc).p of the refer API") from None
    told = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
    if split not in counts:
        asked = f"has no split {split!r}" if split else "has splits"
        raise NanogapError(f"{path} {asked}; choose one with --split: {told}")
    boxes, sizes, names = read_instances(path.with_name("instances.json"))
    entries: list[Entry] = []
    try:
        for ref in refs:
            for said in ref["sentences"] if ref["split"] == split else []:
                where, size = f"{path}, sentence {said['sent_id']}", sizes[ref["image_id"]]
                box = corners_of(where, boxes[ref["ann_id"]], False, size)
                entries.append(Entry(where, str(said["sent_id"]), picture_of(ref, names),
                                     said["sent"], box, size))
    except (KeyError, TypeError) as error:
        raise NanogapError(f"{path} and instances.json do not fit together ({error!r:.80}); "
                           "take both from one folder of the refer API") from None
    if len({entry.id for entry in entries}) < len(entries):
        raise NanogapError(f"{path} holds a sent_id twice, so one of its answers would be lost; "
                           "take one of the sentences out")
    return told, entries


def picture_of(ref: dict, names: dict) -> str:
    """The picture of a reference: COCO's by its number, another data set's by its name."""
    name = names[ref["image_id"]]
    own = ref.get("file_name", name)
    if own is None or own.startswith("COCO_"):
        return f"COCO_train2014_{ref['image_id']:012}.jpg"
    return name or own


def read_instances(path: Path) -> tuple[dict, dict, dict]:
    """COCO's boxes (x, y, width, height) by annotation; (width, height) and file by image."""
    if not path.is_file():
        raise NanogapError(f"{path} is not there, and the pickle holds no boxes; put "
                           "instances.json of the refer API there")
    documents = list(read_documents(path, path.read_bytes()))
    try:
        coco = documents[0][1]
        return ({item["id"]: item["bbox"] for item in coco["annotations"]},
                {item["id"]: (item["width"], item["height"]) for item in coco["images"]},
                {item["id"]: item.get("file_name") for item in coco["images"]})
    except (IndexError, KeyError, TypeError) as error:
        raise NanogapError(f"{path} does not have COCO's annotations and images ({error!r:.80}); "
                           "fetch it again") from None
