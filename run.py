"""Ask where something is: with all visual tokens, with pruned ones, and with pruned ones under GAP.

    python run.py image.jpg "the man on the left"

In:  an image and a referring expression.  Out: a table, and one picture of all the boxes.
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))   # no traceback from an import

import argparse
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nanogap
from nanogap import NanogapError
from nanogap.checks.command import (
    ListStrategies,
    Parser,
    add_model_arguments,
    answer_for,
    keep_argument,
    path_argument,
    tell,
)
from nanogap.checks.loading import default_weights, folder_of
from nanogap.checks.output import check_picture, save_picture
from nanogap.gap import MODES
from nanogap.image import open_image
from nanogap.methods import find
from nanogap.methods.in_decoder import prunes_there
from nanogap.prune import STRATEGIES, budget_of
from nanogap.show.draw import draw_results
from nanogap.show.explain import explain
from nanogap.show.table import print_heading, print_notes, print_table, report


def run(argv: Sequence[str] | None) -> None:
    """Answer one command line."""
    args = parse(argv)
    if not args.expression.strip():
        raise NanogapError('the expression is empty; name a thing, such as "the man on the left"')
    picture = open_image(args.image)                # mistakes that need no model are found first
    check_picture("--out", args.out, args.image)
    prune = find(args.prune)
    device = None if args.device == "auto" else args.device
    dtype = None if args.dtype == "auto" else args.dtype
    with patience(f"loading {args.weights}"):
        model = nanogap.load(args.weights, device, dtype, args.clip, args.pack)
    with patience("looking at the image"):
        image = model.encode_image(picture)
        keep = budget_of(args.keep, image.n_patches, prune)
        if set(args.mode) != {"full"} and not prunes_there(prune):   # what it needs to see is kept
            model.select(image, args.expression, prune, keep, args.seed)
    with patience("warming up"):     # or the first mode would pay for what the others reuse
        mode = "gap" if model.device.type == "cpu" else "full"     # CUDA loads kernels by shape
        model.ground(image, "warm up", "random", 1, mode, max_new_tokens=8)
    results = {}
    for mode in dict.fromkeys(args.mode):
        with patience(f"answering in mode {mode}"):
            results[mode] = model.ground(image, args.expression, args.prune, keep, mode, args.seed,
                                         max_new_tokens=args.max_new_tokens, drafts=args.drafts)
    document = report(args, model, keep, results)
    drawn = draw_results(picture, results, document["true_box"], "/".join(args.weights.parts[-2:]))
    save_picture("--out", args.out, drawn)
    if args.json:
        print(json.dumps(document))
        return
    print_heading(document)
    if args.explain:
        explain(model, image, args.expression, results)
    print_table(document)
    print_notes(model, results)
    print(f"picture: {args.out}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, each checked by itself."""
    parser = Parser(prog="python run.py", description=(__doc__ or "").split("\n")[0],
                    epilog="Other commands, each with --help: python -m nanogap.evaluate, .train, "
                           ".train.scenes, .convert, .bench, .show.figures")
    add = parser.add_argument
    add("image", metavar="IMAGE", help="any picture that Pillow reads")
    add("expression", metavar="EXPRESSION", help='what to look for, such as "the man on the left"')
    add("--weights", metavar="DIR", type=path_argument,
        help="a folder, or mini, mini-next, mini-shikra or mini-minigpt, which ship (default: "
             "weights/llava-1.5-7b-hf where that is present, else mini)")
    add("--prune", metavar="NAME", default="random", action=ListStrategies,
        help=f"{', '.join(STRATEGIES)}, with settings as in \"vispruner(ratio=0.75)\"; "
             "FILE.py:NAME: your own; list: what each does (default: %(default)s)")
    add("--keep", metavar="N", type=keep_argument, default="50%",
        help="visual tokens to keep: 64, or 25%%, or auto where the strategy can tell "
             "(default: 50%%)")
    add("--mode", nargs="+", choices=MODES, default=["full", "shifted", "gap"], metavar="MODE",
        help="full: nothing pruned; shifted, permuted: kept tokens renumbered, in raster order or "
             "by score; gap: their own position IDs; or, in quotes, a mix of these: "
             f"{'; '.join(mode for mode in MODES if ',' in mode)} (default: full shifted gap)")
    add("--no-draft", dest="drafts", action="store_false",
        help="one token in each pass of the decoder: the same words, later")
    add_model_arguments(parser)
    add("--out", metavar="PICTURE", type=path_argument, default=Path("answer.png"),
        help="a .png or .jpg to write (default: %(default)s)")
    add("--json", action="store_true",
        help="print one JSON document instead of the table: boxes in pixels, times in ms")
    add("--explain", action="store_true", help="print every shape and every ID on the way")
    args = parser.parse_args(argv)
    args.weights = folder_of(args.weights) if args.weights else default_weights()
    return args


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


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2 after a mistake of the user's."""
    return answer_for("run.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
