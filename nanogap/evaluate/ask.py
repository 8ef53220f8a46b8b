"""Asking a model: every expression, under every strategy, budget and mode.

In:  a model, examples, and what was asked for on the command line.
Out: a record for each answer, a picture's at a time.

An image is encoded once, and all that is asked about it is asked at once, under all prunings
(nanogap/fast/ground_all.py); of the times each answer has its share.
"""

import argparse
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from nanogap import prune
from nanogap.checks.command import tell
from nanogap.checks.loading import folder_of
from nanogap.errors import ItemError, NanogapError
from nanogap.evaluate import ablate
from nanogap.evaluate.data import Example
from nanogap.evaluate.score import TIMES, Budget, Run, score
from nanogap.fast.ground_all import Asked, check_lengths
from nanogap.fast.processes import joined
from nanogap.ground import Result
from nanogap.image import Box
from nanogap.llava import EncodedImage
from nanogap.models import VLM

TELL_EVERY = 10.0                                   # seconds
MODEL_FILES = ("*config.json", "tokenizer.json", "*.safetensors", "*.bin")
Question = tuple[str, str, Box]                     # id, expression, true box
Budgets = dict[str, tuple[str, Budget]]             # "trim 50%" -> in a model, ("trim", 72)
Todo = tuple[Example, dict[Run, list[Question]]]    # what is asked about a picture


# ----- what is asked ------------------------------------------------------------------------------


def plan(args: argparse.Namespace, folder: Path, model: VLM,
         image: EncodedImage) -> tuple[list[Run], Budgets, dict[str, str]]:
    """Every strategy, budget and mode, once, but for strategies that a model cannot run.

    Each is tried first: what cannot be asked is refused before any file is begun.
    image:   any.  Where all pictures have as many visual tokens, a share becomes a number of them
    returns: the runs, their budgets as they were asked, and why each of the other strategies cannot
    raises:  NanogapError where none can be run, or one cannot by the only model
    """
    alike = model.pictures_alike
    whole = [mode for mode in args.mode if mode in ("full", *ablate.WHOLE)]
    runs: list[Run] = [("none", image.n_visual if alike else "100%", mode) for mode in whole]
    rehearse(model, image, runs, args.seed)
    budgets: Budgets = {}
    cannot_run: dict[str, str] = {}
    for name in args.prune:
        try:
            mine: dict[str, Budget] = {}
            for keep in args.keep:
                number = prune.budget_of(keep, image.n_patches, name)
                mine[keep] = keep if keep.endswith("%") and not alike else number
            pruned = [(name, budget, mode) for budget in dict.fromkeys(mine.values())
                      for mode in args.mode if mode not in whole]
            rehearse(model, image, pruned, args.seed)
        except NanogapError as error:
            if len(args.models) == 1:
                raise
            cannot_run[name] = str(error)
        else:
            runs += pruned
            budgets |= {f"{name} {keep}": (name, budget) for keep, budget in mine.items()}
    if not budgets:
        raise NanogapError(f"{folder}: {next(iter(cannot_run.values()))}")
    return runs, budgets, cannot_run


def first_whole(model: VLM, examples: Sequence[Example]) -> EncodedImage:
    """The first picture that can be opened."""
    for example in examples:
        try:
            return model.encode_image(example.image())
        except ItemError as error:
            why = error
    raise NanogapError(f"none of the {len(examples)} images can be opened: {why}")


def rehearse(model: VLM, image: EncodedImage, runs: Iterable[Run], seed: int) -> None:
    """Ask for one token in each run."""
    ground_runs(model, image, dict.fromkeys(runs, ["thing"]), seed, max_new_tokens=1)


# ----- asking -------------------------------------------------------------------------------------


