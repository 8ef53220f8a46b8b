"""What counts as found: boxes against the true ones, and how sure the share of hits is.

In:  answers, one record each.  Out: accuracy, its 95 % interval and other means, a row per run.

The interval takes expressions for independent; those about one image are not quite, so the true one
is a little wider.
"""

from collections.abc import Sequence

from nanogap.image import Box, iou
from nanogap.prompt import parse_box

PROTOCOLS = {
    "pixels": "boxes in pixels of the original image, continuous areas, IoU >= 0.5",
    "minigpt": "as MiniGPT-v2 counts: pixels of the original image, sides + 1 pixel, IoU > 0.5",
    "lmms-eval": "as lmms-eval counts: the numbers said are shares of the unpadded image, "
                 "IoU >= 0.5 (its question has other words, which are not used here)",
}
TIMES = ("prefill_ms", "decode_ms")


def score(protocol: str, text: str, box: Box | None, truth: Box, width: int,
          height: int) -> tuple[Box | None, float]:
    """The box in pixels as a protocol reads the answer, and its IoU with the true one, 0 if none.

    box:    in pixels of the width x height image, padding taken off
    source: eval_utils.py of MiniGPT-v2; lmms-eval compares the model's numbers with truth / (W, H),
            which in pixels is the same IoU
    """
    if protocol == "lmms-eval":
        said = parse_box(text)
        box = said and (said[0] * width, said[1] * height, said[2] * width, said[3] * height)
    if box is None:
        return None, 0.0
    more = 1 if protocol == "minigpt" else 0
    return box, iou(*((x1, y1, x2 + more, y2 + more) for x1, y1, x2, y2 in (box, truth)))


def is_hit(overlap: float, protocol: str) -> bool:
    """Whether an IoU counts; only MiniGPT-v2 wants more than half."""
    return overlap > 0.5 if protocol == "minigpt" else overlap >= 0.5


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share, by Wilson: right also near 0 and 1, where the usual one is not."""
    if count == 0:
        return 0.0, 1.0
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * (share * (1 - share) / count + spread / (4 * count)) ** 0.5 / (1 + spread)
    return centre - half, centre + half


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what was measured; None where nothing was."""
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def summary(records: Sequence[dict], run: tuple[str, int | None, str], protocol: str) -> dict:
    """One row: what became of all expressions in one run."""
    mine = [r for r in records if (r["prune"], r["keep"], r["mode"]) == run]
    hits = sum(is_hit(r["iou"], protocol) for r in mine)
    low, high = wilson(hits, len(mine))
    return {"prune": run[0], "keep": run[1], "mode": run[2], "expressions": len(mine),
            "accuracy": hits / max(len(mine), 1), "low": low, "high": high,
            "mean_iou": mean([r["iou"] for r in mine]),
            "no_box": mean([r["box"] is None for r in mine]),
            **{key: mean([r[key] for r in mine]) for key in ("visual_tokens", *TIMES)}}


def table(rows: Sequence[dict]) -> str:
    """The rows for the terminal; times are means, and have no column where none were taken."""
    timed = any(row["prefill_ms"] is not None for row in rows)
    width = max(len(row["mode"]) for row in rows)
    lines = [f"{'prune':15} {'keep':>4}  {'tokens':>6}  {'mode':{width}}  {'Acc@0.5':>7}  "
             f"{'95 %':12}  {'mean IoU':>8}  {'no box':>6}" + timed * "   prefill    decode"]
    for row in rows:
        keep = "auto" if row["keep"] is None else row["keep"]
        times = "".join(f"  {row[key]:5.0f} ms" for key in TIMES if timed)
        lines.append(f"{row['prune']:15} {keep:>4}  {row['visual_tokens']:6.4g}  "
                     f"{row['mode']:{width}}  {row['accuracy']:7.3f}  "
                     f"{row['low']:.3f}..{row['high']:.3f}  {row['mean_iou']:8.3f}  "
                     f"{row['no_box']:6.3f}{times}")
    return "\n".join(lines)
