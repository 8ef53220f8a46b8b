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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nanogap import methods
from nanogap.bench.machine import first_use, limits, processor, read_files
from nanogap.bench.peer import (
    agree,
    generate,
    load_peer,
    peer_times,
    prompt,
    seen,
    their_class,
    their_library,
)
from nanogap.bench.sizes import SIZES, count_parameters, random_model, save_random
from nanogap.checks.command import Parser, answer_for, keep_argument, path_argument, whole_number
from nanogap.checks.loading import check_place, default_weights, folder_of, load
from nanogap.errors import NanogapError
from nanogap.fast.graph import GraphedDecoder
from nanogap.fast.packed import pack
from nanogap.llama import LlamaConfig
from nanogap.llava import clock_ms
from nanogap.methods.in_decoder import prunes_there
from nanogap.models import VLM
from nanogap.prune import STRATEGIES, budget_of
from nanogap.train.scenes import scene
from nanogap.weights import DTYPES

SCENE = scene("bench", 0)
IMAGE = SCENE.image
EXPRESSION = SCENE.expressions[0][0]
QUESTIONS = [expression for number in range(7)                # RefCOCO has 7 to a picture
             for expression, _ in scene("bench", number).expressions[:1]]
Run = tuple[str, int | None, str]   # strategy, budget, mode
WHOLE: Run = ("random", None, "full")
BOUGHT = ("vision_ms", "prefill_ms", "first_token_ms", "pass_ms", "box_ms", "kv_bytes")
COMPARED = ("vision_ms", "first_token_ms", "pass_ms", "box_ms", "drafted_box_ms")


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
    check_arguments(args)
    args.prune = methods.find(args.prune)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not go together."""
    if args.random and args.weights or args.save and not args.random:
        raise NanogapError("give --weights DIR, or --random SIZE, and --save DIR only with the "
                           "latter")
    if args.random and not args.save and (args.against or args.agree):
        raise NanogapError("transformers reads weights from a folder: add --save DIR")
    if args.against or args.agree:
        their_library()
    if args.new < 2 or args.rounds < 1:
        raise NanogapError("nothing would be measured: give --new 2 and --rounds 1 at least")


# ----- what a model must do -----------------------------------------------------------------------


def prefill_flop(config: LlamaConfig, T: int) -> int:
    """Additions and multiplications that it takes to read T tokens and give the last one's logits.

    In the last layer the other tokens need only keys and values.  Under the causal mask T tokens
    look at T (T + 1) / 2 rows; each look is two products of D numbers in each head.
    """
    c = config
    layers = c.num_hidden_layers
    heads = c.num_attention_heads * c.head_dim
    kv_weights = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    other_weights = 2 * c.hidden_size * heads + 3 * c.hidden_size * c.intermediate_size
    head_weights = c.hidden_size * c.vocab_size
    products = kv_weights * T * layers + other_weights * (T * (layers - 1) + 1) + head_weights
    looks = T * (T + 1) // 2 * (layers - 1) + T
    return 2 * products + 4 * heads * looks


def decoder_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights that a pass over one token reads: all but the embeddings."""
    c, heads = config, config.num_attention_heads + config.num_key_value_heads
    layer = 2 * c.hidden_size * heads * c.head_dim + 3 * c.hidden_size * c.intermediate_size
    matrices = layer * c.num_hidden_layers + c.hidden_size * c.vocab_size
    return dtype.itemsize * (matrices + (2 * c.num_hidden_layers + 1) * c.hidden_size)


# ----- measuring ----------------------------------------------------------------------------------


def our_times(model: VLM, run: Run, new: int) -> dict:
    """One question without drafts and once more with them: milliseconds, tokens and bytes."""
    prune, keep, mode = run
    start = clock_ms(model.device)
    result = model.ground(IMAGE, EXPRESSION, prune, keep, mode, max_new_tokens=new, drafts=False)
    between = clock_ms(model.device)
    drafted = model.ground(IMAGE, EXPRESSION, prune, keep, mode, max_new_tokens=new)
    end = clock_ms(model.device)
    took = result.timings
    return {"vision_ms": took["vision_ms"], "prefill_ms": took["prefill_ms"],
            "first_token_ms": took["vision_ms"] + took["prefill_ms"],
            "pass_ms": took["decode_ms"] / took["passes"], "box_ms": between - start,
            "drafted_box_ms": end - between, "drafted_passes": drafted.timings["passes"],
            "visual_tokens": result.visual_tokens, "kv_bytes": result.kv_bytes}


def many_times(model: VLM, run: Run, new: int) -> dict:
    """Several questions about one picture, which is encoded before: answers a second."""
    prune, keep, mode = run
    image = model.encode_image(IMAGE)
    start = clock_ms(model.device)
    for expression in QUESTIONS:
        model.ground(image, expression, prune, keep, mode, max_new_tokens=new)
    between = clock_ms(model.device)
    model.ground_all(image, QUESTIONS, prune, keep, mode, max_new_tokens=new)
    end = clock_ms(model.device)
    return {"one_by_one_per_s": 1000 * len(QUESTIONS) / (between - start),
            "ground_all_per_s": 1000 * len(QUESTIONS) / (end - between)}