def ground_runs(model: VLM, image: EncodedImage, asked: Mapping[Run, Sequence[str]], seed: int,
                max_new_tokens: int) -> list[Sequence[Result]]:
    """Ask the expressions of each run: all prunings at once, cases of --ablate one by one."""
    pruned = [Asked(expressions, mode=mode) if mode == "full"                 # needs no strategy
              else Asked(expressions, name, keep, mode)
              for (name, keep, mode), expressions in asked.items() if mode not in ablate.WHOLE]
    results = iter(model.ground_runs(image, pruned, seed, max_new_tokens))
    said: list[Sequence[Result]] = []
    for (_, _, mode), expressions in asked.items():
        if mode in ablate.WHOLE:
            said.append([ablate.ask(model, image, expression, mode, seed, max_new_tokens)
                         for expression in expressions])
        else:
            said.append(next(results))
    return said


def answers(model: VLM, todo: Iterable[Todo], args: argparse.Namespace,
            left_out: dict[str, str]) -> Iterator[list[dict]]:
    """The records of one picture after the other.

    left_out: takes the expressions that cannot be asked, by their IDs, and why
    """
    for example, asked in todo:
        try:
            image = model.encode_image(example.image())
        except ItemError as error:
            left_out |= {id_: str(error) for questions in asked.values() for id_, *_ in questions}
            continue
        left_out |= too_long(model, image, example.questions, args.max_new_tokens)
        asked = {run: [question for question in questions if question[0] not in left_out]
                 for run, questions in asked.items()}
        expressions = {run: [expression for _, expression, _ in questions]
                       for run, questions in asked.items()}
        results = ground_runs(model, image, expressions, args.seed + example.number,
                              args.max_new_tokens)
        yield records_of(model, example, image, asked, results, args.protocol)


def records_of(model: VLM, example: Example, image: EncodedImage,
               asked: Mapping[Run, Sequence[Question]], results: Sequence[Sequence[Result]],
               protocol: str) -> list[dict]:
    """What the model said in each run, how it counts, and what it took."""
    padding = cache(lambda kept: model.padding(image, torch.tensor(kept, dtype=torch.long)))
    records = []
    for ((name, budget, mode), questions), of_run in zip(asked.items(), results, strict=True):
        for (id_, expression, truth), result in zip(questions, of_run, strict=True):
            box, iou = score(protocol, result.text, result.box, truth, image.width, image.height)
            kept = result.keep.tolist()
            records.append({
                "id": id_, "image": example.name, "expression": expression, "mode": mode,
                "prune": name, "keep": budget, "text": result.text, "box": box,
                "cut_off": result.cut_off, "visual_tokens": result.visual_tokens, "kept": kept,
                "padding": padding(tuple(kept)),
                **{key: result.timings[key] for key in TIMES}, "truth": truth, "iou": iou})
    return records


def too_long(model: VLM, image: EncodedImage, questions: Iterable[Question],
             max_new_tokens: int) -> dict[str, str]:
    """The expressions that cannot be asked about a picture, by their IDs, and why."""
    why = {}
    for id_, expression, _ in questions:
        try:
            check_lengths(model, model.prompt(expression), image, max_new_tokens)
        except ItemError as error:
            why[id_] = f"{expression!r:.40}: {error}"
    return why


def with_progress(pictures: Iterable[list[dict]], total: int) -> Iterator[dict]:
    """The records; now and then stderr is told how far it is, by the first process for all."""
    rank, world = joined()
    whose = f" of process 1 of {world}" if world > 1 else ""
    count, begun = 0, time.time()
    told = begun
    for records in pictures:
        yield from records
        count += len(records)
        if rank == 0 and time.time() - told >= TELL_EVERY:
            told = time.time()
            rate = count / (told - begun)
            left = (total - count) / rate
            to_go = f"{left:.0f} s" if left < 60 else f"{left / 60:.0f} min"
            tell(f"{count} of {total} answers{whose}, {rate:.1f} a second, {to_go} to go ...")


# ----- what answers depend on ---------------------------------------------------------------------


def identified(weights: Path, clip: Path | None) -> str:
    """The weights by name, and by all that is in their files; of 14 GB it takes some seconds."""
    folder = folder_of(weights)
    folders = [folder, folder_of(clip or folder / "clip_text")]
    files = [file for each in folders for pattern in MODEL_FILES
             for file in sorted(each.glob(pattern))]
    return f"{weights.resolve().name} {digest(files)}"


def digest(files: Iterable[str | Path]) -> str:
    """What changes with any byte of some files."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:8]
