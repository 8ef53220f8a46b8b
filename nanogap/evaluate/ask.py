"""Asking a model: every expression, under every strategy, budget and mode.

In:  a model, examples, and what was asked for on the command line.
Out: a record for each answer, as it comes.

An image is encoded once, and all that is asked about it is asked at once, under all prunings
(nanogap/fast/ground_all.py); of the times each answer has its share.
"""

import argparse
import ctypes
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

import torch

from nanogap import methods, prune
from nanogap.checks.command import tell
from nanogap.errors import ItemError, NanogapError
from nanogap.evaluate import ablate
from nanogap.evaluate.data import Data, Example
from nanogap.evaluate.score import TIMES, Run, score
from nanogap.fast.ground_all import Asked, check_lengths
from nanogap.fast.packed import pack
from nanogap.ground import Result
from nanogap.image import Box
from nanogap.llava import EncodedImage
from nanogap.models import VLM

TELL_EVERY = 10.0                                   # seconds
Question = tuple[str, str, Box]                     # id, expression, true box
Todo = tuple[Example, Run, Question]
Budgets = dict[tuple[str, str], int | str | None]   # strategy and --keep -> tokens, or a share


# ----- runs ---------------------------------------------------------------------------------------


def budgets_asked(args: argparse.Namespace, image: EncodedImage, alike: bool = True) -> Budgets:
    """What each budget that was asked for is in a model.

    image: any; a share of the visual tokens is a number of its
    alike: whether all pictures have as many; else a share stays one, and is a number of each
    """
    return {(name, keep): keep if keep.endswith("%") and not alike
            else prune.budget_of(keep, image.n_patches, name)
            for name in args.prune for keep in args.keep}


def runs_asked(args: argparse.Namespace, image: EncodedImage, alike: bool = True) -> list[Run]:
    """Every (strategy, budget, mode) that was asked for, once; mode full prunes nothing.

    image, alike: as above
    """
    pruned = [mode for mode in args.mode if mode != "full"]
    whole = ["full"] if "full" in args.mode else []
    if args.ablate:
        pruned, whole = list(ablate.PRUNED), list(ablate.WHOLE)
    everything = image.n_visual if alike else "100%"
    runs: list[Run] = [("none", everything, mode) for mode in whole]
    runs += [(name, keep, mode) for (name, _), keep in budgets_asked(args, image, alike).items()
             for mode in pruned]
    return list(dict.fromkeys(runs))


# ----- asking -------------------------------------------------------------------------------------


def ground_runs(model: VLM, image: EncodedImage, asked: Sequence[tuple[Run, Sequence[str]]],
                seed: int, max_new_tokens: int) -> list[Sequence[Result]]:
    """Ask the expressions of each run: all prunings at once, cases of --ablate one by one."""
    pruned = [Asked(expressions, mode=mode) if mode == "full"                 # needs no strategy
              else Asked(expressions, name, keep, mode)
              for (name, keep, mode), expressions in asked if mode not in ablate.WHOLE]
    results = iter(model.ground_runs(image, pruned, seed, max_new_tokens))
    return [[ablate.ask(model, image, expression, mode, seed, max_new_tokens)
             for expression in expressions] if mode in ablate.WHOLE else next(results)
            for (_, _, mode), expressions in asked]


def ask(model: VLM, image: EncodedImage, asked: Sequence[tuple[Run, Sequence[str]]], seed: int,
        max_new_tokens: int) -> list[list[dict]]:
    """What the model says in each run, and what it took."""
    padding = cache(lambda kept: model.padding(image, torch.tensor(kept, dtype=torch.long)))
    return [[{"text": result.text, "box": result.box, "cut_off": result.cut_off,
              "visual_tokens": result.visual_tokens, "kept": result.keep.tolist(),
              "padding": padding(tuple(result.keep.tolist())),
              **{key: result.timings[key] for key in TIMES}} for result in of_run]
            for of_run in ground_runs(model, image, asked, seed, max_new_tokens)]


def too_long(model: VLM, image: EncodedImage, questions: Iterable[Question],
             max_new_tokens: int) -> dict[str, str]:
    """The expressions that cannot be asked about a picture, by their IDs, and why."""
    why = {}
    for id_, expression, _ in questions:
        try:
            check_lengths(model, model.prompt(expression), image, max_new_tokens)
        except ItemError as error:
            why[id_] = f"{expression:.40}: {error}"
    return why


