"""What counts as found: boxes against the true ones, and how sure the share of hits is.

In:  answers, one record each.  Out: accuracy, its 95 % interval and other means, a row per run.

The interval takes expressions for independent; those about one image are not quite, so the true one
is a little wider.
"""

from collections.abc import Callable, Sequence

from nanogap.checks.command import visible
from nanogap.image import Box, Pad, iou
from nanogap.prompt import Shares, parse_box

# strategy, budget (a number, a share such as "25%"; None: the strategy's own), mode
Run = tuple[str, int | str | None, str]

PROTOCOLS = {
    "pixels": "boxes in pixels of the original image, continuous areas, IoU >= 0.5",
    "minigpt": "as MiniGPT-v2 counts: pixels of the original image, sides + 1 pixel, IoU > 0.5",
    "shikra": "as Shikra counts: thousandths of the padded square, one box to an answer, IoU > 0.5",
    "lmms-eval": "as lmms-eval counts: the numbers said are shares of the unpadded image, "
                 "IoU >= 0.5 (its question has other words, which are not used here)",
}
TIMES = ("prefill_ms", "decode_ms")
PADDED = Pad()


def score(protocol: str, text: str, box: Box | None, truth: Box, width: int, height: int,
          parse: Callable[[str], Shares | None] = parse_box) -> tuple[Box | None, float]:
    """The box in pixels as a protocol reads the answer, and its IoU with the true one, 0 if none.

    box:    in pixels of the width x height image, padding taken off
    parse:  how the model's format of a box is read
    source: eval_utils.py of MiniGPT-v2; rec.py of Shikra, which has no use for a model of another
            frame than the padded square; lmms-eval compares the model's numbers with
            truth / (W, H), which in pixels is the same IoU
    """
    if protocol == "shikra":
        said = parse(text)
        if said is None or text.count("[") != 1 or ";" in text:
            return None, 0.0
        square = PADDED.from_pixels(truth, width, height)
        return box, iou(said, [round(share, 3) for share in square])
    if protocol == "lmms-eval":
        said = parse(text)
        box = said and (said[0] * width, said[1] * height, said[2] * width, said[3] * height)
    if box is None:
        return None, 0.0
    if protocol == "minigpt":
        return box, iou(with_last_pixel(box), with_last_pixel(truth))
    return box, iou(box, truth)


def with_last_pixel(box: Box) -> Box:
    """A box whose right and lower sides are counted as pixels that belong to it."""
    x1, y1, x2, y2 = box
    return x1, y1, x2 + 1, y2 + 1


def is_hit(iou: float, protocol: str) -> bool:
    """Whether an IoU counts; MiniGPT-v2 and Shikra want more than half."""
    return iou > 0.5 if protocol in ("minigpt", "shikra") else iou >= 0.5


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share, by Wilson: right also near 0 and 1, where the usual one is not."""
    if count == 0:
        return 0.0, 1.0
    share = hits / count
    spread = z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * (share * (1 - share) / count + spread / (4 * count)) ** 0.5 / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)   # rounding may lead outside


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what was measured; None where nothing was."""
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def summary(records: Sequence[dict], run: Run, protocol: str) -> dict:
    """One row: what became of all expressions in one run."""
    mine = [r for r in records if (r["prune"], r["keep"], r["mode"]) == run]
    hits = sum(is_hit(r["iou"], protocol) for r in mine)
    low, high = wilson(hits, len(mine))
    return {"prune": run[0], "keep": run[1], "mode": run[2], "expressions": len(mine),
            "accuracy": hits / max(len(mine), 1), "low": low, "high": high,
            "mean_iou": mean([r["iou"] for r in mine]),
            "no_box": mean([r["box"] is None for r in mine]),
            "cut_off": mean([r["cut_off"] for r in mine]),
            **{key: mean([r[key] for r in mine]) for key in ("padding", "visual_tokens", *TIMES)}}


# ----- the table ----------------------------------------------------------------------------------


def number(value: float | None, form: str, width: int) -> str:
    """A number for a column; what is not known is a dash."""
    return f"{'-' if value is None else format(value, form):>{width}}"


def budget(row: dict) -> str:
    """What was asked to be kept."""
    if row["keep"] is not None:
        return str(row["keep"])
    return "-" if row["visual_tokens"] is None else "auto"


def table(rows: Sequence[dict]) -> str:
    """The rows for the terminal; times are means, and have no column unless all rows have them."""
    timed = all(row[key] is not None for row in rows for key in TIMES)
    first = max(15, *(len(row["prune"]) for row in rows))
    modes = max(4, *(len(row["mode"]) for row in rows))
    head = (f"{'prune':{first}} {'keep':>4}  {'tokens':>6}  {'mode':{modes}}  {'Acc@0.5':>7}  "
            f"{'95 %':12}  {'mean IoU':>8}  {'no box':>6}  {'padding':>7}")
    lines = [head + "   prefill    decode" if timed else head]
    for row in rows:
        line = (f"{row['prune']:{first}} {budget(row):>4}  {number(row['visual_tokens'], '.4g', 6)}"
                f"  {row['mode']:{modes}}  {row['accuracy']:7.3f}  "
                f"{row['low']:.3f}..{row['high']:.3f}  {number(row['mean_iou'], '.3f', 8)}  "
                f"{number(row['no_box'], '.3f', 6)}  {number(row['padding'], '.3f', 7)}")
        if timed:
            line += "".join(f"  {row[key]:5.0f} ms" for key in TIMES)
        lines.append(line)
    return "\n".join(map(visible, lines))        # strategies and modes may stand in a file
