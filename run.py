"""Ask where something is: with all visual tokens, with pruned ones, and with pruned ones under GAP.

    python run.py image.jpg "the man on the left"

In:  an image and a referring expression.  Out: a table, and one picture of all the boxes.
"""

import gc
import os
import signal

if __name__ == "__main__":
    gc.disable()                             # until all is imported: see answer_for
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))   # no traceback from an import

import argparse
import json
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
    whole_number,
)
from nanogap.checks.loading import MINI, default_weights, folder_of
from nanogap.checks.output import check_picture, save_picture
from nanogap.fast.answered import Answered
from nanogap.gap import MODES
from nanogap.ground import MAX_NEW_TOKENS
from nanogap.image import Box, open_image
from nanogap.llava import EncodedImage
from nanogap.methods import find
from nanogap.methods.in_decoder import prunes_there
from nanogap.models import VLM
from nanogap.prune import STRATEGIES, budget_of
from nanogap.show.draw import agreement, draw_results
from nanogap.show.explain import explain
from nanogap.show.table import print_notes, print_table
from nanogap.train.scenes import scene_of, words_never_taught
from nanogap.weights import DTYPES

# ----- what was asked -----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, each checked by itself."""
    parser = Parser(prog="python run.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("image", metavar="IMAGE", help="any picture that Pillow reads")
    add("expression", metavar="EXPRESSION", help='what to look for, such as "the man on the left"')
    add("--weights", metavar="DIR", type=path_argument,
        help="a folder, or mini, mini-next, mini-shikra or mini-minigpt, which ship (default: "
             "weights/llava-1.5-7b-hf where that is present, else mini)")
    add("--prune", metavar="NAME", default="random", action=ListStrategies,
        help=f"{', '.join(STRATEGIES)}, with settings as in \"fastv(layer=2)\"; FILE.py:NAME for "
             "one of your own; or list, to be told what each does (default: %(default)s)")
    add("--keep", metavar="N", type=keep_argument, default="50%",
        help="visual tokens to keep: a number such as 64, a share such as 25%% or 9.8%%, or auto "
             "where the strategy can tell (default: 50%%)")
    add("--mode", nargs="+", choices=MODES, default=["full", "shifted", "gap"], metavar="MODE",
        help="full: nothing pruned; shifted, permuted: kept tokens renumbered, in raster order or "
             "by score; gap: their own position IDs; or, in quotes, a mix of these: "
             f"{'; '.join(mode for mode in MODES if ',' in mode)} (default: full shifted gap)")
    add("--clip", metavar="DIR", type=path_argument,
        help="folder of the CLIP that the vision tower comes from, for strategies that read the "
             "expression (default: clip_text beside the weights)")
    add("--max-new-tokens", metavar="N", type=count_argument, default=MAX_NEW_TOKENS,
        help="an answer is cut off after so many tokens (default: %(default)s)")
    add("--no-draft", dest="drafts", action="store_false",
        help="one token in each pass of the decoder: the same words, later")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto, cpu, cuda or mps (default: auto, which is cuda where there is one)")
    add("--dtype", choices=["auto", *DTYPES], default="auto",
        help=f"of the weights: auto or {', '.join(DTYPES)} (default: auto, the checkpoint's on a "
             "GPU, float32 on a CPU, bfloat16 there for large models)")
    add("--no-pack", dest="pack", action="store_false",
        help="on a CPU: half the memory for weights, and slower")
    add("--seed", metavar="N", type=whole_number, default=0,
        help="a whole number, for strategies that draw lots (default: %(default)s)")
    add("--out", metavar="PICTURE", type=path_argument, default=Path("answer.png"),
        help="a .png or .jpg to write (default: %(default)s)")
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
    return Asked(model, image, encoded, prune, keep)


# ----- ask ----------------------------------------------------------------------------------------


def ask(args: argparse.Namespace, query: Asked) -> dict[str, Answered]:
    """The answer in each mode, in the order in which these were given."""
    with patience("warming up"):     # or the first mode would pay for what the others reuse
        if query.model.device.type == "cpu":
            query.model.ground(query.encoded, "warm up", "random", 1, "gap", max_new_tokens=1)
        else:                                          # kernels are loaded by shape
            query.model.ground(query.encoded, "warm up", mode="full", max_new_tokens=8)
    results = {}
    for mode in dict.fromkeys(args.mode):
        with patience(f"answering in mode {mode}"):
            results[mode] = query.model.ground(
                query.encoded, args.expression, query.prune, query.keep, mode, args.seed,
                max_new_tokens=args.max_new_tokens, drafts=args.drafts)
    return results


# ----- show ---------------------------------------------------------------------------------------


def true_box(args: argparse.Namespace) -> Box | None:
    """In pixels, where the picture is a drawn scene and the expression one of its own."""
    drawn = scene_of(args.image)
    told = dict(drawn.expressions).get(" ".join(args.expression.split())) if drawn else None
    return None if drawn is None or told is None else drawn.things[told].box


def show(args: argparse.Namespace, query: Asked, results: dict[str, Answered]) -> None:
    """Save the picture, and print the table or the document."""
    document = report(args, query, results)
    cells = query.model.cells(query.encoded)
    picture = draw_results(query.image, cells, args.expression, query.prune, results,
                           document["true_box"], "/".join(args.weights.parts[-2:]))
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
    print_notes(query.model, results)
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
        "true_box": true_box(args),
        "runs": runs,
        "picture": str(args.out),
    }


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
