"""Many questions about one picture, under one pruning or several, faster than one by one.

In:  a model, a picture, expressions, and how to prune.
Out: a Result for each expression, with the words that it gets alone.

What is kept and where it stands is decided here; how questions share a cache and passes stands in
lanes.py.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nanogap.errors import NanogapError
from nanogap.fast.answered import Answered, answered
from nanogap.fast.draft import foretell
from nanogap.fast.ground import check_lengths, ground
from nanogap.fast.lanes import Lane, Question, ask
from nanogap.gap import Layout, lay_out
from nanogap.ground import MAX_NEW_TOKENS, Keep, choose
from nanogap.llava import EncodedImage, clock_ms
from nanogap.methods import find
from nanogap.methods.in_decoder import prunes_there
from nanogap.prune import needs_of


class Asked(NamedTuple):
    """What is asked about a picture, and how it is pruned for that: see `ground`."""

    expressions: Sequence[str]
    prune: str = "cls_attention"
    keep: Keep = "50%"
    mode: str = "gap"


def ground_all(model: Any, image: Image.Image | str | Path | EncodedImage,
               expressions: Iterable[str], prune: str = "cls_attention", keep: Keep = "50%",
               mode: str = "gap", seed: int = 0, *, max_new_tokens: int = MAX_NEW_TOKENS,
               drafts: bool = True) -> list[Answered]:
    """Find what each of many expressions refers to in one picture, faster than one by one.

    expressions: any number of them; the other arguments are those of `ground`
    returns:     for each what `ground` returns; of the milliseconds, an equal share of what all
                 of them took
    raises:      NanogapError as `ground` does, before anything is asked
    It goes one by one where the questions cannot share the image: where what is kept depends on
    the question, or where they differ before the image.
    """
    if isinstance(expressions, str):
        raise NanogapError("expressions is a single text: give a list of them, or call ground")
    asked = Asked(list(expressions), prune, keep, mode)
    return ground_runs(model, image, [asked], seed, max_new_tokens, drafts)[0]


@torch.no_grad()
def ground_runs(model: Any, image: Image.Image | str | Path | EncodedImage, runs: Sequence[Asked],
                seed: int = 0, max_new_tokens: int = MAX_NEW_TOKENS,
                drafts: bool = True) -> list[list[Answered]]:
    """`ground_all` for each of these at once; of a pass's time each has a share by its tokens."""
    encoded: EncodedImage = model.encode_image(image)
    encode = cache(model.encode_question)              # many runs may ask the same
    lanes = [lane_of(model, encoded, encode, asked, seed, max_new_tokens) for asked in runs]
    form = foretell(model.box_format, model.tokenizer) if drafts else ()
    ask(model, [lane for lane in lanes if lane], form, max_new_tokens)
    cells, results = model.cells(encoded), []
    for asked, lane in zip(runs, lanes, strict=True):
        name, mode = find(asked.prune), asked.mode
        if lane:
            results.append([answered(result, cells, expression, name, asked.keep, mode)
                            for result, expression in zip(lane.results(model, encoded),
                                                          asked.expressions, strict=True)])
        else:
            results.append([ground(model, encoded, expression, name, asked.keep, mode, seed,
                                   max_new_tokens=max_new_tokens, drafts=drafts)
                            for expression in asked.expressions])
    return results


def lane_of(model: Any, encoded: EncodedImage, encode: Callable[[str], Tensor], asked: Asked,
            seed: int, max_new_tokens: int) -> "Lane | None":
    """Select and lay out; None where it goes one by one."""
    start, name = clock_ms(model.device), find(asked.prune)
    prompts = [encode(model.question(each)) for each in asked.expressions]
    for prompt in prompts:
        check_lengths(model, prompt, encoded, max_new_tokens)
    alike = begin_alike(prompts)
    if not prompts or model.around_image(prompts[0])[0] >= alike \
            or reads_question(name, asked.keep, asked.mode):
        return None
    kept = choose(model, encoded, "", name, asked.keep, asked.mode, seed)

    def layout_of(input_ids: Tensor) -> Layout:
        P, A = model.around_image(input_ids)
        return lay_out(kept.ranked, P, encoded.n_visual, A, asked.mode, kept.n_added)

    shared = layout_of(prompts[0][:alike])
    x = model.embed(prompts[0][:alike], encoded, kept, shared.order)          # (1, S, C)
    questions = [Question(number, prompt[alike:].tolist(), layout_of(prompt))
                 for number, prompt in enumerate(prompts)]
    return Lane(kept, shared, x, questions, clock_ms(model.device) - start)


def reads_question(prune: str, keep: Keep, mode: str) -> bool:
    """Whether what is kept depends on the question."""
    pruned = mode != "full" and not isinstance(keep, Tensor | list | tuple)
    return pruned and (prunes_there(prune) or bool(needs_of(prune) & {"text", "question"}))


def begin_alike(prompts: Sequence[Tensor]) -> int:
    """How many tokens all prompts begin with; of each, the last is its own."""
    columns = zip(*(prompt[:-1].tolist() for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
