"""Speed and memory: what pruning buys, what it does not, and how far the machine's limits are.

    python -m nanogap.bench --weights weights/mini
    python -m nanogap.bench --random 350m --save /tmp/350m --against transformers
    python -m nanogap.bench --weights /tmp/350m --agree

In:  weights, or a size to draw random ones in (sizes.py).  Out: a table, and one JSON document on the
last line.  In each round everything is run once, transformers in between; the first round is left out,
times are medians over the others, and ratios are quotients of those medians.  The end token counts like
any other here, so that every run has the same number of new tokens.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import nn

from nanogap import weights
from nanogap.cli import Parser, answer_for, keep_argument, tokens_to_keep, whole_number
from nanogap.cli import NanogapError
from nanogap.bench.graph import GraphedDecoder
from nanogap.llama import LlamaConfig
from nanogap.models.llava import Llava
from nanogap.bench.machine import first_use, limits, read_files
from nanogap.bench.peer import agree, generate, load_peer, peer_times, their_class
from nanogap.prune import STRATEGIES
from nanogap.scenes import scene
from nanogap.bench.sizes import SIZES, count_parameters, random_llava, save_random

SCENE = scene("bench", 0)
IMAGE, EXPRESSION = SCENE.image, SCENE.expressions[0][0]
Run = tuple[str, int | None, str]   # strategy, budget, mode
WHOLE: Run = ("random", None, "full")
BOUGHT = ("vision_ms", "prefill_ms", "first_token_ms", "pass_ms", "box_ms", "kv_bytes")
COMPARED = ("vision_ms", "first_token_ms", "pass_ms", "box_ms", "drafted_box_ms")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as they can be without a model."""
    parser = Parser(prog="python -m nanogap.bench", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, metavar="DIR", help="default: weights/mini")
    add("--random", choices=SIZES, metavar="SIZE",
        help=f"random weights of a size instead: {', '.join(SIZES)}")
    add("--save", type=Path, metavar="DIR", help="write the random weights there first, and load them")
    add("--against", choices=["transformers"], help="run the same there, in turns")
    add("--agree", action="store_true",
        help="no times: is every logit's argmax the one of transformers? loads one after the other")
    add("--prune", choices=STRATEGIES, default="cls_attention", metavar="NAME",
        help=f"{', '.join(STRATEGIES)} (default: %(default)s)")
    add("--keep", nargs="+", type=keep_argument, default=["50%", "25%"], metavar="N|N%|auto",
        help="visual tokens to keep, besides all (default: 50%% 25%%)")
    add("--new", type=whole_number, default=25, help="tokens to generate (default: %(default)s, a box)")
    add("--rounds", type=whole_number, default=5, help="besides the first (default: %(default)s)")
    add("--graph", action="store_true", help="decode by CUDA graphs (graph.py)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *weights.DTYPES], default="auto")
    add("--json", action="store_true", help="print the JSON document alone")
    args = parser.parse_args(argv)
    if args.random and args.weights or args.save and not args.random:
        raise NanogapError("give --weights DIR, or --random SIZE, and --save DIR only with the latter")
    if args.random and not args.save and (args.against or args.agree):
        raise NanogapError("transformers reads weights from a folder: add --save DIR")
    if args.against or args.agree:
        their_class()
    if args.new < 2 or args.rounds < 1:
        raise NanogapError("nothing would be measured: give --new 2 and --rounds 1 at least")
    return args


# ----- what a model must do -----------------------------------------------------------------------


def prefill_flop(config: LlamaConfig, T: int) -> int:
    """Additions and multiplications to read T tokens and give the last one's logits.

    In the last layer only keys and values are wanted of the others.  Under the causal mask T tokens look
    at T (T + 1) / 2 rows; each look is two products of D numbers for each head.
    """
    c = config
    looking = c.num_attention_heads * c.head_dim
    cached = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim           # weights of k and v
    others = 2 * c.hidden_size * looking + 3 * c.hidden_size * c.intermediate_size
    rows = T * (c.num_hidden_layers - 1) + 1
    looks = T * (T + 1) // 2 * (c.num_hidden_layers - 1) + T
    return 2 * (cached * T * c.num_hidden_layers + others * rows + c.hidden_size * c.vocab_size) \
        + 4 * looking * looks


def pass_bytes(model: Llava, kv_bytes: int) -> int:
    """Bytes that a pass over one token reads: the decoder's weights but for the table of embeddings."""
    read = [p.nbytes for name, p in model.language_model.named_parameters() if "embed_tokens" not in name]
    return sum(read) + kv_bytes


# ----- measuring ----------------------------------------------------------------------------------


def our_times(model: Llava, run: Run, new: int) -> dict:
    """One question without drafts and once more with them: milliseconds, and what stays the same."""
    prune, keep, mode = run
    start = model.clock()
    result = model.ground(IMAGE, EXPRESSION, prune, keep, mode, max_new_tokens=new, drafts=False)
    between, took = model.clock(), result.timings
    drafted = model.ground(IMAGE, EXPRESSION, prune, keep, mode, max_new_tokens=new)
    return {"vision_ms": took["vision_ms"], "prefill_ms": took["prefill_ms"],
            "first_token_ms": took["vision_ms"] + took["prefill_ms"],
            "pass_ms": took["decode_ms"] / took["passes"], "box_ms": between - start,
            "drafted_box_ms": model.clock() - between, "drafted_passes": drafted.timings["passes"],
            "visual_tokens": result.visual_tokens, "kv_bytes": result.kv_bytes}


def rounds(model: Llava, peer: nn.Module | None, runs: Sequence[Run], args: argparse.Namespace) -> list[dict]:
    """Medians for each run, and of the peer at the end of the list; all take turns."""
    todo = [lambda run=run: our_times(model, run, args.new) for run in runs]
    if peer:
        todo.append(lambda: peer_times(peer, model, IMAGE, EXPRESSION, args.new))
    took = [[one() for one in todo] for _ in range(args.rounds)]
    return [{key: median(row[key] for row in rows) for key in rows[0]} for rows in zip(*took)]


def derive(row: dict, full: dict, theirs: dict | None, model: Llava, rates: dict) -> dict:
    """Add to a run's medians what follows from them; a ratio above 1 means that it is the faster."""
    c = model.config
    T = round(model.prompt(EXPRESSION).shape[0] - 1 + row["visual_tokens"])
    tflop_s = prefill_flop(c.text, T) / row["prefill_ms"] / 1e9
    gb_s = pass_bytes(model, row["kv_bytes"]) / row["pass_ms"] / 1e6
    row |= {"prompt_tokens": T, "prefill_tflop_s": tflop_s, "decode_gb_s": gb_s,
            "prefill_share": tflop_s / rates["matmul_tflop_s"], "decode_share": gb_s / rates["copy_gb_s"],
            "full_over_this": {key: full[key] / row[key] for key in BOUGHT}}
    if theirs:
        row["theirs_over_this"] = {key: theirs[key.removeprefix("drafted_")] / row[key] for key in COMPARED}
    return row


def get_model(args: argparse.Namespace, folder: Path | None, device: torch.device,
              dtype: str | None) -> Llava:
    """The model that was asked for, which never ends before its last new token."""
    if folder:
        model = weights.load(folder, device, dtype)
    else:
        dtype = weights.pick_dtype(dtype, device, "bfloat16", count_parameters(args.random))
        model = random_llava(args.random, device, dtype)
    model.config = replace(model.config, eos_token=-1)
    model.graphed = GraphedDecoder(model.language_model) if args.graph else None
    return model


def runs_asked(args: argparse.Namespace, model: Llava) -> list[Run]:
    """Everything first, then the budgets."""
    return [WHOLE] + [(args.prune, tokens_to_keep(keep, model.config.vision.grid ** 2), "gap")
                      for keep in args.keep]


def measure(args: argparse.Namespace, folder: Path | None, device: torch.device,
            dtype: str | None) -> dict:
    """The JSON document."""
    our_times(random_llava("tiny", device, torch.float32), WHOLE, 2)          # libraries set themselves up
    read_s = read_files(folder) if folder else None
    model, ours = first_use(lambda: get_model(args, folder, device, dtype), lambda model: [
        our_times(model, run, args.new) for run in runs_asked(args, model)], device)
    peer, theirs = None, None
    if args.against:
        peer, theirs = first_use(lambda: load_peer(folder, device, model.dtype),
                                 lambda peer: peer_times(peer, model, IMAGE, EXPRESSION, args.new), device)
        said = model.ground(IMAGE, EXPRESSION, mode="full", max_new_tokens=args.new).tokens
        theirs |= {"library": f"transformers {version('transformers')}",
                   "same_tokens": said == generate(peer, model, IMAGE, EXPRESSION, args.new)}
    runs = runs_asked(args, model)
    rows, rates = rounds(model, peer, runs, args), limits(device, model.dtype)
    if theirs:
        theirs |= rows.pop()
    for facts in filter(None, (ours, theirs)):
        facts["load_over_read"] = facts["load_s"] / read_s if read_s else None
    rows = [{"prune": "none" if run == WHOLE else run[0]} | derive(row, rows[0], theirs, model, rates)
            for run, row in zip(runs, rows)]
    return {"weights": str(folder or f"random {args.random}"), "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in model.parameters()), "new_tokens": args.new,
            "rounds": args.rounds, "graph": args.graph, "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None, **rates,
            "read_s": read_s, "ours": ours, "theirs": theirs, "runs": rows}


# ----- what is said -------------------------------------------------------------------------------


def print_table(d: dict) -> None:
    """The same for people, and in two sentences what pruning buys."""
    print(f"{d['weights']} on {d['gpu'] or d['device']}, {d['dtype']}, {d['threads']} threads, "
          f"{d['parameters'] / 1e6:.0f} million parameters, {d['new_tokens']} new tokens; "
          f"medians of {d['rounds']} rounds")
    print(f"the limits here: {d['copy_gb_s']:.3g} GB/s copied, {d['matmul_tflop_s']:.3g} TFLOP/s in products")
    print(f"{'milliseconds':14} {'tokens':>6} {'vision':>7} {'prefill':>8} {'1st token':>9} {'a pass':>7} "
          f"{'to box':>8} {'with drafts':>12} {'KV MB':>6} {'prefill TFLOP/s':>15} {'pass GB/s':>12}")
    for r in d["runs"]:
        print(f"{times(r, r['prune'], r['visual_tokens'])} {r['drafted_box_ms']:8.1f} "
              f"{r['drafted_passes']:3.0f} {r['kv_bytes'] / 2 ** 20:6.1f} {r['prefill_tflop_s']:9.3g} "
              f"{r['prefill_share']:5.0%} {r['decode_gb_s']:6.3g} {r['decode_share']:5.0%}")
    if d["theirs"]:
        print(times(d["theirs"], "transformers", d["runs"][0]["visual_tokens"]))
        print("times faster than transformers, which sees all tokens:")
        for r in d["runs"]:
            vision, first, one, box, drafted = r["theirs_over_this"].values()
            print(f"{r['prune']:14} {r['visual_tokens']:6g} {vision:7.2f} {'':8} {first:9.2f} {one:7.2f} "
                  f"{box:8.2f} {drafted:8.2f}")
    for who in filter(None, ("ours", d["theirs"] and "theirs")):
        facts = d[who]
        over = f", {facts['load_over_read']:.2f} times as long as to read the bytes" if d["read_s"] else ""
        print(f"{who}: loaded in {facts['load_s']:.2f} s{over}; peak memory {facts['peak_over_weights']:.2f} "
              f"of the weights' {facts['weight_bytes'] / 1e6:.0f} MB")
    least = min(d["runs"], key=lambda r: r["visual_tokens"])
    buys = least["full_over_this"]
    print(f"Pruning to {least['visual_tokens']:g} tokens makes prefill {buys['prefill_ms']:.1f} times "
          f"faster and the cache {buys['kv_bytes']:.1f} times smaller.\nIt does little for the vision tower "
          f"({buys['vision_ms']:.2f}), which sees all patches, and for a pass of the decoder "
          f"({buys['pass_ms']:.2f}), which reads all weights.")


def times(row: dict, name: str, tokens: float) -> str:
    """The columns that both sides have."""
    return (f"{name:14} {tokens:6g} {row['vision_ms']:7.1f} {row['prefill_ms']:8.1f} "
            f"{row['first_token_ms']:9.1f} {row['pass_ms']:7.2f} {row['box_ms']:8.1f}")


# ----- the command --------------------------------------------------------------------------------


@torch.no_grad()
def command(argv: Sequence[str] | None) -> None:
    """Measure, or compare the answers, and print."""
    args = parse(argv)
    device, dtype = (None if value == "auto" else value for value in (args.device, args.dtype))
    device = weights.pick_device(device)
    if args.save:
        save_random(args.random, args.save, device, weights.DTYPES.get(dtype, torch.bfloat16))
    folder = args.save or args.weights or (None if args.random else Path("weights/mini"))
    document = (agree(folder, device, dtype, IMAGE, EXPRESSION, args.new) if args.agree
                else measure(args, folder, device, dtype))
    if not args.json and not args.agree:
        print_table(document)
    print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.bench", command, None))