def rounds(todo: Sequence[Callable[[], dict]], number: int) -> list[dict]:
    """Do each of a list in turns; the medians of what each returns."""
    took = [[one() for one in todo] for _ in range(number)]
    medians = []
    for rows in zip(*took, strict=True):
        medians.append({key: median(row[key] for row in rows) for key in rows[0]})
    return medians


def derive(row: dict, full: dict, theirs: dict | None, model: VLM, rates: dict) -> dict:
    """Add to a run's medians what follows from them; above a ratio of 1 this run is the faster."""
    T = round(len(model.prompt(EXPRESSION)) - 1 + row["visual_tokens"])
    tflop_s = prefill_flop(model.config.text, T) / row["prefill_ms"] / 1e9
    read = decoder_bytes(model.config.text, model.dtype) + row["kv_bytes"]
    gb_s = read / row["pass_ms"] / 1e6
    row |= {"prompt_tokens": T, "prefill_tflop_s": tflop_s, "decode_gb_s": gb_s,
            "prefill_share": tflop_s / rates["matmul_tflop_s"],
            "decode_share": gb_s / rates["copy_gb_s"],
            "full_over_this": {key: full[key] / row[key] for key in BOUGHT}}
    if theirs:
        row["theirs_over_this"] = {key: theirs[key.removeprefix("drafted_")] / row[key]
                                   for key in COMPARED}
    return row


def get_model(args: argparse.Namespace, folder: Path | None, device: torch.device,
              dtype_name: str | None) -> tuple[VLM, int]:
    """The model that was asked for, with an end token that it never says; its weights' bytes."""
    if folder:
        model = load(folder, device, dtype_name, pack=False)
    else:
        small = device.type == "cpu" and count_parameters(args.random) <= 2e9
        dtype = DTYPES[dtype_name or ("float32" if small else "bfloat16")]
        model = random_model(args.random, device, dtype)
    size = sum(p.nbytes for p in model.parameters())
    if not args.no_pack:
        pack(model)
    model.config = replace(model.config, eos_token=-1, other_ends=())
    if args.graph:
        model.next_pass = GraphedDecoder(model.language_model)
    return model, size


def runs_asked(args: argparse.Namespace, model: VLM) -> list[Run]:
    """A run with all tokens first, then one for each budget."""
    image = model.encode_image(IMAGE)
    most = image.n_visual if prunes_there(args.prune) else image.n_patches
    return [WHOLE, *((args.prune, budget_of(keep, most, args.prune), "gap") for keep in args.keep)]


def get_peer(args: argparse.Namespace, folder: Path, model: VLM) -> tuple[Any, dict]:
    """transformers' model of the same weights, and the facts of its first use."""
    def get() -> tuple[Any, int]:
        peer = load_peer(folder, model.device, model.dtype)
        return peer, sum(p.nbytes for p in peer.parameters())

    peer, facts = first_use(
        get,
        lambda peer: peer_times(peer, model, IMAGE, EXPRESSION, args.new), model.device)
    said = model.ground(IMAGE, EXPRESSION, mode="full", max_new_tokens=args.new).tokens
    ids = prompt(model, EXPRESSION, model.encode_image(IMAGE).n_visual)
    theirs = generate(peer, ids, seen(model, IMAGE), args.new)
    return peer, facts | {"library": f"transformers {version('transformers')}",
                          "same_tokens": said == theirs}


def measure(args: argparse.Namespace, folder: Path | None, device: torch.device,
            dtype_name: str | None) -> dict:
    """The JSON document."""
    our_times(random_model("tiny", device, torch.float32), WHOLE, 2)   # libraries start up
    read_s = read_files(folder) if folder else None
    model, ours = first_use(
        lambda: get_model(args, folder, device, dtype_name),
        lambda model: [our_times(model, run, args.new) for run in runs_asked(args, model)], device)
    runs = runs_asked(args, model)
    todo = [partial(our_times, model, run, args.new) for run in runs]
    theirs = None
    todo.append(partial(many_times, model, runs[-1], args.new))
    if args.against and folder:
        peer, theirs = get_peer(args, folder, model)
        todo.append(partial(peer_times, peer, model, IMAGE, EXPRESSION, args.new))
    rows = rounds(todo, args.rounds)
    rates = limits(device, model.dtype)
    if theirs:
        theirs |= rows.pop()
    questions = {"number": len(QUESTIONS), "prune": runs[-1][0], "keep": runs[-1][1],
                 **rows.pop()}
    for facts in filter(None, (ours, theirs)):
        facts["load_over_read"] = facts["load_s"] / read_s if read_s else None
    full = dict(rows[0])
    names = ["none"] + [prune for prune, _, _ in runs[1:]]
    rows = [{"prune": name} | derive(row, full, theirs, model, rates)
            for name, row in zip(names, rows, strict=True)]
    return {"weights": str(folder or f"random {args.random}"), "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            "parameters": ours["weight_bytes"] // model.dtype.itemsize, "new_tokens": args.new,
            "rounds": args.rounds, "graph": args.graph, "packed": not args.no_pack,
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None, **rates,
            "processor": processor(), "read_s": read_s, "ours": ours, "theirs": theirs,
            "runs": rows, "questions": questions}


