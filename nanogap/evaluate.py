"""REC accuracy: how often the box that the model says overlaps the true one by at least half.

    python -m nanogap.evaluate --data scenes:val --prune random --keep 50% 25% --limit 500

In:  weights, expressions with true boxes, and any number of strategies, budgets and modes.
Out: a table with 95 % intervals, and on demand one JSON line per answer.

Convention: boxes in pixels of the original image, continuous areas, IoU >= 0.5; an answer without a
box counts as wrong.  The image is encoded once for all that is asked about it.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from nanogap.cli import Parser, answer_for, keep_argument, tokens_to_keep, whole_number
from nanogap.errors import NanogapError
from nanogap.gap import MODES
from nanogap.image import Box, iou
from nanogap.llava import Llava
from nanogap.prune import STRATEGIES
from nanogap.scenes import scene
from nanogap.weights import DTYPES, load


@dataclass(frozen=True)
class Example:
    """One image with its expressions: (id, expression, true box in pixels)."""

    image: Image.Image
    questions: list[tuple[str, str, Box]]


def drawn_examples(split: str) -> Iterator[Example]:
    """Drawn scenes without end; the split's name seeds them (see scenes.py)."""
    index = 0
    while True:
        drawn = scene(split, index)
        yield Example(drawn.image, [(f"{split}/{index}/{i}", expression, drawn.things[thing].box)
                                    for i, (expression, thing) in enumerate(drawn.expressions)])
        index += 1


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share, by Wilson: right also near 0 and 1, where the usual one is not."""
    if count == 0:
        return 0.0, 1.0
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * (share * (1 - share) / count + spread / (4 * count)) ** 0.5 / (1 + spread)
    return centre - half, centre + half


def settings(args: argparse.Namespace, n_visual: int) -> list[tuple[str, int | None, str]]:
    """Every (strategy, budget, mode) that was asked for; mode full prunes nothing and comes once."""
    runs = [("none", n_visual, "full")] if "full" in args.mode else []
    return runs + [(prune, tokens_to_keep(keep, n_visual), mode) for prune in args.prune
                   for keep in args.keep for mode in args.mode if mode != "full"]


def answers(model: Llava, examples: Iterator[Example], runs: Sequence[tuple[str, int, str]], limit: int,
            seed: int) -> Iterator[dict]:
    """One record per expression and run, for the first `limit` expressions."""
    asked = 0
    for number, example in enumerate(examples):
        look = model.look(example.image)
        for id_, expression, truth in example.questions:
            if asked == limit:
                return
            asked += 1
            for prune, keep, mode in runs:
                result = model.ground(look, expression, prune, keep, mode, seed + number)
                yield {"id": id_, "expression": expression, "mode": mode, "prune": prune, "keep": keep,
                       "text": result.text, "box": result.box and list(result.box), "truth": list(truth),
                       "iou": iou(result.box, truth) if result.box else 0.0}


def table(records: Sequence[dict], runs: Sequence[tuple[str, int, str]]) -> str:
    """Accuracy, its interval, mean IoU and the share of answers without a box, a line per run."""
    lines = [f"{'prune':14} {'tokens':>6}  {'mode':8}  {'Acc@0.5':>7}  {'95 %':13}  "
             f"{'mean IoU':>8}  {'no box':>6}"]
    for run in runs:
        mine = [r for r in records if (r["prune"], r["keep"], r["mode"]) == run]
        n = max(len(mine), 1)
        hits = sum(r["iou"] >= 0.5 for r in mine)
        low, high = wilson(hits, len(mine))
        mean, unread = sum(r["iou"] for r in mine) / n, sum(r["box"] is None for r in mine) / n
        lines.append(f"{run[0]:14} {run[1]:6}  {run[2]:8}  {hits / n:7.3f}  {low:.3f}..{high:.3f}   "
                     f"{mean:8.3f}  {unread:6.3f}")
    return "\n".join(lines)


def command(argv: Sequence[str] | None) -> None:
    """Answer every expression in every run, and print the table."""
    parser = Parser(prog="python -m nanogap.evaluate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, default=Path("weights/mini"), metavar="DIR", help="default: %(default)s")
    add("--data", default="scenes:val", metavar="scenes[:SPLIT]", help="default: %(default)s")
    add("--prune", nargs="+", choices=STRATEGIES, default=["random"], metavar="NAME",
        help=f"any of {', '.join(STRATEGIES)} (default: random)")
    add("--keep", nargs="+", type=keep_argument, default=["50%"], metavar="N|N%", help="default: 50%%")
    add("--mode", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help="default: all four")
    add("--limit", type=whole_number, default=500, help="expressions (default: %(default)s)")
    add("--out", type=Path, metavar="FILE.jsonl", help="one line per answer")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto")
    add("--seed", type=whole_number, default=0, help="of the random strategy (default: %(default)s)")
    args = parser.parse_args(argv)
    kind, _, split = args.data.partition(":")
    if kind != "scenes":
        raise NanogapError(f"--data {args.data}: only drawn scenes can be evaluated so far; "
                           "give scenes:val")
    asked = [None if value == "auto" else value for value in (args.device, args.dtype)]
    model = load(args.weights, *asked)
    runs = settings(args, model.config.vision.grid ** 2)
    records, begun, told = [], time.time(), time.time()
    total = len(runs) * args.limit
    try:
        out = args.out.open("x") if args.out else None
    except OSError as error:
        raise NanogapError(f"--out {args.out} cannot be written ({error.strerror}); "
                           "give a new file") from None
    for record in answers(model, drawn_examples(split or "val"), runs, args.limit, args.seed):
        records.append(record)
        if out:
            out.write(json.dumps(record) + "\n")
            out.flush()
        if time.time() - told > 5:
            told, rate = time.time(), len(records) / (time.time() - begun)
            print(f"{len(records)} of {total} answers, {rate:.1f} a second, "
                  f"{(total - len(records)) / rate / 60:.0f} min to go", file=sys.stderr)
    print(f"{args.weights}, {args.data}, {args.limit} expressions, seed {args.seed}, "
          f"{model.device}, {str(model.dtype).removeprefix('torch.')}")
    print(table(records, runs))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(answer_for("nanogap.evaluate", command, None))
