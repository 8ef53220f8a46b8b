"""What is measured of a model, and of transformers' beside it: the bench's JSON document.

transformers' model has the same weights, image and prompt, and the least work that it allows:
logits of the last token only, its own cache, no mask.
"""

import argparse
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from nanogap.bench.sizes import save_random
from nanogap.checks.loading import load
from nanogap.errors import NanogapError
from nanogap.fast.graph import GraphedDecoder
from nanogap.fast.packed import pack
from nanogap.llava import clock_ms
from nanogap.models import VLM
from nanogap.train.scenes import scene

IMAGE = scene("bench", 0).image
QUESTIONS = [scene("bench", number).expressions[0][0] for number in range(7)]   # as in RefCOCO
EXPRESSION = QUESTIONS[0]
BOUGHT = ("vision_ms", "prefill_ms", "first_token_ms", "pass_ms", "box_ms", "kv_mb")
COMPARED = ("vision_ms", "first_token_ms", "pass_ms", "box_ms", "drafted_box_ms")


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's, as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", told.read_text()) if told.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """What some work gives, and the milliseconds that it takes."""
    start = clock_ms(device)
    done = work()
    return done, clock_ms(device) - start


def peak_memory(device: torch.device, forget: bool = False) -> int:
    """The most bytes of memory that were in use; elsewhere than on CUDA those of the process.

    forget:  count from what is in use now
    returns: 0 where the system does not tell (it is Linux that does)
    """
    if device.type == "cuda":
        if forget:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    told = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(told[0])


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's weights; where these are mapped from a file, this reads them."""
    for parameter in model.parameters():
        parameter.view(-1)[::1024].sum()
    return sum(parameter.nbytes for parameter in model.parameters())


def first_use(device: torch.device, get: Callable[[], tuple[Any, int]],
              use: Callable[[Any], object]) -> tuple[Any, dict]:
    """Get a model and its bytes, and use it once: the model, and the time and memory it took."""
    in_use = peak_memory(device, forget=True)
    (model, size), load_ms = timed(device, get)
    use(model)
    return model, {"load_s": load_ms / 1000, "weights_mb": size / 1e6,
                   "peak_over_weights": (peak_memory(device) - in_use) / size}


# ----- our model ----------------------------------------------------------------------------------


def our_model(args: argparse.Namespace) -> tuple[VLM, int]:
    """The model, with an end token that it never says, and its weights' bytes."""
    model = load(args.folder, args.device, args.dtype, pack=False)
    size = bytes_of(model)
    if not args.no_pack:
        pack(model)
    model.config = replace(model.config, eos_token=-1, other_ends=())
    if args.graph:
        model.next_pass = GraphedDecoder(model.language_model.model)
    return model, size


def our_times(model: VLM, run: dict, new: int) -> dict:
    """One question without drafts and once more with them; run: how it is pruned."""
    ask = partial(model.ground, IMAGE, EXPRESSION, **run, max_new_tokens=new)
    result, box_ms = timed(model.device, partial(ask, drafts=False))
    drafted, drafted_box_ms = timed(model.device, ask)
    took = result.timings
    return {"vision_ms": took["vision_ms"], "prefill_ms": took["prefill_ms"],
            "first_token_ms": took["vision_ms"] + took["prefill_ms"],
            "pass_ms": took["decode_ms"] / took["passes"], "box_ms": box_ms,
            "drafted_box_ms": drafted_box_ms, "drafted_passes": drafted.timings["passes"],
            "visual_tokens": result.visual_tokens, "kv_mb": result.kv_bytes / 2 ** 20}


def many_times(model: VLM, run: dict, new: int) -> dict:
    """Several questions about one picture, which is encoded before: answers a second."""
    image = model.encode_image(IMAGE)
    _, one_by_one_ms = timed(model.device, lambda: [
        model.ground(image, question, **run, max_new_tokens=new) for question in QUESTIONS])
    _, ground_all_ms = timed(model.device, lambda: model.ground_all(
        image, QUESTIONS, **run, max_new_tokens=new))
    return {"one_by_one_per_s": 1000 * len(QUESTIONS) / one_by_one_ms,
            "ground_all_per_s": 1000 * len(QUESTIONS) / ground_all_ms,
            "faster": one_by_one_ms / ground_all_ms}


# ----- transformers' model ------------------------------------------------------------------------


def peer_class(folder: Path, model: VLM) -> Any:
    """What loads such a model; NanogapError where transformers has none, or is not installed."""
    kind = model.fixed["model_type"]
    if kind not in ("llava", "llava_next"):
        raise NanogapError(f"{folder} holds a {kind!r} model, and transformers has only llava and "
                           "llava_next: leave --against out")
    try:
        import transformers
    except ImportError:
        raise NanogapError("transformers is not installed here; get it with "
                           "`pip install transformers==5.23.0`") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForImageTextToText


def load_peer(kind: Any, folder: Path, model: VLM) -> tuple[Any, int]:
    """The model where ours is, with the fastest attention that it has, and its weights' bytes."""
    peer = kind.from_pretrained(folder, dtype=model.dtype, attn_implementation="sdpa")
    peer.generation_config.eos_token_id = None   # as many tokens as are asked for
    peer = peer.to(model.device).eval()
    return peer, bytes_of(peer)


