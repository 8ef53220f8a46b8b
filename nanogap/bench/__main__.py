"""Speed and memory: what pruning saves, and what it does not.

    python -m nanogap.bench --weights weights/mini
    python -m nanogap.bench --random 350m --save /tmp/350m --against transformers

Prints a table, and one JSON document on the last line.  Every round runs everything once,
transformers included; a first round is not counted.  Times are medians over the rounds, and ratios
are quotients of these medians.  Generation does not stop at the end token, so that every run has
the same number of new tokens.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial

import torch

from nanogap import methods
from nanogap.bench.measure import measure
from nanogap.bench.sizes import SIZES, save_random
from nanogap.checks.command import (
    ListStrategies,
    Parser,
    answer_for,
    count_argument,
    keep_argument,
    path_argument,
    whole_number,
)
from nanogap.checks.loading import check_place, default_weights, folder_of
from nanogap.errors import NanogapError
from nanogap.prune import STRATEGIES
from nanogap.weights import DTYPES

HEAD = """\
{weights} on {machine}, {dtype}{packed}, {threads} threads, {millions:.0f} million parameters, \
{new_tokens} new tokens; medians of {rounds} rounds
milliseconds   tokens  vision  prefill 1st token  a pass   to box  with drafts  KV MB"""
BOTH = ("{prune:14} {visual_tokens:6g} {vision_ms:7.1f} {prefill_ms:8.1f} {first_token_ms:9.1f} "
        "{pass_ms:7.2f} {box_ms:8.1f}")                    # the columns that both sides have
OURS = BOTH + " {drafted_box_ms:8.1f} {drafted_passes:3.0f} {kv_mb:6.1f}"
RATIOS = ("{prune:14} {visual_tokens:6g} {vision_ms:7.2f}          {first_token_ms:9.2f} "
          "{pass_ms:7.2f} {box_ms:8.2f} {drafted_box_ms:8.2f}")
TOGETHER = ("ground_all, {number} questions about one picture, {prune} {keep:g}: "
            "{ground_all_per_s:.3g} answers a second, one by one {one_by_one_per_s:.3g}; "
            "{faster:.2f} times faster")
FIRST_USE = ("{who}: loaded in {load_s:.2f} s; peak memory {peak_over_weights:.2f} times the "
             "weights' {weights_mb:.0f} MB")
SUMMARY = ("With {visual_tokens:g} visual tokens, times faster than with all: prefill "
           "{prefill_ms:.1f}, the vision tower {vision_ms:.2f}, a pass of the decoder "
           "{pass_ms:.2f}; the cache is {kv_mb:.1f} times smaller.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as they can be without a model."""
    parser = Parser(prog="python -m nanogap.bench", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--weights", type=path_argument, metavar="DIR", dest="folder",
        help="default: the published ones where they are present, else weights/mini")
    add("--random", choices=SIZES, metavar="SIZE",
        help=f"random weights of a size instead: {', '.join(SIZES)}")
    add("--save", type=path_argument, metavar="DIR", help="where to write the random weights first")
    add("--against", choices=["transformers"], help="run the same there, in turns")
    add("--prune", default="cls_attention", action=ListStrategies, metavar="NAME",
        help=f"{', '.join(STRATEGIES)}, or FILE.py:NAME (default: %(default)s)")
    add("--keep", nargs="+", type=keep_argument, default=["50%", "25%"], metavar="N|N%|auto",
        help="visual tokens to keep, besides all (default: 50%% 25%%)")
    add("--new", type=partial(whole_number, least=2), default=25,
        help="tokens to generate (default: %(default)s, a box)")
    add("--rounds", type=count_argument, default=5, help="besides the first (default: %(default)s)")
    add("--graph", action="store_true", help="decode with CUDA graphs (nanogap/fast/graph.py)")
    add("--no-pack", action="store_true", help="leave matrices as they are on a CPU: slower")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto")
    add("--json", action="store_true", help="print the JSON document alone")
    args = parser.parse_args(argv)
    if bool(args.random) != bool(args.save) or args.random and args.folder:
        raise NanogapError("random weights are asked for by --random SIZE --save DIR, and others "
                           "by --weights DIR")
    args.prune = methods.find(args.prune)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    check_place(args.device, None)
    args.device = torch.device(args.device)
    args.dtype = DTYPES.get(args.dtype)
    args.folder = args.save or folder_of(args.folder or default_weights())
    return args


def print_table(d: dict) -> None:
    """Print the document of `nanogap.bench.measure`, and what pruning saves."""
    packed = ", packed" if d["packed"] else ""
    print(HEAD.format_map(d | {"packed": packed, "millions": d["parameters"] / 1e6}))
    for row in d["runs"]:
        print(OURS.format_map(row))
    print(TOGETHER.format_map(d["questions"]))
    if d["theirs"]:
        print(BOTH.format_map(d["runs"][0] | d["theirs"] | {"prune": "transformers"}))
        print("times faster than transformers, which sees all tokens:")
        for row in d["runs"]:
            print(RATIOS.format_map(row | row["theirs_over_this"]))
    for who in ("ours", "theirs"):
        if d[who]:
            print(FIRST_USE.format_map(d[who] | {"who": who}))
    fewest = min(d["runs"], key=lambda row: row["visual_tokens"])
    print(SUMMARY.format_map(fewest | fewest["full_over_this"]))


@torch.no_grad()
def command(argv: Sequence[str] | None) -> None:
    """Measure, and print."""
    args = parse(argv)
    if args.save:
        save_random(args.random, args.save, args.dtype or torch.bfloat16)
    document = measure(args)
    if not args.json:
        print_table(document)
    print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.bench", command, None))
