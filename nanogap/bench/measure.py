"""What is measured of a model, and what follows from it: the bench's JSON document."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from nanogap.bench.machine import bytes_of, first_use, limits, processor, read_files, timed
from nanogap.bench.peer import generate, inputs_for, load_peer, peer_times
from nanogap.bench.sizes import random_model
from nanogap.checks.loading import load
from nanogap.fast.graph import GraphedDecoder
from nanogap.fast.packed import pack
from nanogap.llama import LlamaConfig, LlamaForCausalLM
from nanogap.methods.in_decoder import prunes_there
from nanogap.models import VLM
from nanogap.prune import budget_of
from nanogap.train.scenes import scene
from nanogap.weights import DTYPES

IMAGE = scene("bench", 0).image
QUESTIONS = [scene("bench", number).expressions[0][0] for number in range(7)]   # as in RefCOCO
EXPRESSION = QUESTIONS[0]
Run = tuple[str, int | None, str]   # strategy, budget, mode
WHOLE: Run = ("random", None, "full")
BOUGHT = ("vision_ms", "prefill_ms", "first_token_ms", "pass_ms", "box_ms", "kv_bytes")
COMPARED = ("vision_ms", "first_token_ms", "pass_ms", "box_ms", "drafted_box_ms")


def prefill_flop(c: LlamaConfig, T: int) -> int:
    """Additions and multiplications that it takes to read T tokens and give the last one's logits.

    In the last layer the other tokens need only keys and values.  Under the causal mask T tokens
    look at T (T + 1) / 2 rows; each look is two products of D numbers in each head.
    """
    layers, heads = c.num_hidden_layers, c.num_attention_heads * c.head_dim
    kv = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim               # weights of a layer
    others = 2 * c.hidden_size * heads + 3 * c.hidden_size * c.intermediate_size
    products = kv * T * layers + others * (T * (layers - 1) + 1) + c.hidden_size * c.vocab_size
    looks = T * (T + 1) // 2 * (layers - 1) + T
    return 2 * products + 4 * heads * looks


def decoder_bytes(c: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights that a pass over one token reads: all but the embeddings."""
    with torch.device("meta"):
        decoder = LlamaForCausalLM(c)
    numbers = sum(p.numel() for p in decoder.parameters())
    return dtype.itemsize * (numbers - decoder.model.embed_tokens.weight.numel())


def our_times(model: VLM, run: Run, new: int) -> dict:
    """One question without drafts and once more with them: milliseconds, tokens and bytes."""
    ask = partial(model.ground, IMAGE, EXPRESSION, *run, max_new_tokens=new)
    result, box_ms = timed(model.device, partial(ask, drafts=False))
    drafted, drafted_box_ms = timed(model.device, ask)
    took = result.timings
    return {"vision_ms": took["vision_ms"], "prefill_ms": took["prefill_ms"],
            "first_token_ms": took["vision_ms"] + took["prefill_ms"],
            "pass_ms": took["decode_ms"] / took["passes"], "box_ms": box_ms,
            "drafted_box_ms": drafted_box_ms, "drafted_passes": drafted.timings["passes"],
            "visual_tokens": result.visual_tokens, "kv_bytes": result.kv_bytes}


def many_times(model: VLM, run: Run, new: int) -> dict:
    """Several questions about one picture, which is encoded before: answers a second."""
    image = model.encode_image(IMAGE)
    _, one_by_one_ms = timed(model.device, lambda: [
        model.ground(image, question, *run, max_new_tokens=new) for question in QUESTIONS])
    _, ground_all_ms = timed(model.device, lambda: model.ground_all(
        image, QUESTIONS, *run, max_new_tokens=new))
    return {"one_by_one_per_s": 1000 * len(QUESTIONS) / one_by_one_ms,
            "ground_all_per_s": 1000 * len(QUESTIONS) / ground_all_ms}


def rounds(todo: Sequence[Callable[[], dict]], number: int) -> list[dict]:
    """Do each of a list in turns; the medians of what each returns."""
    took = [[one() for one in todo] for _ in range(number)]
    return [{key: median(row[key] for row in rows) for key in rows[0]}
            for rows in zip(*took, strict=True)]


