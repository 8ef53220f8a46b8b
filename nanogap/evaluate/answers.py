"""Answers of any program, scored as the evaluator scores its own.

In:  lines of {"id", "text"} or {"id", "box"}, and the data that they answer.
Out: a record for each expression and each run of the file.

A box is in pixels of the original image.  A text holds one in the format of a family of models.
Lines may say "prune", "keep" and "mode", as the evaluator's own do: each of these is a run.
An expression without an answer counts as wrong.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogap.checks.command import shown
from nanogap.errors import NanogapError
from nanogap.evaluate.journal import beside
from nanogap.evaluate.refcoco import (
    Data,
    Example,
    check_pixels,
    documents,
    is_box,
    read_file,
)
from nanogap.evaluate.score import TIMES, Run, score
from nanogap.image import Box
from nanogap.models import VLM

MEASURED = ("visual_tokens", "padding", *TIMES)   # numbers that lines may hold besides
GIVEN = "given"                                   # strategy and mode where lines do not say them


def read_answers(path: Path, data: Data, examples: Sequence[Example], family: type[VLM],
                 protocol: str) -> tuple[list[dict], dict[Run, int]]:
    """Records as the evaluator's own, and how many expressions each run leaves out.

    examples: of the data, all that shall be answered
    raises:   NanogapError that names the line, for what is no answer, or answers nothing here
    """
    asked = {question[0]: (example, question)
             for example in examples for question in example.questions}
    check_protocol(path, protocol)
    runs: dict[Run, dict[str, dict]] = {}
    boxes = []
    for where, item in documents(path, read_file("--score", path, "give a file of answers")):
        check_answer(where, item, protocol)
        if item.get("box"):
            boxes.append(item["box"])
        id_ = str(item["id"])
        if id_ in data.left_out:
            continue
        if id_ not in asked:
            raise NanogapError(f"{where}: {id_[:80]!r} is none of the {len(asked)} expressions of "
                               f"{data.name}, such as {next(iter(asked))!r}; give the --data "
                               "(and --limit) that was answered")
        run = (item.get("prune", GIVEN), item.get("keep"), item.get("mode", GIVEN))
        found = runs.setdefault(run, {})
        if id_ in found:
            raise NanogapError(f"{where} answers {id_[:80]!r} again; take one of the lines out")
        example, (_, expression, truth) = asked[id_]
        found[id_] = record(item, run, example, expression, truth, family, protocol)
    if boxes:
        check_pixels(path, boxes)
    if not runs:
        raise NanogapError(f"{path} holds no answer; give lines of {{\"id\", \"text\"}} or "
                           "{\"id\", \"box\"}")
    records = []
    for run, found in runs.items():
        for id_, (example, (_, expression, truth)) in asked.items():
            nothing = {"id": id_, "text": ""}
            records.append(found.get(id_) or record(nothing, run, example, expression, truth,
                                                    family, protocol))
    return records, {run: len(asked) - len(found) for run, found in runs.items()}


def check_protocol(path: Path, protocol: str) -> None:
    """Refuse a file of the evaluator's whose boxes are lmms-eval's reading, and not the model's."""
    settings = beside(path)[0]
    if protocol == "lmms-eval" or not settings.is_file():
        return
    if '"protocol": "lmms-eval"' in settings.read_text(errors="replace"):
        raise NanogapError(f"{path} holds boxes as lmms-eval reads them ({settings.name}); give "
                           "--protocol lmms-eval")


def check_answer(where: str, item: Any, protocol: str) -> None:
    """Refuse a line that is no answer."""
    if not (isinstance(item, dict) and type(item.get("id")) in (str, int)):
        raise NanogapError(f"{where} has no id; give lines of {{\"id\", \"text\"}} or "
                           "{\"id\", \"box\"}")
    if not ("text" in item or "box" in item):
        raise NanogapError(f"{where} has neither text nor box; give what was answered, or "
                           "\"box\": null")
    if not isinstance(item.get("text", ""), str):
        raise NanogapError(f"{where}: the text is {shown(item['text'])}; give what was said")
    if not (item.get("box") is None or is_box(item["box"])):
        raise NanogapError(f"{where}: the box {shown(item['box'])} is not four numbers; give "
                           "x1, y1, x2, y2 in pixels, or null")
    if protocol == "lmms-eval" and "text" not in item:
        raise NanogapError(f"{where} has no text, and --protocol lmms-eval reads nothing else; "
                           "choose another protocol")
    for key, kinds, what in (("prune", (str,), "a name"), ("mode", (str,), "a name"),
                             ("keep", (str, int, type(None)), "a number of visual tokens"),
                             ("cut_off", (bool, type(None)), "true or false"),
                             *((key, (int, float, type(None)), "a number") for key in MEASURED)):
        if key in item and type(item[key]) not in kinds:
            raise NanogapError(f"{where}: {key} is {shown(item[key])}; give {what}")


def record(item: dict, run: Run, example: Example, expression: str, truth: Box,
           family: type[VLM], protocol: str) -> dict:
    """One line scored."""
    text = item.get("text", "")
    width, height = example.size
    box, iou = score(protocol, text, box_of(item, family, width, height), truth, width, height,
                     family.box_format.parse)
    return {"id": item["id"], "image": example.name, "expression": expression, "mode": run[2],
            "prune": run[0], "keep": run[1], "text": text, "box": box, "truth": truth, "iou": iou,
            "cut_off": item.get("cut_off"), **{key: item.get(key) for key in MEASURED}}


def box_of(item: dict, family: type[VLM], width: int, height: int) -> Box | None:
    """The box of a line in pixels, else that of its text; None where it has no area."""
    if "box" in item:
        box = item["box"]
    else:
        said = family.box_format.parse(item["text"])
        box = said and family.frame.to_pixels(said, width, height)
    if box is None or not (box[0] < box[2] and box[1] < box[3]):
        return None
    return tuple(box)   # type: ignore[return-value]
