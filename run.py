"""Ask where something is: with all visual tokens, with pruned ones, and with pruned ones under GAP.

    python run.py image.jpg "the man on the left"

In:  an image and a referring expression.  Out: a table, and one picture of all the boxes.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))   # no traceback while this is imported

import argparse
import json
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import nanogap
from nanogap import NanogapError
from nanogap.checks.command import (
    ListStrategies,
    Parser,
    answer_for,
    count_argument,
    keep_argument,
    path_argument,
    tell,
    visible,
    whole_number,
)
from nanogap.checks.loading import MINI, default_weights, folder_of
from nanogap.checks.output import check_picture, save_picture
from nanogap.fast.answered import Answered
from nanogap.gap import MODES
from nanogap.ground import MAX_NEW_TOKENS
from nanogap.image import Box, iou, open_image
from nanogap.llava import EncodedImage
from nanogap.methods import find
from nanogap.methods.in_decoder import cuts_in_words, prunes_there
from nanogap.models import VLM
from nanogap.prune import STRATEGIES, budget_of
from nanogap.show.draw import agreement, draw_results, shortened
from nanogap.show.explain import columns, explain
from nanogap.train.scenes import scene_of, words_never_taught
from nanogap.weights import DTYPES

WORDS = 36       # columns for them in the table: the longest box of a model is as long


# ----- what was asked -----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, each checked by itself."""
    parser = Parser(prog="python run.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("image", metavar="IMAGE", help="any picture that Pillow reads")
    add("expression", metavar="EXPRESSION", help='what to look for, such as "the man on the left"')
    add("--weights", metavar="DIR", type=path_argument,
        help="a folder, or one that ships: mini, mini-next, mini-shikra, mini-minigpt (default: "
             "weights/llava-1.5-7b-hf where that is present, else mini)")
    add("--prune", metavar="NAME", default="random", action=ListStrategies,
        help=f"{', '.join(STRATEGIES)}, with settings as in \"fastv(layer=2)\", or FILE.py:NAME "
             "for one of your own; `--prune list` says what each does (default: %(default)s)")
    add("--keep", metavar="N", type=keep_argument, default="50%",
        help="visual tokens to keep: a number such as 64, a share such as 25%% or 9.8%%, or auto "
             "where the strategy can tell (default: 50%%)")
    add("--mode", nargs="+", choices=MODES, default=["full", "shifted", "gap"], metavar="MODE",
        help="full: nothing pruned; shifted, permuted: kept tokens renumbered, in raster order or "
             "by score; gap: their own position IDs; or, in quotes, a mix of these: "
             f"{'; '.join(mode for mode in MODES if ',' in mode)} (default: full shifted gap)")
    add("--clip", metavar="DIR", type=path_argument,
        help="folder of the CLIP that the vision tower comes from, for strategies that read the "
             "expression (default: clip_text in the folder of the weights)")
    add("--max-new-tokens", metavar="N", type=count_argument, default=MAX_NEW_TOKENS,
        help="an answer is cut off after so many tokens (default: %(default)s)")
    add("--no-draft", dest="drafts", action="store_false",
        help="one token in each pass of the decoder: slower, with the same words")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="where the model runs: auto (CUDA where there is one, else cpu), %(choices)s"
             .replace("%(choices)s", "cpu, cuda, mps"))
    add("--dtype", choices=["auto", *DTYPES], default="auto",
        help=f"precision of the weights: auto (the checkpoint's own on a GPU), {', '.join(DTYPES)}")
    add("--no-pack", dest="pack", action="store_false", default=None,
        help="on a CPU: slower, with half the memory for weights")
    add("--seed", metavar="N", type=whole_number, default=0,
        help="a whole number, for strategies that draw lots (default: %(default)s)")
    add("--out", metavar="PICTURE", type=path_argument, default=Path("answer.png"),
        help="a .png or .jpg file to write (default: %(default)s)")
    add("--json", action="store_true",
        help="print one JSON document instead of the table: boxes in pixels, times in ms")
    add("--explain", action="store_true", help="print every shape and every ID on the way")
    return parser.parse_args(argv)


