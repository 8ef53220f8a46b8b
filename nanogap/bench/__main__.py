"""Speed and memory: what pruning saves, what it does not, and how near the machine's limits are.

    python -m nanogap.bench --weights weights/mini
    python -m nanogap.bench --random 350m --save /tmp/350m --against transformers
    python -m nanogap.bench --weights /tmp/350m --agree

In:  weights, or a size to draw random ones in (sizes.py).
Out: a table, and one JSON document on the last line.

Every round runs everything once, transformers included; a first round is not counted.  Times are
medians over the rounds, and ratios are quotients of these medians.  Generation does not stop at the
end token, so that every run has the same number of new tokens.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from nanogap import methods
from nanogap.bench.measure import EXPRESSION, IMAGE, measure
from nanogap.bench.peer import agree, their_class, their_library
from nanogap.bench.sizes import SIZES, save_random
from nanogap.bench.table import print_table
from nanogap.checks.command import Parser, answer_for, keep_argument, path_argument, whole_number
from nanogap.checks.loading import check_place, default_weights, folder_of
from nanogap.errors import NanogapError
from nanogap.prune import STRATEGIES
from nanogap.weights import DTYPES


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as they can be without a model."""
    parser = Parser(prog="python -m nanogap.bench", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--weights", type=path_argument, metavar="DIR",
        help="default: the published ones where they are present, else weights/mini")
    add("--random", choices=SIZES, metavar="SIZE",
        help=f"random weights of a size instead: {', '.join(SIZES)}")
    add("--save", type=path_argument, metavar="DIR",
        help="write the random weights there first, and load them")
    add("--against", choices=["transformers"], help="run the same there, in turns")
    add("--agree", action="store_true",
        help="no times: compare the logits with those of transformers, one model after the other")
    add("--prune", default="cls_attention", metavar="NAME",
        help=f"{', '.join(STRATEGIES)}, or FILE.py:NAME (default: %(default)s)")
    add("--keep", nargs="+", type=keep_argument, default=["50%", "25%"], metavar="N|N%|auto",
        help="visual tokens to keep, besides all (default: 50%% 25%%)")
    add("--new", type=whole_number, default=25,
        help="tokens to generate (default: %(default)s, a box)")
    add("--rounds", type=whole_number, default=5,
        help="besides the first (default: %(default)s)")
    add("--graph", action="store_true", help="decode with CUDA graphs (graph.py)")
    add("--no-pack", action="store_true", help="leave matrices as they are on a CPU: slower")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto")
    add("--json", action="store_true", help="print the JSON document alone")
    args = parser.parse_args(argv)
    if args.random and args.weights or args.save and not args.random:
        raise NanogapError("give --weights DIR, or --random SIZE, and --save DIR only with the "
                           "latter")
    if args.against or args.agree:
        if args.random and not args.save:
            raise NanogapError("transformers reads weights from a folder: add --save DIR")
        their_library()
    if args.new < 2 or args.rounds < 1:
        raise NanogapError("nothing would be measured: give --new 2 and --rounds 1 at least")
    args.prune = methods.find(args.prune)
    return args


@torch.no_grad()
def command(argv: Sequence[str] | None) -> None:
    """Measure, or compare the answers, and print."""
    args = parse(argv)
    name = None if args.device == "auto" else args.device
    dtype_name = None if args.dtype == "auto" else args.dtype
    check_place(name, dtype_name)
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.save:
        save_random(args.random, args.save, device, DTYPES.get(args.dtype, torch.bfloat16))
    folder = args.save or args.weights
    if folder is None and not args.random:
        folder = default_weights()
    folder = folder and folder_of(folder)
    if folder and (args.against or args.agree):
        their_class(folder)
    if args.agree:
        print(json.dumps(agree(folder, device, dtype_name, IMAGE, EXPRESSION, args.new)))
        return
    document = measure(args, folder, device, dtype_name)
    if not args.json:
        print_table(document)
    print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.bench", command, None))
