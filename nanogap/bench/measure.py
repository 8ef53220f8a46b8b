"""What is measured of a model, and the ratios that follow: the bench's JSON document."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from statistics import median

import torch

from nanogap.bench import EXPRESSION, IMAGE, QUESTIONS
from nanogap.bench.machine import bytes_of, first_use, processor, timed
from nanogap.bench.peer import generate, inputs_for, load_peer, peer_times
from nanogap.bench.sizes import random_model
from nanogap.checks.loading import load
from nanogap.fast.graph import GraphedDecoder
from nanogap.fast.packed import pack
from nanogap.methods.in_decoder import prunes_there
from nanogap.models import VLM
from nanogap.prune import budget_of

Run = tuple[str, int | None, str]   # strategy, budget, mode
WHOLE: Run = ("random", None, "full")
BOUGHT = ("vision_ms", "prefill_ms", "first_token_ms", "pass_ms", "box_ms", "kv_bytes")
COMPARED = ("vision_ms", "first_token_ms", "pass_ms", "box_ms", "drafted_box_ms")


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


def get_model(args: argparse.Namespace) -> tuple[VLM, int]:
    """The model that was asked for, with an end token that it never says; its weights' bytes."""
    if args.folder:
        model = load(args.folder, args.device, args.dtype, pack=False)
    else:
        model = random_model(args.random, args.device, args.dtype)
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


def measure(args: argparse.Namespace) -> dict:
    """The JSON document; above a ratio of 1 the run in whose row it stands is the faster."""
    device, new = args.device, args.new
    our_times(random_model("tiny", device, torch.float32), WHOLE, 2)   # libraries start up
    model, ours = first_use(
        lambda: get_model(args),
        lambda model: [our_times(model, run, new) for run in runs_asked(args, model)], device)
    runs = runs_asked(args, model)
    todo = [partial(our_times, model, run, new) for run in runs]
    todo.append(partial(many_times, model, runs[-1], new))
    theirs = None
    if args.against:
        peer, theirs = first_use(lambda: load_peer(args.folder, device, model.dtype),
                                 lambda peer: peer_times(peer, model, new), device)
        said = model.ground(IMAGE, EXPRESSION, mode="full", max_new_tokens=new).tokens
        theirs["library"] = f"transformers {version('transformers')}"
        theirs["same_tokens"] = said == generate(peer, new, inputs_for(model))
        todo.append(partial(peer_times, peer, model, new))
    medians = rounds(todo, args.rounds)
    if theirs:
        theirs |= medians.pop()
    prune, keep, _ = runs[-1]
    questions = {"number": len(QUESTIONS), "prune": prune, "keep": keep, **medians.pop()}
    full, prompt = medians[0], len(model.prompt(EXPRESSION)) - 1
    for (prune, _, mode), row in zip(runs, medians, strict=True):
        row["prune"] = "none" if mode == "full" else prune
        row["prompt_tokens"] = prompt + round(row["visual_tokens"])
        row["full_over_this"] = {key: full[key] / row[key] for key in BOUGHT}
        if theirs:
            row["theirs_over_this"] = {key: theirs[key.removeprefix("drafted_")] / row[key]
                                       for key in COMPARED}
    return {"weights": str(args.folder or f"random {args.random}"), "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            "parameters": ours["weight_bytes"] // model.dtype.itemsize, "new_tokens": new,
            "rounds": args.rounds, "graph": args.graph, "packed": not args.no_pack,
            "torch": torch.__version__, "processor": processor(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "ours": ours, "theirs": theirs, "runs": medians, "questions": questions}
