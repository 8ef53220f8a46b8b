"""Answers of any program, scored as the evaluator scores its own.

In:  lines of {"id", "text"} or {"id", "box"}, or a file of another project (see `items`), and the
     data that they answer.  Lines may say "prune", "keep" and "mode": each of these is a run.
Out: a record for each expression and each run; one without an answer counts as wrong.
"""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nanogap.checks.command import shown
from nanogap.checks.output import check_folder, save_picture, write_whole
from nanogap.checks.reading import optional, read_documents
from nanogap.errors import NanogapError
from nanogap.evaluate.data import Data, Example, Size, check_units, is_box, is_size
from nanogap.evaluate.formats import FORMATS, Format, fitting, smart_resize
from nanogap.evaluate.journal import settings_of
from nanogap.evaluate.refcoco import read_file
from nanogap.evaluate.score import TIMES, Run, minigpt_iou, score
from nanogap.image import Box, iou

MEASURED = ("visual_tokens", "padding", *TIMES)   # numbers that lines may hold besides
KINDS = {"id": str | int, "text": str, "prune": str, "mode": str, "keep": str | int | None,
         "cut_off": bool | None, **dict.fromkeys(MEASURED, int | float | None)}
GIVEN = "given"                                   # strategy and mode where lines do not say them
HARDLY = 0.1
LINES = 'give lines of {"id", "text"} or {"id", "box": [x1, y1, x2, y2] in pixels}'


class How(NamedTuple):
    """How answers are read."""

    protocol: str
    form: str | None                   # a name of FORMATS; None: llava, unless another one fits
    resized: Size | int | None         # of pictures as the model saw them, or what sides divide by

    @property
    def format(self) -> Format:
        return FORMATS[self.form or "llava"]


Asked = dict[str, tuple[Size, Box]]               # id -> size of the image, true box


def read_answers(path: Path, data: Data, examples: Sequence[Example],
                 how: How) -> tuple[list[dict], dict[Run, int], list[str]]:
    """Read and score a file.

    examples: of the data, all that shall be answered
    returns:  records as the evaluator's own, how many are not answered, and what to say of it
    raises:   NanogapError that names the line, for what is no answer, or answers nothing here
    """
    check_protocol(path, how.protocol)
    asked: Asked = {id_: (example.size, truth) for example in examples
                    for id_, _, truth in example.questions}
    runs: dict[Run, dict[str, dict]] = {}
    for where, item in items(path, data, asked):
        check_answer(where, item, how.protocol)
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
    notes = []
    if how.protocol == "pixels":
        notes = check_format(path, [item["text"] for item, _ in given if "box" not in item], how)
    records = [record(run, found.get(id_, {"text": None}), size, truth, how)
               for run, found in runs.items() for id_, (size, truth) in asked.items()]
    return records, {run: len(asked) - len(found) for run, found in runs.items()}, notes


# ----- what is in a file --------------------------------------------------------------------------


def items(path: Path, data: Data, asked: Asked) -> Iterator[tuple[str, dict]]:
    """Each answer with its place, under the names of our own lines.

    Others: {img_id: [texts]} of MiniGPT-v2; "question_id" of LLaVA; "answer" and "gt_bbox", in the
    order of the data, of Qwen-VL and InternVL.
    """
    documents = list(read_documents(path, read_file("--score", path, "give a file of answers")))
    whole = documents[0][1] if len(documents) == 1 else None
    if isinstance(whole, dict) and whole and all(isinstance(v, list) for v in whole.values()):
        yield from items_of_minigpt(path, whole, data, asked)
        return
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


def items_of_minigpt(path: Path, whole: dict[str, list], data: Data,
                     asked: Asked) -> Iterator[tuple[str, dict]]:
    """The same of {img_id: [texts]}; MiniGPT-v2 leaves out what it cannot read."""
    for name, texts in whole.items():
        ids = data.groups.get(name, [])
        if len(texts) > len(ids):
            raise NanogapError(f"{path}: {shown(name)} has {len(texts)} answers and {len(ids)} "
                               f"expressions in {data.name}; give the --data that was answered, "
                               "in MiniGPT-v2's form")
        for id_, text in zip(ids, texts, strict=False):
            if id_ in asked:
                yield f"{path}, {name}", {"id": id_, "text": text}