# ----- load ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """All that the modes have in common."""

    model: VLM
    image: Image.Image
    encoded: EncodedImage
    prune: str                # name of a strategy
    keep: int | None          # its budget
    truth: Box | None         # the true box in pixels, where the picture is a drawn scene


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Say on stderr what is going on, where it takes longer than a second."""
    timer = threading.Timer(1.0, tell, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def load(args: argparse.Namespace) -> Asked:
    """Load the model and encode the image; mistakes that need no model are found first."""
    if not args.expression.strip():
        raise NanogapError('the expression is empty; name a thing, such as "the man on the left"')
    image = open_image(args.image)
    check_picture("--out", args.out, args.image)
    prune = find(args.prune)
    device = None if args.device == "auto" else args.device
    dtype = None if args.dtype == "auto" else args.dtype
    with patience(f"loading {args.weights}"):
        model = nanogap.load(args.weights, device, dtype, args.clip, args.pack)
    with patience("looking at the image"):
        encoded = model.encode_image(image)
        keep = budget_of(args.keep, encoded.n_patches, prune)
        if set(args.mode) != {"full"} and not prunes_there(prune):   # what it needs to see is kept
            model.select(encoded, args.expression, prune, keep, args.seed)
    drawn = scene_of(args.image)
    told = dict(drawn.expressions).get(" ".join(args.expression.split())) if drawn else None
    truth = drawn.things[told].box if drawn and told is not None else None
    return Asked(model, image, encoded, prune, keep, truth)


# ----- ask ----------------------------------------------------------------------------------------


def ask(args: argparse.Namespace, query: Asked) -> dict[str, Answered]:
    """The answer in each mode, in the order in which these were given."""
    with patience("warming up"):
        warm_up(query)
    results = {}
    for mode in dict.fromkeys(args.mode):
        with patience(f"answering in mode {mode}"):
            results[mode] = query.model.ground(
                query.encoded, args.expression, query.prune, query.keep, mode, args.seed,
                max_new_tokens=args.max_new_tokens, drafts=args.drafts)
    return results


def warm_up(query: Asked) -> None:
    """Answer once before the clock runs, or the first mode would pay for what the others reuse."""
    if query.model.device.type == "cpu":
        query.model.ground(query.encoded, "warm up", "random", 1, "gap", max_new_tokens=1)
    else:                                              # kernels are loaded by shape
        query.model.ground(query.encoded, "warm up", mode="full", max_new_tokens=8)


# ----- show ---------------------------------------------------------------------------------------


def show(args: argparse.Namespace, query: Asked, results: dict[str, Answered]) -> None:
    """Save the picture, and print the table or the document."""
    document = report(args, query, results)
    cells = query.model.cells(query.encoded)
    picture = draw_results(query.image, cells, args.expression, query.prune, results, query.truth,
                           args.weights.name)
    save_picture("--out", args.out, picture)
    if args.json:
        print(json.dumps(document))
        return
    print(f"{document['weights']} on {document['device']}, {document['dtype']}")
    if args.weights.resolve().parent == MINI.parent and args.weights.name.startswith("mini"):
        print("These weights know drawn scenes only; "
              "for photographs see \"Real weights\" in README.md.")
        unknown = words_never_taught(args.expression)
        if unknown:
            print(f"They were never taught {', '.join(map(json.dumps, unknown))}, "
                  "so the box is a guess; README.md names the words that they know.")
    if args.explain:
        explain(query.model, query.encoded, args.expression, results)
    print_table(document, query.model.box_format.pattern)
    print_notes(query, results)
    print(f"picture: {args.out}")


def report(args: argparse.Namespace, query: Asked, results: dict[str, Answered]) -> dict:
    """The JSON document; the table shows the same numbers."""
    full = results.get("full")
    runs = []
    for mode, result in results.items():
        runs.append({
            "mode": mode,
            "visual_tokens": result.visual_tokens,
            "box": [round(v, 2) for v in result.box] if result.box else None,
            "text": result.text,
            "cut_off": result.cut_off,
            "iou_with_full": agreement(result, full),
            "position_ids": [int(result.position_ids[0]), int(result.position_ids[-1])],
            "next_position": result.next_position,
            "timings": result.timings,
            "kv_bytes": result.kv_bytes,
            "kept": result.keep.tolist(),
        })
    return {
        "image": args.image,
        "expression": args.expression,
        "weights": str(args.weights),
        "device": str(query.model.device),
        "dtype": str(query.model.dtype).removeprefix("torch."),
        "prune": args.prune,
        "keep": query.keep,
        "seed": args.seed,
        "true_box": query.truth,
        "runs": runs,
        "picture": str(args.out),
    }


def print_table(document: dict, box_pattern: re.Pattern[str]) -> None:
    """A line for each mode, and what all have in common."""
    runs = document["runs"]
    width = max(8, *(len(run["mode"]) for run in runs))
    print(f"{'mode':{width}} tokens  {'position IDs':12} {'box (pixels)':22} IoU with full "
          f"prefill  decode  KV MB  words")
    for run in runs:
        box = in_pixels(run["box"]) if run["box"] else "-"
        match = "" if run["iou_with_full"] is None else f"{run['iou_with_full']:.2f}"
        first, last = run["position_ids"]
        times = "".join(f"{run['timings'][key]:5.0f} ms" for key in ("prefill_ms", "decode_ms"))
        numbers = (f"{run['mode']:{width}} {run['visual_tokens']:6g}  {f'{first}..{last}':12} "
                   f"{box:22} {match:>13}{times} {run['kv_bytes'] / 2 ** 20:6.1f}  ")
        print((numbers + words(visible(run["text"]), box_pattern)).rstrip())
    vision = runs[0]["timings"]["vision_ms"]
    print(f"The image was encoded once ({vision:.0f} ms).  "
          "IoU is with the box of the full run, which may be wrong itself.")


def in_pixels(box: Sequence[float]) -> str:
    """A box in whole pixels."""
    return ", ".join(f"{v:.0f}" for v in box)


def words(text: str, box_pattern: re.Pattern[str]) -> str:
    """What the model said, cut to the column's width; a box in it stays whole."""
    box = box_pattern.search(text)
    if box is None or columns(text) <= WORDS:
        return shortened(text, WORDS, columns)
    before = shortened(text[:box.start()], max(3, WORDS - 4 - columns(box[0])), columns)
    return f"{before} {box[0]}" + ("..." if text[box.end():] else "")


def print_notes(query: Asked, results: dict[str, Answered]) -> None:
    """What the table does not show: the true box, cuts in the decoder, answers without an end."""
    if query.truth is not None:
        with_truth = [f"{mode} {iou(result.box, query.truth) if result.box else 0:.2f}"
                      for mode, result in results.items()]
        print(f"The picture is a drawn scene, so the true box is known: {in_pixels(query.truth)}; "
              f"IoU with it: {', '.join(with_truth)}.")
    cut = next((result for result in results.values() if result.cuts), None)
    if cut is not None:
        layers = len(query.model.language_model.model.layers)
        print(cuts_in_words(query.prune, cut.cuts, layers) + ".")
    for mode, result in results.items():
        if result.cut_off:
            print(f"{mode}: the answer was cut off before its end, at {len(result.tokens)} tokens; "
                  "give it more room with --max-new-tokens.")


# ----- the command --------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Answer one command line."""
    args.weights = folder_of(args.weights) if args.weights else default_weights()
    query = load(args)
    results = ask(args, query)
    show(args, query, results)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2 after a mistake of the user's."""
    return answer_for("run.py", lambda arguments: run(parse(arguments)), argv)


if __name__ == "__main__":
    sys.exit(main())
