"""The pickles of the refer API: refs(unc).p of RefCOCO, and of other data sets in its form.

In:  refs(unc).p and instances.json beside it.  Out: an entry for each sentence of a split.
source: lichengunc/refer 2fe1dfe, refer.py: getRefBox says where a box is, showRef which picture
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from nanogap.checks.pickles import read_plain
from nanogap.checks.reading import read_json
from nanogap.errors import NanogapError
from nanogap.evaluate.data import LARGEST


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


def read_refs(path: Path, data: bytes, split: str | None) -> tuple[str, list[Entry]]:
    """How many expressions each split has, and those of one; boxes come from instances.json."""
    refs = read_plain(path, data)
    try:
        counts = Counter(ref["split"] for ref in refs for _ in ref["sentences"])
    except (KeyError, TypeError):
        raise NanogapError(f"{path} is a pickle, but not a list with split and sentences; give "
                           "refs(unc).p of the refer API") from None
    told = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
    if split not in counts:
        asked = f"has no split {split!r}" if split else "has splits"
        raise NanogapError(f"{path} {asked}; choose one with --split: {told}")
    coco = read_json(path.with_name("instances.json"), LARGEST)
    entries = []
    try:
        boxes = {item["id"]: item["bbox"] for item in coco["annotations"]}
        images = {item["id"]: item for item in coco["images"]}
        for ref in refs:
            for said in ref["sentences"] if ref["split"] == split else []:
                image = images[ref["image_id"]]
                entries.append(Entry(
                    f"{path}, sentence {said['sent_id']}", str(said["sent_id"]),
                    str(image["file_name"]), said["sent"], boxes[ref["ann_id"]],
                    (image["width"], image["height"]), corners=False))
    except (KeyError, TypeError) as error:
        raise NanogapError(f"{path} and instances.json do not fit together ({error!r:.80}); "
                           "take both from one folder of the refer API") from None
    return told, entries