def picture_for(model: VLM) -> dict[str, Tensor]:
    """The picture as transformers wants it: with its size, where its tokens depend on that."""
    pixel_values = model.prepare_image(IMAGE)                                 # (views, 3, S, S)
    if model.pictures_alike:
        return {"pixel_values": pixel_values}
    size = torch.tensor([[IMAGE.height, IMAGE.width]], device=model.device)
    return {"pixel_values": pixel_values[None], "image_sizes": size}


def inputs_for(model: VLM, n_visual: int) -> dict[str, Tensor]:
    """The picture and our prompt (1, P + N + A), which has an image token for each of N."""
    ids = model.prompt(EXPRESSION)                                            # (P + 1 + A,)
    ids = ids.repeat_interleave(torch.where(ids == model.config.image_token, n_visual, 1))
    return {"input_ids": ids[None].to(model.device), **picture_for(model)}


def generate(peer: Any, new: int, inputs: dict[str, Tensor]) -> list[int]:
    """`new` tokens by transformers' own generation, greedily."""
    ids = inputs["input_ids"]
    said = peer.generate(**inputs, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=new)
    return said[0, ids.shape[1]:].tolist()


def agreement(peer: Any, model: VLM, new: int) -> dict:
    """How far both say the same: in the tokens generated, and in the logits of the prompt."""
    result = model.ground(IMAGE, EXPRESSION, mode="full", max_new_tokens=new)
    inputs = inputs_for(model, int(result.visual_tokens))
    ours = model(model.prompt(EXPRESSION), model.prepare_image(IMAGE), size=IMAGE.size)   # (T, V)
    theirs = peer(**inputs).logits[0].float()                                 # (T, V)
    return {"library": f"transformers {version('transformers')}",
            "same_tokens": result.tokens == generate(peer, new, inputs),
            "largest_difference": float((ours - theirs).abs().max()),
            "largest_logit": float(theirs.abs().max())}


def peer_times(peer: Any, model: VLM, new: int) -> dict:
    """Milliseconds of the vision tower, of the first token, of a later pass, and of `generate`.

    Tokens and pixels are prepared within these times, as they are in ours.
    """
    n_visual = model.encode_image(IMAGE).n_visual
    at = [clock_ms(model.device)]
    peer.model.get_image_features(**picture_for(model))
    at.append(clock_ms(model.device))
    out = peer(**inputs_for(model, n_visual), use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)                        # (1, 1)
    token.item()
    at.append(clock_ms(model.device))
    for _ in range(new - 1):
        name = "cache" if "cache" in out else "past_key_values"   # since 5.24, and before
        out = peer(input_ids=token, use_cache=True, **{name: out[name]})
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        token.item()                                  # as generation does to look for its end
    at.append(clock_ms(model.device))
    model.tokenizer.decode(generate(peer, new, inputs_for(model, n_visual)))
    at.append(clock_ms(model.device))
    vision, first, passes, box = (after - before for before, after in pairwise(at))
    return {"vision_ms": vision, "prefill_ms": first - vision, "first_token_ms": first,
            "pass_ms": passes / (new - 1), "box_ms": box}


# ----- both ---------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict:
    """The JSON document; above a ratio of 1 the run in whose row it stands is the faster."""
    new = args.new
    with TemporaryDirectory() as folder:                                      # libraries start up
        save_random("tiny", Path(folder), torch.float32)
        our_times(load(folder, args.device), {"mode": "full"}, 2)
    runs = [{"mode": "full"}, *({"prune": args.prune, "keep": keep} for keep in args.keep)]
    model, ours = first_use(args.device, lambda: our_model(args),
                            lambda model: [our_times(model, run, new) for run in runs])
    todo = [partial(our_times, model, run, new) for run in runs]
    todo.append(partial(many_times, model, runs[-1], new))
    theirs = None
    if args.against:
        kind = peer_class(args.folder, model)
        peer, theirs = first_use(args.device, lambda: load_peer(kind, args.folder, model),
                                 lambda peer: peer_times(peer, model, new))
        theirs |= agreement(peer, model, new)
        todo.append(partial(peer_times, peer, model, new))
    rounds = [[one() for one in todo] for _ in range(1 + args.rounds)][1:]
    rows = [{key: median(each[key] for each in took) for key in took[0]}
            for took in zip(*rounds, strict=True)]
    if theirs:
        theirs |= rows.pop()
    questions = rows.pop()
    questions |= {"number": len(QUESTIONS), "prune": args.prune, "keep": rows[-1]["visual_tokens"]}
    for run, row in zip(runs, rows, strict=True):
        row["prune"] = run.get("prune", "none")
        row["full_over_this"] = {key: rows[0][key] / row[key] for key in BOUGHT}
        if theirs:
            row["theirs_over_this"] = {key: theirs[key.removeprefix("drafted_")] / row[key]
                                       for key in COMPARED}
    return {"weights": str(args.folder), "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            "new_tokens": new, "rounds": args.rounds, "packed": not args.no_pack,
            "graph": args.graph, "torch": torch.__version__, "machine": machine(model.device),
            "ours": ours, "theirs": theirs, "runs": rows, "questions": questions,
            "parameters": round(1e6 * ours["weights_mb"] / model.dtype.itemsize)}
