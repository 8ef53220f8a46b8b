"""What counts as found: answers, one record each -> accuracy, its 95 % interval, a row per run.

Each project that publishes scores reads an answer in a way of its own, and odd answers, which
pruned models give, are right under one and wrong under another.  So each protocol has a reader
here: a text, the true box and the size of the picture -> the box that it reads, and its IoU.
"""

import math
import re
from collections.abc import Sequence
from contextlib import suppress

from nanogap.checks.command import visible
from nanogap.image import Box, Pad, iou

Budget = int | str | None                   # a number, a share such as "25%", the strategy's own
Run = tuple[str, Budget, str]               # strategy, budget, mode
Reading = tuple[Box, float]                 # the box in pixels; its IoU with the true one

OTHER_WORDS = "(its question has other words, which are not used here)"
PROTOCOLS = {
    "pixels": "pixels: boxes in pixels of the original image, continuous areas, IoU >= 0.5",
    "minigpt": "minigpt: as MiniGPT-v2 counts, hundredths of the image's sides, sides + 1 pixel, "
               "IoU > 0.5",
    "shikra": "shikra: as Shikra counts, thousandths of the padded square, one box to an answer, "
              "IoU > 0.5",
    "lmms-eval": "lmms-eval: as its task refcoco_bbox_rec counts, the numbers said are shares of "
                 f"the unpadded image, IoU >= 0.5 {OTHER_WORDS}",
    "vlmevalkit": "vlmevalkit: as VLMEvalKit counts, shares, thousandths or pixels by the largest "
                  f"number said, IoU >= 0.5 {OTHER_WORDS}",
}
TIMES = ("prefill_ms", "decode_ms")


def minigpt(text: str, truth: Box, width: int, height: int) -> Reading | None:
    """As MiniGPT-v2's own evaluation: a box begins the answer, and no other number is in it.

    Neither range nor order of the corners is asked.
    source: Vision-CAIR/MiniGPT-4 226cb38, eval_scripts/eval_ref.py; eval_utils.py, computeIoU
    """
    said = text.replace("<unk>", "").replace(" ", "").strip()
    numbers = re.findall(r"\d+", said)
    begins = re.match(r"\{<\d{1,3}><\d{1,3}><\d{1,3}><\d{1,3}>\}", said)
    if not begins or len(numbers) != 4:
        return None
    x1, y1, x2, y2 = (int(number) / 100 for number in numbers)
    box = (x1 * width, y1 * height, x2 * width, y2 * height)
    # the right and the lower sides are pixels that belong to a box
    return box, iou(*((x1, y1, x2 + 1, y2 + 1) for x1, y1, x2, y2 in (box, truth)))


def shikra(text: str, truth: Box, width: int, height: int) -> Reading | None:
    """As Shikra's own evaluation: one bracket of the right form, in shares of the padded square.

    It has one box, no blanks, one digit before each point.  Other brackets do not count.
    source: shikras/shikra 1204f10, rec.py; box_process_function.py, PlainBoxFormatter
    """
    number = r"\d(?:\.\d*)?"
    four = rf"{number}(?:,{number}){{3}}"
    found = re.findall(rf"\[{four}(?:;{four})*\]", text)
    if len(found) != 1 or ";" in found[0]:
        return None
    said = [float(number) for number in found[0][1:-1].split(",")]
    side, offset = max(width, height), Pad().offset(width, height) * 2
    true = [float(f"{(v + pad) / side:.3f}") for v, pad in zip(truth, offset, strict=True)]
    x1, y1, x2, y2 = (share * side - pad for share, pad in zip(said, offset, strict=True))
    return (x1, y1, x2, y2), iou(*([round(1000 * v, 3) for v in box] for box in (said, true)))


def lmms_eval(text: str, truth: Box, width: int, height: int) -> Reading | None:
    """As lmms-eval's task refcoco_bbox_rec: a bracket of four numbers, shares of the picture.

    They are of any range, with a digit before each point, and no blank before a comma.
    source: lmms-eval 0.7.3, tasks/refcoco/utils_rec.py
    """
    number = r"(-?\d+(?:\.\d+)?)"
    match = re.search(rf"\[\s*{number},\s*{number},\s*{number},\s*{number}\s*\]", text)
    if not match:
        return None
    x1, y1, x2, y2 = map(float, match.groups())
    true = truth[0] / width, truth[1] / height, truth[2] / width, truth[3] / height
    return (x1 * width, y1 * height, x2 * width, y2 * height), iou((x1, y1, x2, y2), true)