def check_answer(where: str, item: dict, protocol: str) -> None:
    """Refuse a line that is no answer."""
    wrong = [key for key, kind in KINDS.items() if key in item and not isinstance(item[key], kind)]
    if item.get("box") is not None and not is_box(item["box"]):
        wrong.append("box")
    if "resized" in item and not is_size(item["resized"]):
        wrong.append("resized")
    if wrong:
        raise NanogapError(f"{where}: {wrong[0]} cannot be {shown(item[wrong[0]])}; {LINES}")
    if "text" not in item and protocol not in ("pixels", "minigpt"):
        raise NanogapError(f"{where} has no text, and --protocol {protocol} reads nothing else; "
                           "choose another protocol")


def check_protocol(path: Path, protocol: str) -> None:
    """Refuse a file of the evaluator's whose boxes are another protocol's reading."""
    made = optional(settings_of(path)).get("protocol", "pixels")
    if protocol == "pixels" != made:
        raise NanogapError(f"{path} holds boxes as {made} reads them ({settings_of(path).name}); "
                           f"give --protocol {made}")


def check_format(path: Path, texts: Sequence[str], how: How) -> list[str]:
    """Refuse a file of which hardly a text can be read where another format would fit.

    returns: a word on it where none would, or where the format was asked for
    """
    texts = [text for text in texts if len(re.findall(r"\d+", text)) >= 4]   # may hold a box
    read = sum(map(how.format.is_in, texts))
    if not texts or read > HARDLY * len(texts):
        return []
    said = (f"{path}: {read} of {len(texts)} texts with numbers hold a box as "
            f"{how.form or 'llava'} says it")
    others = " or ".join(name for name in fitting(texts) if name != how.form)
    if others:
        said += f", and most do in the format of {others}; give --format"
    if others and how.form is None:
        raise NanogapError(said)
    return [said]


# ----- what is made of it -------------------------------------------------------------------------


def record(run: Run, item: dict, size: Size, truth: Box, how: How) -> dict:
    """What counts of an answer (see score.py); its text is None where there is none."""
    box, overlap = reading(item, size, truth, how)
    return {"prune": run[0], "keep": run[1], "mode": run[2], "text": item.get("text", ""),
            "box": box, "iou": overlap, "cut_off": item.get("cut_off"),
            **{key: item.get(key) for key in MEASURED}}


def reading(item: dict, size: Size, truth: Box, how: How) -> tuple[Box | None, float]:
    """The box of an answer in pixels as the protocol reads it, and its IoU."""
    text, box = item.get("text", ""), item.get("box")
    if text is None:
        return None, 0.0
    if how.protocol != "pixels" and "text" in item:
        return score(how.protocol, text, None, truth, *size)
    if "box" not in item:
        box = how.format.read(text, size, resized_of(item, size, how))
    if box is None or not (box[0] < box[2] and box[1] < box[3]):
        return None, 0.0
    # without a text, MiniGPT-v2's protocol is its way to count
    return tuple(box), (minigpt_iou if how.protocol == "minigpt" else iou)(box, truth)


def resized_of(item: dict, size: Size, how: How) -> Size:
    """How large the picture was as the model saw it, where its boxes are in these pixels."""
    if how.format.one:
        return size
    if "resized" in item:
        return item["resized"][0], item["resized"][1]
    if how.resized is None:
        raise NanogapError(f"{how.form} says boxes in pixels of the picture as it saw it: give "
                           "\"resized\": [width, height] in each line, or --resized 28 where sides "
                           "were rounded to multiples of 28, as the model does by default")
    return smart_resize(*size, how.resized) if isinstance(how.resized, int) else how.resized


# ----- questions for another program --------------------------------------------------------------


def write_questions(path: Path, examples: Sequence[Example], same: Sequence[str]) -> str:
    """Write the file and the pictures; what to do with them, in a line.

    same: arguments of the command that say what data it is
    """
    folder = path.with_name(f"{path.stem}_images")
    for there in (path, folder):
        if there.exists():
            raise NanogapError(f"--questions {path}: {there} exists, and may have answers or "
                               "pictures in it; give a new file")
    lines = []
    for example in examples:
        image = example.file or folder / f"{example.name.partition(':')[2].replace('/', '-')}.png"
        if example.file is None:
            check_folder("--questions", folder)
            save_picture("--questions", image, example.image())
        width, height = example.size
        lines += [json.dumps({"id": id_, "image": str(image), "expression": expression,
                              "width": width, "height": height}) + "\n"
                  for id_, expression, _ in example.questions]
    write_whole("--questions", path, "".join(lines).encode())
    score = shlex.join(["python", "-m", "nanogap.evaluate", "--score", str(path), *same])
    return (f"{len(lines)} questions about {len(examples)} pictures: {path}\n"
            "add to each line \"text\", what was answered, or \"box\", x1, y1, x2, y2 in pixels; "
            f"then\n{score}")