def derive(run: Run, row: dict, full: dict, theirs: dict | None, model: VLM, rates: dict) -> dict:
    """A run's medians and what follows from them; above a ratio of 1 this run is the faster."""
    prune, _, mode = run
    T = round(len(model.prompt(EXPRESSION)) - 1 + row["visual_tokens"])
    tflop_s = prefill_flop(model.config.text, T) / row["prefill_ms"] / 1e9
    read = decoder_bytes(model.config.text, model.dtype) + row["kv_bytes"]
    gb_s = read / row["pass_ms"] / 1e6
    derived = {"prompt_tokens": T, "prefill_tflop_s": tflop_s, "decode_gb_s": gb_s,
               "prefill_share": tflop_s / rates["matmul_tflop_s"],
               "decode_share": gb_s / rates["copy_gb_s"],
               "full_over_this": {key: full[key] / row[key] for key in BOUGHT}}
    if theirs:
        derived["theirs_over_this"] = {key: theirs[key.removeprefix("drafted_")] / row[key]
                                       for key in COMPARED}
    return {"prune": "none" if mode == "full" else prune, **row, **derived}


def get_model(args: argparse.Namespace, folder: Path | None,
              device: torch.device) -> tuple[VLM, int]:
    """The model that was asked for, with an end token that it never says; its weights' bytes."""
    dtype = DTYPES.get(args.dtype)
    if folder:
        model = load(folder, device, dtype, pack=False)
    else:
        model = random_model(args.random, device, dtype)
    size = bytes_of(model)
    if not args.no_pack:
        pack(model)
    model.config = replace(model.config, eos_token=-1, other_ends=())
    if args.graph:
        model.next_pass = GraphedDecoder(model.language_model.model)
    return model, size


def runs_asked(args: argparse.Namespace, model: VLM) -> list[Run]:
    """A run with all tokens first, then one for each budget."""
    image = model.encode_image(IMAGE)
    most = image.n_visual if prunes_there(args.prune) else image.n_patches
    return [WHOLE, *((args.prune, budget_of(keep, most, args.prune), "gap") for keep in args.keep)]


def get_peer(folder: Path, model: VLM, new: int) -> tuple[Callable[[], dict], dict]:
    """transformers' model of the same weights: what times it, and the facts of its first use."""
    theirs, facts = first_use(lambda: load_peer(folder, model.device, model.dtype),
                              lambda theirs: peer_times(theirs, model, IMAGE, EXPRESSION, new),
                              model.device)
    ours = model.ground(IMAGE, EXPRESSION, mode="full", max_new_tokens=new).tokens
    same = ours == generate(theirs, new, inputs_for(model, IMAGE, EXPRESSION))
    facts |= {"library": f"transformers {version('transformers')}", "same_tokens": same}
    return partial(peer_times, theirs, model, IMAGE, EXPRESSION, new), facts


def measure(args: argparse.Namespace, folder: Path | None, device: torch.device) -> dict:
    """The JSON document."""
    our_times(random_model("tiny", device, torch.float32), WHOLE, 2)   # libraries start up
    read_s = read_files(folder) if folder else None
    model, ours = first_use(
        lambda: get_model(args, folder, device),
        lambda model: [our_times(model, run, args.new) for run in runs_asked(args, model)], device)
    runs = runs_asked(args, model)
    todo = [partial(our_times, model, run, args.new) for run in runs]
    todo.append(partial(many_times, model, runs[-1], args.new))
    theirs = None
    if args.against and folder:
        time_theirs, theirs = get_peer(folder, model, args.new)
        medians = rounds([*todo, time_theirs], args.rounds)
        theirs |= medians.pop()
    else:
        medians = rounds(todo, args.rounds)
    rates = limits(device, model.dtype)
    for facts in filter(None, (ours, theirs)):
        facts["load_over_read"] = facts["load_s"] / read_s if read_s else None
    prune, keep, _ = runs[-1]
    questions = {"number": len(QUESTIONS), "prune": prune, "keep": keep, **medians.pop()}
    return {"weights": str(folder or f"random {args.random}"), "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            "parameters": ours["weight_bytes"] // model.dtype.itemsize, "new_tokens": args.new,
            "rounds": args.rounds, "graph": args.graph, "packed": not args.no_pack,
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None, **rates,
            "processor": processor(), "read_s": read_s, "ours": ours, "theirs": theirs,
            "runs": [derive(run, row, medians[0], theirs, model, rates)
                     for run, row in zip(runs, medians, strict=True)], "questions": questions}