def vlmevalkit(text: str, truth: Box, width: int, height: int) -> Reading | None:
    """As VLMEvalKit: a bracket of four numbers, else the first four of the text.

    The largest of them says what they are.  The box is clipped, its corners are put in order.
    source: VLMEvalKit e8e78f0, vlmeval/dataset/refcoco.py
    """
    number, between = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?", r"(?:\s*,\s*|\s+)"
    match = re.search(rf"\[\s*{between.join([f'({number})'] * 4)}\s*\]", text)
    numbers = match.groups() if match else re.findall(number, text)[:4]
    if len(numbers) < 4:
        return None
    said = [float(number) for number in numbers]
    most = max(map(abs, said))
    one = 1 if most <= 1.5 else 1000 if most <= 1000 else None
    x1, y1, x2, y2 = (min(max(v * side / one if one else v, 0.0), side)
                      for v, side in zip(said, (width, height) * 2, strict=True))
    box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    return box, iou(box, truth)


READERS = {"minigpt": minigpt, "shikra": shikra, "lmms-eval": lmms_eval, "vlmevalkit": vlmevalkit}


def score(protocol: str, text: str, box: Box | None, truth: Box, width: int,
          height: int) -> tuple[Box | None, float]:
    """The box in pixels as a protocol reads the answer, and its IoU with the true one, 0 if none.

    box: as the answer's own format is read, in pixels; "pixels" takes it, the others read the text
    """
    if protocol == "pixels":
        return box, iou(box, truth) if box else 0.0
    found = None
    with suppress(ValueError, OverflowError):     # a number of hundreds of digits is in no picture
        found = READERS[protocol](text, truth, width, height)
    return found if found and all(map(math.isfinite, found[0])) else (None, 0.0)


def is_hit(iou: float, protocol: str) -> bool:
    """Whether an IoU counts; MiniGPT-v2 and Shikra want more than half."""
    return iou > 0.5 if protocol in ("minigpt", "shikra") else iou >= 0.5


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, by Wilson: right also near 0 and 1, where the usual one is not.

    It takes expressions for independent; those about one image are not quite.
    """
    z = 1.96
    share = hits / count
    spread = z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * (share * (1 - share) / count + spread / (4 * count)) ** 0.5 / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)   # rounding may lead outside


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what was measured; None where nothing was."""
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def run_of(record: dict) -> Run:
    """The run that a record, or a row, belongs to."""
    return record["prune"], record["keep"], record["mode"]


def summary(records: Sequence[dict], run: Run, protocol: str) -> dict:
    """One row: what became of all expressions in one run.

    One without an answer (its text is None) counts as wrong, and not as an answer without a box.
    """
    mine = [r for r in records if run_of(r) == run]
    answered = [r for r in mine if r.get("text", "") is not None]
    hits = sum(is_hit(r["iou"], protocol) for r in mine)
    low, high = wilson(hits, len(mine))
    return {"prune": run[0], "keep": run[1], "mode": run[2], "expressions": len(mine),
            "accuracy": hits / len(mine), "low": low, "high": high,
            "mean_iou": mean([r["iou"] for r in mine]),
            "no_box": mean([r["box"] is None for r in answered]),
            "cut_off": mean([r["cut_off"] for r in answered]),
            **{key: mean([r[key] for r in mine]) for key in ("padding", "visual_tokens", *TIMES)}}


def budget(row: dict) -> str:
    """What was asked to be kept."""
    if row["keep"] is not None:
        return str(row["keep"])
    return "-" if row["visual_tokens"] is None else "auto"


def table(rows: Sequence[dict]) -> str:
    """The rows for the terminal; times are means, and have no column unless all rows have them.

    What is not known is a dash.
    """
    timed = all(row[key] is not None for row in rows for key in TIMES)
    first = max(15, *(len(row["prune"]) for row in rows))
    modes = max(4, *(len(row["mode"]) for row in rows))
    line = f"{{:{first}}} {{:>4}}  {{:>6}}  {{:{modes}}}" + "  {:>7}  {:12}  {:>8}  {:>6}  {:>7}"
    heads = ["prune", "keep", "tokens", "mode", "Acc@0.5", "95 %", "mean IoU", "no box", "padding"]
    if timed:
        line += "  {:>8}  {:>8}"
        heads += ["prefill", "decode"]
    lines = [line.format(*heads)]
    for row in rows:
        tokens = "-" if row["visual_tokens"] is None else f"{row['visual_tokens']:.4g}"
        means = ["-" if row[key] is None else f"{row[key]:.3f}"
                 for key in ("mean_iou", "no_box", "padding")]
        times = [f"{row[key]:.0f} ms" for key in TIMES] if timed else []
        lines.append(line.format(row["prune"], budget(row), tokens, row["mode"],
                                 f"{row['accuracy']:.3f}", f"{row['low']:.3f}..{row['high']:.3f}",
                                 *means, *times))
    return "\n".join(map(visible, lines))        # strategies and modes may stand in a file
