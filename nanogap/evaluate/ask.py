"""Asking a model: every expression, under every strategy, budget and mode.

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

from nanogap import methods
from nanogap.checks.command import tell
from nanogap.checks.loading import folder_of
from nanogap.errors import ItemError, NanogapError
from nanogap.evaluate import ablate
from nanogap.evaluate.data import Example
from nanogap.evaluate.score import TIMES, Run, score
from nanogap.fast.ground_all import Asked, check_lengths
from nanogap.fast.processes import joined
from nanogap.ground import Result
from nanogap.image import Box
from nanogap.llava import EncodedImage
from nanogap.models import VLM

TELL_EVERY = 10.0                                   # seconds
MODEL_FILES = ("*config.json", "tokenizer.json", "*.safetensors", "*.bin")
Question = tuple[str, str, Box]                     # id, expression, true box


def plan(args: argparse.Namespace, model: VLM,
         image: EncodedImage) -> tuple[list[Run], dict[str, str]]:
    """Every strategy, budget and mode, and why each of the other strategies cannot be run.

    Each is tried for one token: what cannot be asked is refused before any file is begun.
    image:  any
    raises: NanogapError where no strategy can be run, or one cannot by the only model
    """
    def rehearse(runs: Sequence[Run]) -> None:
        ground_runs(model, image, dict.fromkeys(runs, ["thing"]), args.seed, max_new_tokens=1)

    whole = [mode for mode in args.mode if mode in ("full", *ablate.WHOLE)]
    pruned = [mode for mode in args.mode if mode not in whole]
    every = image.n_visual if model.pictures_alike else "100%"
    runs: list[Run] = [("none", every, mode) for mode in whole]
    rehearse(runs)
    cannot_run = {}
    for name in args.prune:
        mine = [(name, keep, mode) for keep in args.keep for mode in pruned]
        try:
            rehearse(mine)
            runs += mine
        except NanogapError as error:
            cannot_run[name] = str(error)
    if cannot_run and (len(args.models) == 1 or len(cannot_run) == len(args.prune)):
        raise NanogapError(next(iter(cannot_run.values())))
    return runs, cannot_run


def first_whole(model: VLM, examples: Sequence[Example]) -> EncodedImage:
    """The first picture that can be opened."""
    for example in examples:
        try:
            return model.encode_image(example.image())
        except ItemError as error:
            why = error
    raise NanogapError(f"none of the {len(examples)} images can be opened: {why}")


def ground_runs(model: VLM, image: EncodedImage, asked: Mapping[Run, Sequence[str]], seed: int,
                max_new_tokens: int) -> list[Sequence[Result]]:
    """Ask the expressions of each run: cases of --ablate, which come first, then all prunings."""
    said: list[Sequence[Result]] = []
    pruned = []
    for (name, keep, mode), expressions in asked.items():
        if mode in ablate.WHOLE:
            said.append([ablate.ask(model, image, expression, mode, seed, max_new_tokens)
                         for expression in expressions])
        elif mode == "full":                                      # needs no strategy
            pruned.append(Asked(expressions, mode=mode))
        else:
            pruned.append(Asked(expressions, name, keep, mode))
    return said + model.ground_runs(image, pruned, seed, max_new_tokens)


def answers(model: VLM, example: Example, asked: Mapping[Run, Sequence[Question]],
            args: argparse.Namespace, left_out: dict[str, str]) -> list[dict]:
    """What the model says about a picture in each run, how it counts, and what it took.

    left_out: takes the expressions that cannot be asked, by their IDs, and why
    """
    try:
        image = model.encode_image(example.image())
    except ItemError as error:
        left_out |= {id_: str(error) for id_, *_ in example.questions}
        return []
    for id_, expression, _ in example.questions:
        try:
            check_lengths(model, model.prompt(expression), image, args.max_new_tokens)
        except ItemError as error:
            left_out[id_] = f"{expression!r:.40}: {error}"
    asked = {run: [question for question in questions if question[0] not in left_out]
             for run, questions in asked.items()}
    expressions = {run: [expression for _, expression, _ in questions]
                   for run, questions in asked.items()}
    results = ground_runs(model, image, expressions, args.seed + example.number,
                          args.max_new_tokens)
    padding = cache(lambda kept: model.padding(image, torch.tensor(kept, dtype=torch.long)))
    records = []
    for ((name, keep, mode), questions), of_run in zip(asked.items(), results, strict=True):
        for (id_, expression, truth), result in zip(questions, of_run, strict=True):
            box, iou = score(args.protocol, result.text, result.box, truth, image.width,
                             image.height)
            kept = result.keep.tolist()
            records.append({
                "id": id_, "image": example.name, "expression": expression, "mode": mode,
                "prune": name, "keep": keep, "text": result.text, "box": box,
                "cut_off": result.cut_off, "visual_tokens": result.visual_tokens, "kept": kept,
                "padding": padding(tuple(kept)),
                **{key: result.timings[key] for key in TIMES}, "truth": truth, "iou": iou})
    return records


def with_progress(examples: Sequence[Example]) -> Iterator[Example]:
    """The pictures; now and then the first process tells how far it is with its own."""
    begun = told = time.time()
    for number, example in enumerate(examples, 1):
        yield example
        if joined()[0] == 0 and time.time() - told >= TELL_EVERY:
            told = time.time()
            left = (told - begun) / number * (len(examples) - number)
            to_go = f"{left:.0f} s" if left < 60 else f"{left / 60:.0f} min"
            tell(f"{number} of {len(examples)} pictures, {to_go} to go ...")


# ----- what answers depend on ---------------------------------------------------------------------


def identified(weights: Path, clip: Path | None, strategies: Iterable[str]) -> dict[str, str]:
    """Weights, and strategies of one's own, by all that is in their files (14 GB take seconds)."""
    folder = folder_of(weights)
    folders = [folder, folder_of(clip or folder / "clip_text")]
    files = [file for each in folders for pattern in MODEL_FILES
             for file in sorted(each.glob(pattern))]
    found = {"weights": f"{weights.resolve().name} {digest(files)}"}
    for name in strategies:
        code = methods.code_of(name)
        if code:
            found[name] = digest([code])
    return found


def digest(files: Iterable[str | Path]) -> str:
    """What changes with any byte of some files."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:8]
