"""Answers of any program, scored as the evaluator scores its own.

In:  lines of {"id", "text"} or {"id", "box"}, or a file of another project (see `items`), and the
     data that they answer.  Lines may say "prune", "keep" and "mode": each of these is a run.
Out: a record for each expression and each run; one without an answer counts as wrong.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanogap.checks.command import shown
from nanogap.checks.reading import read_documents, read_json
from nanogap.errors import NanogapError
from nanogap.evaluate.data import Data, Example
from nanogap.evaluate.formats import FORMATS, MOST, smart_resize
from nanogap.evaluate.journal import settings_of
from nanogap.evaluate.refcoco import Size, are_numbers
from nanogap.evaluate.score import TIMES, Run, score
from nanogap.image import Box

MEASURED = ("visual_tokens", "padding", *TIMES)   # numbers that lines may hold besides
KINDS = {"id": str | int, "text": str, "prune": str, "mode": str, "keep": str | int | None,
         "cut_off": bool | None, **dict.fromkeys(MEASURED, int | float | None)}
GIVEN = "given"                                   # strategy and mode where lines do not say them
LINES = 'give lines of {"id", "text"} or {"id", "box": [x1, y1, x2, y2] in pixels}'

Asked = dict[str, tuple[Size, Box]]               # id -> size of the image, true box


def read_answers(args: argparse.Namespace, data: Data,
                 examples: Sequence[Example]) -> tuple[list[dict], dict[Run, int]]:
    """Read and score the file --score, as --protocol, --format and --resized say.

    examples: of the data, all that shall be answered
    returns:  records as the evaluator's own, and how many are not answered in each run
    raises:   NanogapError that names the line, for what is no answer, or answers nothing here
    """
    path: Path = args.score
    check_protocol(path, args.protocol)
    asked: Asked = {id_: (example.size, truth) for example in examples
                    for id_, _, truth in example.questions}
    runs: dict[Run, dict[str, dict]] = {}
    for where, item in items(path, data, asked):
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
    given = [(item, asked[id_][0]) for found in runs.values() for id_, item in found.items()]
    check_units(path, [(item["box"], size) for item, size in given if item.get("box")])
    if args.protocol == "pixels" and args.format is None:
        check_format(path, [item["text"] for item, _ in given if "box" not in item])
    records = [record(run, found.get(id_, {"text": None}), size, truth, args)
               for run, found in runs.items() for id_, (size, truth) in asked.items()]
    return records, {run: len(asked) - len(found) for run, found in runs.items()}


# ----- what is in a file --------------------------------------------------------------------------


def items(path: Path, data: Data, asked: Asked) -> Iterator[tuple[str, dict]]:
    """Each answer with its place, under the names of our own lines.

    Others: {img_id: [texts]} of MiniGPT-v2, which leaves out what it cannot read; "question_id" of
    LLaVA; "answer" and "gt_bbox", in the order of the data, of Qwen-VL and InternVL.
    """
    documents = list(read_documents(path, path.read_bytes()))
    whole = documents[0][1] if len(documents) == 1 else None
    if isinstance(whole, dict) and whole and all(isinstance(v, list) for v in whole.values()):
        documents = []
        for name, texts in whole.items():
            ids = data.groups.get(name, []) + [name] * len(texts)     # what is too many has no ID
            documents += [(f"{path}, {name}", {"id": id_, "text": text})
                          for id_, text in zip(ids, texts, strict=False)]
    for number, (where, item) in enumerate(documents, 1):
        if not isinstance(item, dict):
            raise NanogapError(f"{where} is no answer; {LINES}")
        if "gt_bbox" in item and "id" not in item:
            item["id"] = str(number)
            if item["id"] not in asked or list(asked[item["id"]][1]) != item["gt_bbox"]:
                raise NanogapError(f"{where} answers about the box {shown(item['gt_bbox'])}, which "
                                   f"is not that of expression {number} of {data.name}; give the "
                                   "--data that was answered")
        item.setdefault("id", item.get("question_id"))
        if "box" not in item:
            item.setdefault("text", item.get("answer"))
        yield where, item


def check_protocol(path: Path, protocol: str) -> None:
    """Refuse a file of the evaluator's whose boxes are another protocol's reading."""
    settings = settings_of(path)
    made = read_json(settings).get("protocol", "pixels") if settings.exists() else "pixels"
    if protocol == "pixels" != made:
        raise NanogapError(f"{path} holds boxes as {made} reads them ({settings.name}); give "
                           f"--protocol {made}")


def check_answer(where: str, item: dict, protocol: str) -> None:
    """Refuse a line that is no answer."""
    wrong = [key for key, kind in KINDS.items() if key in item and not isinstance(item[key], kind)]
    if item.get("box") is not None and not are_numbers(item["box"], 4):
        wrong.append("box")
    if "resized" in item and not are_numbers(item["resized"], 2, least=1):
        wrong.append("resized")
    if wrong:
        raise NanogapError(f"{where}: {wrong[0]} cannot be {shown(item[wrong[0]])}; {LINES}")
    if "text" not in item and protocol != "pixels":
        raise NanogapError(f"{where} has no text, and --protocol {protocol} reads nothing else; "
                           "choose another protocol")


def check_units(path: Path, boxes: Sequence[tuple[Sequence[float], Size]]) -> None:
    """Refuse boxes, each with the size of its image, most of which are no pixels: a few are odd."""
    wrong = [box for box, (width, height) in boxes if max(box) <= 1 or min(box[:2]) < -1
             or box[2] > width + 1 or box[3] > height + 1]
    if 2 * len(wrong) > len(boxes):
        raise NanogapError(f"{path}: {len(wrong)} of {len(boxes)} boxes are no pixels of their "
                           f"images, such as {list(wrong[0])}; give x1, y1, x2, y2 in pixels, and "
                           "not normalised, in percent or in thousandths")


def check_format(path: Path, texts: Sequence[str]) -> None:
    """Refuse texts of which hardly one holds a box as LLaVA says it, and most do in others."""
    texts = [text for text in texts if len(re.findall(r"\d+", text)) >= 4]   # may hold a box
    square = (MOST, MOST)                       # pixels of any picture lie in it; it has no padding
    count = {name: sum(form.read(text, square) is not None for text in texts)
             for name, form in FORMATS.items()}
    others = " or ".join(name for name in FORMATS if 2 * count[name] > len(texts))
    if others and 10 * count["llava"] <= len(texts):
        raise NanogapError(f"{path}: {count['llava']} of {len(texts)} texts with numbers hold a "
                           f"box as llava says it, and most do in the format of {others}; give "
                           "--format")


# ----- what is made of it -------------------------------------------------------------------------


def record(run: Run, item: dict, size: Size, truth: Box, args: argparse.Namespace) -> dict:
    """What counts of an answer (see score.py); its text is None where there is none."""
    text, box = item.get("text", ""), item.get("box")
    if args.protocol == "pixels" and text and "box" not in item:
        box = box_said(item, size, args)
    if box and not (box[0] < box[2] and box[1] < box[3]):
        box = None
    box, overlap = score(args.protocol, text or "", box, truth, *size)
    return {"prune": run[0], "keep": run[1], "mode": run[2], "text": text, "box": box,
            "iou": overlap, "cut_off": item.get("cut_off"),
            **{key: item.get(key) for key in MEASURED}}


def box_said(item: dict, size: Size, args: argparse.Namespace) -> Box | None:
    """The box in the text of an answer, in pixels of its picture."""
    form = FORMATS[args.format or "llava"]
    resized = item.get("resized", args.resized)         # the picture as the model saw it
    if form.one is None and resized is None:
        raise NanogapError(f"{args.format} says boxes in pixels of the picture as it saw it: give "
                           "\"resized\": [width, height] in each line, or --resized 28 where sides "
                           "were rounded to multiples of 28, as the model does by default")
    if isinstance(resized, int):
        resized = smart_resize(*size, resized)
    return form.read(item["text"], size, resized)
