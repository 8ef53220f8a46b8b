"""Asking a model: every expression, under every strategy, budget and mode.

In:  a model, examples, and what was asked for on the command line.
Out: a record for each answer, as it comes.

An image is encoded once for all that is asked about it, and what is asked under one pruning is
asked at once (nanogap/fast/ground_all.py); of the times each answer has an equal share.
"""

import argparse
import ctypes
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import torch

from nanogap import methods, prune
from nanogap.checks.command import tell
from nanogap.errors import ItemError, NanogapError
from nanogap.evaluate import ablate
from nanogap.evaluate.data import TELL_EVERY, Data, Example
from nanogap.evaluate.score import TIMES, Run, score
from nanogap.fast.packed import pack
from nanogap.ground import Result
from nanogap.image import Box
from nanogap.llava import EncodedImage
from nanogap.models import VLM

Todo = tuple[Example, Run, tuple[str, str, Box]]
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


def ground_all(model: VLM, image: EncodedImage, expressions: Sequence[str], run: Run, seed: int,
               max_new_tokens: int) -> Sequence[Result]:
    """Ask in one of the modes."""
    name, keep, mode = run
    if mode == "full":
        return model.ground_all(image, expressions, mode=mode, max_new_tokens=max_new_tokens)
    return model.ground_all(image, expressions, name, keep, mode, seed,
                            max_new_tokens=max_new_tokens)


def ask(model: VLM, image: EncodedImage, expressions: Sequence[str], run: Run, seed: int,
        max_new_tokens: int) -> list[dict]:
    """What the model says, and what it took."""
    if run[2] in ablate.WHOLE:
        return [ask_whole(model, image, expression, run[2], seed, max_new_tokens)
                for expression in expressions]
    said, padding = [], {}                         # questions of one run often share what is kept
    for result in ground_all(model, image, expressions, run, seed, max_new_tokens):
        kept = result.keep.tolist()
        if tuple(kept) not in padding:
            padding[tuple(kept)] = model.padding(image, result.keep)
        said.append({"text": result.text, "box": result.box, "cut_off": result.cut_off,
                     "visual_tokens": result.visual_tokens, "kept": kept,
                     "padding": padding[tuple(kept)],
                     **{key: result.timings[key] for key in TIMES}})
    return said


def ask_whole(model: VLM, image: EncodedImage, expression: str, case: str, seed: int,
              max_new_tokens: int) -> dict:
    """The same in a case of --ablate that prunes nothing."""
    text, box, cut_off = ablate.ask(model, image, expression, case, seed, max_new_tokens)
    kept = torch.arange(image.n_visual)
    return {"text": text, "box": box, "cut_off": cut_off, "visual_tokens": len(kept),
            "kept": kept.tolist(), "padding": model.padding(image, kept), **dict.fromkeys(TIMES)}


def ask_what_can_be(model: VLM, image: EncodedImage, expressions: Sequence[str],
                    *how: Any) -> list[dict | ItemError]:
    """The same, and in the place of an answer why one cannot be asked; then the others are alone.

    how: the other arguments of `ask`
    """
    try:
        return [*ask(model, image, expressions, *how)]
    except ItemError as error:
        if len(expressions) == 1:
            return [error]
    return [said for expression in expressions
            for said in ask_what_can_be(model, image, [expression], *how)]


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
        if run[2] not in ablate.WHOLE:
            ground_all(model, image, ["thing"], run, seed, max_new_tokens=1)


def answers(model: VLM, todo: Sequence[Todo], args: argparse.Namespace,
            left_out: dict[str, str]) -> Iterator[dict]:
    """One record for each thing to do, which come sorted by image and then by run.

    left_out: takes the expressions that cannot be asked, by their IDs, and why
    """
    encoded = None
    image: EncodedImage | str = ""                          # or why it cannot be opened
    for (_, run), group in groupby(todo, lambda each: (each[0].number, each[1])):
        asked = [*group]
        example = asked[0][0]
        if example is not encoded:
            encoded = example
            try:
                image = model.encode_image(example.image())
            except ItemError as error:
                image = str(error)
        if isinstance(image, str):
            left_out |= {id_: image for _, _, (id_, *_) in asked}
            continue
        expressions = [expression for _, _, (_, expression, _) in asked]
        answered = ask_what_can_be(model, image, expressions, run, args.seed + example.number,
                                   args.max_new_tokens)
        for (_, _, (id_, expression, truth)), said in zip(asked, answered, strict=True):
            if isinstance(said, ItemError):
                left_out[id_] = f"{expression:.40}: {said}"
                continue
            box, iou = score(args.protocol, said["text"], said["box"], truth, image.width,
                             image.height)
            yield {"id": id_, "image": example.name, "expression": expression, "mode": run[2],
                   "prune": run[0], "keep": run[1], **said, "box": box, "truth": truth,
                   "iou": iou}


def with_progress(records: Iterator[dict], total: int, rank: int, world: int,
                  later: int = 0) -> Iterator[dict]:
    """Say now and then on stderr how far it is; the first process speaks for all.

    later: how many answers of other models are still to come
    """
    whose = f" of process 1 of {world}" if world > 1 else ""
    begun = time.time()
    told = begun
    for count, record in enumerate(records, 1):
        if rank == 0 and time.time() - told >= TELL_EVERY:
            told = time.time()
            rate = count / (told - begun)
            every = f", {duration((total - count + later) / rate)} for all models" if later else ""
            tell(f"{count} of {total} answers{whose}, {rate:.1f} a second, "
                 f"{duration((total - count) / rate)} to go{every} ...")
        yield record


def duration(seconds: float) -> str:
    """A time in words: in seconds below a minute."""
    return f"{seconds:.0f} s" if seconds < 59.5 else f"{seconds / 60:.1f} min"


# ----- what answers depend on ---------------------------------------------------------------------


def settings(args: argparse.Namespace, model: VLM, data: Data) -> dict:
    """Everything on which answers depend, besides what stands in their own line."""
    digest = fingerprint(model) if args.out else ""         # of 14 GB it takes some seconds
    if not args.no_pack:
        pack(model)                                         # only now: a digest wants plain numbers
    made = {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."),
            "weights": f"{args.weights.resolve().name} {digest}".strip(),
            "data": f"{data.name} {data.digest}".strip(), "seed": args.seed,
            "protocol": args.protocol, "max_new_tokens": args.max_new_tokens}
    own = digests(args.prune)
    return made | {"strategies": own} if own else made


def digests(names: Iterable[str]) -> dict[str, str]:
    """A digest of the code of each strategy of one's own, and of what it imports from its folder.
    """
    found = {}
    for name in names:
        file = methods.code_of(name)
        if file:
            finder = ModuleFinder([str(Path(file).parent)])
            finder.run_script(file)
            found_too = (getattr(module, "__file__", None) for module in finder.modules.values())
            files = {file, *filter(None, found_too)}
            whole = b"".join(Path(each).read_bytes() for each in sorted(files))
            found[name] = hashlib.sha256(whole).hexdigest()[:8]
    return found


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
