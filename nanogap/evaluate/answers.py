"""Answers of any program, scored as the evaluator scores its own.

In:  lines of {"id", "text"} or {"id", "box"}, and the data that they answer.
     Lines may say "prune", "keep" and "mode": each of these is a run.
Out: a record for each expression and each run; one without an answer counts as wrong.
Sources of FORMATS: nanogap/models for the first four; Qwen-VL eval_mm/evaluate_grounding.py (which
divides by 999); model cards of the later Qwen-VL; InternVL eval/refcoco/evaluate_grounding.py;
CogVLM's README; Ferret ferret/eval/eval_refexp.py; PaliGemma big_vision, `<loc....>`.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogap.checks.command import shown
from nanogap.checks.reading import read_documents, read_json
from nanogap.errors import NanogapError
from nanogap.evaluate.data import Data, Example, Size, are_numbers
from nanogap.evaluate.journal import settings_of
from nanogap.evaluate.score import TIMES, Run, score
from nanogap.image import Box, Pad
from nanogap.models import MiniGPT, Shikra
from nanogap.models.base import Stretch
from nanogap.prompt import TWO_DECIMALS


@dataclass(frozen=True)
class Format:
    """The notation of one family of models."""

    pattern: re.Pattern[str]           # four groups, one for each number
    one: float | None = 1000           # what is said for a whole side; None: pixels, as resized
    frame: Pad | Stretch = Stretch()
    drop: tuple[str, ...] = ()         # what is taken out of a text before it is read
    y_first: bool = False

    def read(self, text: str, size: Size, resized: Size | None = None) -> Box | None:
        """The first box of a text, in pixels of the picture; None, and no guess, if it is outside.

        size:    of the picture
        resized: of the picture as the model saw it, where boxes are in pixels of that one
        """
        for piece in self.drop:
            text = text.replace(piece, "")
        match = self.pattern.search(text)
        if match is None:
            return None
        a, b, c, d = map(float, match.groups())
        x1, y1, x2, y2 = (b, a, d, c) if self.y_first else (a, b, c, d)
        width, height = (self.one, self.one) if self.one else resized or size
        x1, y1, x2, y2 = x1 / width, y1 / height, x2 / width, y2 / height
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            return None
        return self.frame.to_pixels((x1, y1, x2, y2), *size)


N = r"\s*([0-9]+(?:\.[0-9]+)?)\s*"
JSON_BOX = re.compile(rf'"bbox_2d"\s*:\s*\[{N},{N},{N},{N}\]')
BRACKET = re.compile(rf"\[{N},{N},{N},{N}\]")
PAIRS = re.compile(rf"\({N},{N}\)\s*,\s*\({N},{N}\)")
FORMATS = {
    "llava": Format(TWO_DECIMALS.pattern, 1, Pad()),
    "llava-next": Format(TWO_DECIMALS.pattern, 1, Pad()),
    "shikra": Format(Shikra.box_format.pattern, 1, Pad()),
    "minigpt-v2": Format(MiniGPT.box_format.pattern, 100, drop=("<unk>", " ")),
    "qwen-vl": Format(PAIRS),
    "qwen2-vl": Format(PAIRS),
    "qwen2.5-vl": Format(JSON_BOX, None),
    "qwen3-vl": Format(JSON_BOX),
    "cogvlm": Format(re.compile(r"\[\[\s*(\d{3}),\s*(\d{3}),\s*(\d{3}),\s*(\d{3})\s*\]", re.ASCII)),
    "internvl": Format(BRACKET),
    "ferret": Format(BRACKET),
    "paligemma": Format(re.compile(r"<loc(\d{4})>" * 4, re.ASCII), 1024, y_first=True),
}
MEASURED = ("visual_tokens", "padding", *TIMES)   # numbers that lines may hold besides
KINDS = {"id": str | int, "text": str, "prune": str, "mode": str, "keep": str | int | None,
         "cut_off": bool | None, **dict.fromkeys(MEASURED, int | float | None)}
GIVEN = "given"                                   # strategy and mode where lines do not say them
LINES = ('give lines of {"id", "text"}, or for --protocol pixels of {"id", "box": [x1, y1, x2, y2] '
         "in pixels}")


def read_answers(args: argparse.Namespace, data: Data,
                 examples: Sequence[Example]) -> tuple[list[dict], dict[Run, int]]:
    """Read and score the file --score, as --protocol and --format say.

    examples: of the data, all that shall be answered
    returns:  records as the evaluator's own, and how many are not answered in each run
    raises:   NanogapError that names the line, for what is no answer, or answers nothing here
    """
    path: Path = args.score
    check_protocol(path, args.protocol)
    asked = {id_: (example.size, truth) for example in examples
             for id_, _, truth in example.questions}
    runs: dict[Run, dict[str, dict]] = {}
    for where, item in read_documents(path, path.read_bytes()):
        check_answer(where, item, args.protocol)
        id_ = str(item["id"])
        if id_ in data.left_out:
            continue
        if id_ not in asked:
            raise NanogapError(f"{where}: {shown(id_)} is none of the {len(asked)} expressions of "
                               f"{data.name}, such as {next(iter(asked))}; give the --data (and "
                               "--limit) that was answered")
        run = item.get("prune", GIVEN), item.get("keep"), item.get("mode", GIVEN)
        found = runs.setdefault(run, {})
        if id_ in found:
            raise NanogapError(f"{where} answers {shown(id_)} again; take one of the lines out")
        found[id_] = item
    if not runs:
        raise NanogapError(f"{path} holds no answer; {LINES}")
    check_units(path, [(item["box"], asked[id_][0]) for found in runs.values()
                       for id_, item in found.items() if item.get("box")])
    records = [record(run, found.get(id_, {"text": None}), size, truth, args)
               for run, found in runs.items() for id_, (size, truth) in asked.items()]
    return records, {run: len(asked) - len(found) for run, found in runs.items()}


def check_protocol(path: Path, protocol: str) -> None:
    """Refuse a file of the evaluator's whose boxes are another protocol's reading."""
    settings = settings_of(path)
    made = read_json(settings).get("protocol", "pixels") if settings.exists() else "pixels"
    if protocol == "pixels" != made:
        raise NanogapError(f"{path} holds boxes as {made} reads them ({settings.name}); give "
                           f"--protocol {made}")


def check_answer(where: str, item: Any, protocol: str) -> None:
    """Refuse a line that is no answer."""
    if not isinstance(item, dict):
        raise NanogapError(f"{where} is no answer; {LINES}")
    item.setdefault("id", None)
    if "box" not in item or protocol != "pixels":
        item.setdefault("text", None)
    wrong = [key for key, kind in KINDS.items() if key in item and not isinstance(item[key], kind)]
    if item.get("box") is not None and not are_numbers(item["box"], 4):
        wrong.append("box")
    if "resized" in item and not are_numbers(item["resized"], 2, least=1):
        wrong.append("resized")
    if wrong:
        raise NanogapError(f"{where}: {wrong[0]} cannot be {shown(item[wrong[0]])}; {LINES}")


def check_units(path: Path, boxes: Sequence[tuple[Sequence[float], Size]]) -> None:
    """Refuse boxes, each with the size of its image, most of which are no pixels: a few are odd."""
    wrong = [box for box, (width, height) in boxes if max(box) <= 1 or min(box[:2]) < -1
             or box[2] > width + 1 or box[3] > height + 1]
    if 2 * len(wrong) > len(boxes):
        raise NanogapError(f"{path}: {len(wrong)} of {len(boxes)} boxes are no pixels of their "
                           f"images, such as {list(wrong[0])}; give x1, y1, x2, y2 in pixels, and "
                           "not normalised, in percent or in thousandths")


def record(run: Run, item: dict, size: Size, truth: Box, args: argparse.Namespace) -> dict:
    """What counts of an answer (see score.py); its text is None where there is none."""
    text, box = item.get("text", ""), item.get("box")
    if args.protocol == "pixels" and text and "box" not in item:
        form = FORMATS[args.format or "llava"]
        if form.one is None and "resized" not in item:
            raise NanogapError(f"{args.format} says boxes in pixels of the picture as it saw it: "
                               'give "resized": [width, height] in each line')
        box = form.read(text, size, item.get("resized"))
    if box and not (box[0] < box[2] and box[1] < box[3]):     # or all of it lies in the padding
        box = None
    box, overlap = score(args.protocol, text or "", box, truth, *size)
    return {"prune": run[0], "keep": run[1], "mode": run[2], "text": text, "box": box,
            "iou": overlap, "cut_off": item.get("cut_off"),
            **{key: item.get(key) for key in MEASURED}}