def first_whole(model: VLM, examples: Sequence[Example]) -> EncodedImage:
    """The first image that can be opened."""
    for example in examples:
        try:
            return model.encode_image(example.image())
        except ItemError as error:
            why = error
    raise NanogapError(f"none of the {len(examples)} images can be opened: {why}")


def rehearse(model: VLM, image: EncodedImage, runs: Iterable[Run], seed: int) -> None:
    """Ask for one token in each run: what cannot be asked is refused before any file is begun."""
    for run in runs:
        ground_runs(model, image, [(run, ["thing"])], seed, max_new_tokens=1)


def answers(model: VLM, todo: Sequence[Todo], args: argparse.Namespace,
            left_out: dict[str, str]) -> Iterator[dict]:
    """One record for each thing to do, which come sorted by image and then by run.

    left_out: takes the expressions that cannot be asked, by their IDs, and why
    """
    for _, group in groupby(todo, lambda each: each[0].number):
        of_picture = list(group)
        example = of_picture[0][0]
        try:
            image = model.encode_image(example.image())
        except ItemError as error:
            left_out |= {id_: str(error) for _, _, (id_, *_) in of_picture}
            continue
        left_out |= too_long(model, image, example.questions, args.max_new_tokens)
        runs: dict[Run, list[Question]] = {}
        for _, run, question in of_picture:
            if question[0] not in left_out:
                runs.setdefault(run, []).append(question)
        asked = [(run, [expression for _, expression, _ in questions])
                 for run, questions in runs.items()]
        said = ask(model, image, asked, args.seed + example.number, args.max_new_tokens)
        for (run, questions), of_run in zip(runs.items(), said, strict=True):
            for (id_, expression, truth), answer in zip(questions, of_run, strict=True):
                box, iou = score(args.protocol, answer["text"], answer["box"], truth, image.width,
                                 image.height)
                yield {"id": id_, "image": example.name, "expression": expression, "mode": run[2],
                       "prune": run[0], "keep": run[1], **answer, "box": box, "truth": truth,
                       "iou": iou}


def with_progress(records: Iterator[dict], total: int, rank: int, world: int) -> Iterator[dict]:
    """Say now and then on stderr how far it is; the first process speaks for all."""
    whose = f" of process 1 of {world}" if world > 1 else ""
    begun = time.time()
    told = begun
    for count, record in enumerate(records, 1):
        if rank == 0 and time.time() - told >= TELL_EVERY:
            told = time.time()
            rate = count / (told - begun)
            left = (total - count) / rate
            to_go = f"{left:.0f} s" if left < 60 else f"{left / 60:.0f} min"
            tell(f"{count} of {total} answers{whose}, {rate:.1f} a second, {to_go} to go ...")
        yield record


# ----- what answers depend on ---------------------------------------------------------------------


def settings(args: argparse.Namespace, model: VLM, data: Data) -> dict:
    """Everything on which answers depend, besides what stands in their own line."""
    digest = fingerprint(model) if args.out else ""         # of 14 GB it takes some seconds
    if not args.no_pack:
        pack(model)                                         # only now: a digest wants plain numbers
    files = {name: methods.code_of(name) for name in args.prune}
    own = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]
           for name, file in files.items() if file}         # strategies of one's own
    made = {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."),
            "weights": f"{args.weights.resolve().name} {digest}".strip(),
            "data": f"{data.name} {data.digest}".strip(), "seed": args.seed,
            "protocol": args.protocol, "max_new_tokens": args.max_new_tokens}
    return made | {"strategies": own} if own else made


def fingerprint(model: VLM) -> str:
    """A digest of all on which a model's answers depend: its settings, its words, all its numbers.
    """
    said: list[object] = [model.config, model.frame, model.template, model.box_format,
                          model.tokenizer.to_str()]
    if model.text_guide:
        said += [model.text_guide.text_model.config, model.text_guide.tokenizer.to_str()]
    digest = hashlib.sha256(repr(said).encode())
    for name, value in model.state_dict().items():
        value = value.cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        size = value.nbytes                                 # without NumPy, and without a copy
        digest.update((ctypes.c_char * size).from_address(value.data_ptr()))
    return digest.hexdigest()[:16]