# ----- what is printed ----------------------------------------------------------------------------


def print_table(d: dict) -> None:
    """Print the document as a table for people, and sum up what pruning saves."""
    dtype = d["dtype"] + ", packed" * d["packed"]
    print(f"{d['weights']} on {d['gpu'] or d['processor']}, {dtype}, {d['threads']} threads, "
          f"{d['parameters'] / 1e6:.0f} million parameters, {d['new_tokens']} new tokens; "
          f"medians of {d['rounds']} rounds")
    print(f"the limits here: {d['copy_gb_s']:.3g} GB/s copied, "
          f"{d['matmul_tflop_s']:.3g} TFLOP/s in products")
    print(f"{'milliseconds':14} {'tokens':>6} {'vision':>7} {'prefill':>8} {'1st token':>9} "
          f"{'a pass':>7} {'to box':>8} {'with drafts':>12} {'KV MB':>6} {'prefill TFLOP/s':>15} "
          f"{'pass GB/s':>12}")
    for row in d["runs"]:
        print(f"{times(row, row['prune'], row['visual_tokens'])} {row['drafted_box_ms']:8.1f} "
              f"{row['drafted_passes']:3.0f} {row['kv_bytes'] / 2 ** 20:6.1f} "
              f"{row['prefill_tflop_s']:9.3g} {row['prefill_share']:5.0%} "
              f"{row['decode_gb_s']:6.3g} {row['decode_share']:5.0%}")
    print_questions(d["questions"])
    if d["theirs"]:
        print_comparison(d)
    for who in ("ours", "theirs"):
        if d[who]:
            print_first_use(who, d[who])
    print_summary(min(d["runs"], key=lambda row: row["visual_tokens"]))


def times(row: dict, name: str, tokens: float) -> str:
    """The columns that both sides have."""
    return (f"{name:14} {tokens:6g} {row['vision_ms']:7.1f} {row['prefill_ms']:8.1f} "
            f"{row['first_token_ms']:9.1f} {row['pass_ms']:7.2f} {row['box_ms']:8.1f}")


def print_questions(d: dict) -> None:
    """Print what it brings to ask several questions together."""
    alone, together = d["one_by_one_per_s"], d["ground_all_per_s"]
    print(f"ground_all, {d['number']} questions about one picture, {d['prune']} {d['keep']}: "
          f"{together:.3g} answers a second, one by one {alone:.3g}; "
          f"{together / alone:.2f} times faster")


def print_comparison(d: dict) -> None:
    """Print the peer's times, and how many times faster each run is."""
    print(times(d["theirs"], "transformers", d["runs"][0]["visual_tokens"]))
    print("times faster than transformers, which sees all tokens:")
    for row in d["runs"]:
        ratios = row["theirs_over_this"]
        print(f"{row['prune']:14} {row['visual_tokens']:6g} {ratios['vision_ms']:7.2f} {'':8} "
              f"{ratios['first_token_ms']:9.2f} {ratios['pass_ms']:7.2f} {ratios['box_ms']:8.2f} "
              f"{ratios['drafted_box_ms']:8.2f}")


def print_first_use(who: str, facts: dict) -> None:
    """Print how long a model took to load, and how much memory to use."""
    over = ""
    if facts["load_over_read"] is not None:
        over = f", {facts['load_over_read']:.2f} times as long as to read the bytes"
    print(f"{who}: loaded in {facts['load_s']:.2f} s{over}; peak memory "
          f"{facts['peak_over_weights']:.2f} of the weights' {facts['weight_bytes'] / 1e6:.0f} MB")


def print_summary(row: dict) -> None:
    """Print in two sentences what pruning saves in the run with the fewest tokens."""
    saved = row["full_over_this"]
    print(f"Pruning to {row['visual_tokens']:g} tokens makes prefill {saved['prefill_ms']:.1f} "
          f"times faster and the cache {saved['kv_bytes']:.1f} times smaller.\n"
          f"It does little for the vision tower ({saved['vision_ms']:.2f}), which sees all "
          f"patches, and for a pass of the decoder ({saved['pass_ms']:.2f}), which reads all "
          "weights.")


# ----- the command --------------------------------------------------------------------------------


@torch.no_grad()
def command(argv: Sequence[str] | None) -> None:
    """Measure, or compare the answers, and print."""
    args = parse(argv)
    name = None if args.device == "auto" else args.device
    dtype_name = None if args.dtype == "auto" else args.dtype
    check_place(name, dtype_name)
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.save:
        dtype = DTYPES.get(args.dtype, torch.bfloat16)
        save_random(args.random, args.save, device, dtype)
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
