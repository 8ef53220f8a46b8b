"""Ask where something is: with all visual tokens, with pruned ones, and with pruned ones under GAP.

    python run.py image.jpg "the man on the left"

In:  an image and a referring expression.  Out: a table, and one picture of all the boxes.
"""

import argparse
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nanogap
from nanogap import NanogapError
from nanogap.cli import Parser, answer_for, keep_argument, tokens_to_keep, whole_number
from nanogap.draw import Answer, draw_answers
from nanogap.explain import explain
from nanogap.in_decoder import CUT
from nanogap.gap import MODES
from nanogap.image import iou, open_image
from nanogap.models.llava import Llava, Result
from nanogap.draw import check_picture, save_picture
from nanogap.prune import STRATEGIES, check
from nanogap.weights import DTYPES

ROOT = Path(__file__).resolve().parent
REAL, MINI = ROOT / "weights" / "llava-1.5-7b-hf", ROOT / "weights" / "mini"


# ----- what was asked -----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python run.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("image", metavar="IMAGE", help="any picture that Pillow reads")
    add("expression", metavar="EXPRESSION", help='what to look for, such as "the man on the left"')
    add("--weights", metavar="DIR", type=Path,
        help="default: weights/llava-1.5-7b-hf where that is present, else weights/mini")
    add("--prune", metavar="NAME", default="random", choices=STRATEGIES,
        help=f"{', '.join(STRATEGIES)} (default: %(default)s)")
    add("--keep", metavar="N|N%|auto", type=keep_argument, default="50%",
        help="visual tokens to keep, or auto where the strategy can tell (default: 50%%)")
    add("--mode", nargs="+", choices=MODES, default=["full", "shifted", "gap"], metavar="MODE",
        help="full: nothing pruned; shifted, permuted: kept tokens renumbered; "
             "gap: their own position IDs (default: full shifted gap)")
    add("--layer", metavar="K", type=whole_number, default=CUT,
        help="of fastv: the decoder's layer, from 1 on, before which it prunes (default: %(default)s)")
    add("--clip", metavar="DIR", type=Path,
        help="the CLIP that the vision tower comes from, for strategies that read the expression")
    add("--no-draft", dest="drafts", action="store_false",
        help="one token in each pass of the decoder; the words are the same")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto")
    add("--seed", type=whole_number, default=0,
        help="of the random strategy (default: %(default)s)")
    add("--out", metavar="PICTURE", type=Path, default=Path("answer.png"),
        help="default: %(default)s")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    add("--explain", action="store_true", help="print every shape and every ID on the way")
    return parser.parse_args(argv)


def default_weights() -> Path:
    """The real ones where they are present, else those that ship; relative where that is short."""
    weights = REAL if REAL.is_dir() else MINI
    return weights.relative_to(Path.cwd()) if weights.is_relative_to(Path.cwd()) else weights


# ----- what is said -------------------------------------------------------------------------------


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Say on stderr what is going on, where it takes longer than a second."""
    timer = threading.Timer(1.0, lambda: print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def report(args: argparse.Namespace, model: Llava, keep: int | None, results: dict[str, Result]) -> dict:
    """The JSON document; the table shows the same numbers."""
    full = results.get("full")
    runs = [{"mode": mode, "visual_tokens": r.visual_tokens, "box": r.box and list(r.box),
             "text": r.text,
             "iou_with_full": iou(r.box, full.box) if full and r.box and full.box else None,
             "position_ids": [int(r.position_ids[0]), int(r.position_ids[-1])],
             "next_position": r.next_position, "timings": r.timings, "kv_bytes": r.kv_bytes}
            for mode, r in results.items()]
    return {"image": args.image, "expression": args.expression, "weights": str(args.weights),
            "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."),
            "prune": args.prune, "keep": keep, "runs": runs, "picture": str(args.out)}


def print_table(document: dict) -> None:
    print(f"{'mode':8} {'tokens':>6}  {'position IDs':12} {'box (pixels)':22} {'IoU':>4} "
          f"{'prefill':>7} {'decode':>7} {'KV MB':>6}")
    for run in document["runs"]:
        box = ", ".join(f"{v:.0f}" for v in run["box"]) if run["box"] else "none in the answer"
        match = "" if run["iou_with_full"] is None else f"{run['iou_with_full']:.2f}"
        first, last = run["position_ids"]
        times = "".join(f"{run['timings'][key]:5.0f} ms" for key in ("prefill_ms", "decode_ms"))
        print(f"{run['mode']:8} {run['visual_tokens']:6g}  {f'{first}..{last}':12} {box:22} "
              f"{match:>4}{times} {run['kv_bytes'] / 2 ** 20:6.1f}")
    vision = document["runs"][0]["timings"]["vision_ms"]
    print(f"The image was encoded once ({vision:.0f} ms).  IoU is with the box of the full run.")


def label(run: dict) -> str:
    tokens = f"{run['mode']}, {run['visual_tokens']:g} tokens"
    compared = run["mode"] != "full" and run["iou_with_full"] is not None
    return f"{tokens}, IoU {run['iou_with_full']:.2f}" if compared else tokens


# ----- the command --------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    if not args.expression.strip():
        raise NanogapError('the expression is empty; name a thing, such as "the man on the left"')
    image = open_image(args.image)
    check_picture("--out", args.out, args.image)
    args.weights = args.weights or default_weights()
    asked = [None if value == "auto" else value for value in (args.device, args.dtype)]
    with patience(f"loading {args.weights}"):
        model = nanogap.load(args.weights, *asked, args.clip)
    patches, model.fastv_layer = model.config.vision.grid ** 2, args.layer
    keep = tokens_to_keep(args.keep, patches)
    check(args.prune, patches, keep)
    say = print if not args.json else lambda *_: None
    say(f"{args.weights} on {model.device}, {str(model.dtype).removeprefix('torch.')}")
    if args.weights.resolve() == MINI:
        say("These weights know drawn scenes only; "
            "for photographs see \"Real weights\" in README.md.")
    with patience("looking at the image"):
        look = model.look(image)
    with patience("warming up"):                                              # or the first mode pays
        mode, new = ("gap", 1) if model.device.type == "cpu" else ("full", 8)  # kernels are loaded by shape
        model.ground(look, "warm up", "random", 1, mode, max_new_tokens=new)
    results = {}
    for mode in dict.fromkeys(args.mode):
        with patience(f"answering in mode {mode}"):
            results[mode] = model.ground(look, args.expression, args.prune, keep, mode, args.seed,
                                         drafts=args.drafts)
    document = report(args, model, keep, results)
    kept = min((r.keep.tolist() for r in results.values()), key=len)
    pruned = f"{args.prune} keeps {len(kept)} of {patches} patches"
    pruned = pruned if set(results) != {"full"} else f"all {patches} patches"
    caption = f"\"{' '.join(args.expression.split())}\"\n{pruned}"
    answers = [Answer(r["mode"], label(r), r["box"]) for r in document["runs"]]
    save_picture("--out", args.out, draw_answers(image, kept, look.seen.grid, answers, caption))
    if args.explain and not args.json:
        explain(model, look, args.expression, results)
    if args.json:
        print(json.dumps(document))
    else:
        print_table(document)
        print(f"picture: {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    return answer_for("run.py", lambda arguments: run(parse(arguments)), argv)


if __name__ == "__main__":
    sys.exit(main())
