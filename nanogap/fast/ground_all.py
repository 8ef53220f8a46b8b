"""Questions about a picture, answered the fast way: one, or many under one pruning or several.

The words are those of nanogap/ground.py, with what was asked beside them.  What is kept and where
it stands is decided here; the passes are in lanes.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nanogap import ground as lesson
from nanogap.checks.command import visible
from nanogap.errors import NanogapError
from nanogap.fast.decode import Question, foretell
from nanogap.fast.lanes import Lane, ask, row_bytes
from nanogap.gap import Layout, lay_out
from nanogap.ground import MAX_NEW_TOKENS, Answer, Keep, Result, choose
from nanogap.llava import EncodedImage, clock_ms
from nanogap.methods import find, reader
from nanogap.methods.in_decoder import prunes_there
from nanogap.prompt import DESCRIBE
from nanogap.prune import needs_of

TOGETHER = 32     # questions in a cache at a time: what bounds its memory


@dataclass(frozen=True)
class Answered(Result):
    """A result of the lesson, with what was asked: print() makes a line of it, draw a picture."""

    expression: str
    prune: str               # name of the strategy; empty where none chose
    mode: str
    cells: Tensor            # (N, 4) which part of the picture each visual token shows, pixels
    cuts: list[tuple[int, int]] = field(default_factory=list)   # (layer, visual tokens from it on)

    draw: ClassVar[Callable[..., Image.Image]]   # draw(image); see nanogap/show

    def __str__(self) -> str:
        box = "no box" if self.box is None else ", ".join(f"{v:.0f}" for v in self.box)
        by = f" by {self.prune}" if self.prune else ""
        return (f"\"{' '.join(self.expression.split())}\": {box} ({self.mode}, "
                f"{self.visual_tokens:g} of {len(self.cells)} visual tokens{by}); "
                f"the model said {visible(self.text)}")


class Asked(NamedTuple):
    """What is asked about a picture, and how it is pruned for that: see `ground`."""

    expressions: Sequence[str]
    prune: str = "cls_attention"
    keep: Keep = "50%"
    mode: str = "gap"
    question: str | None = None

    @property
    def strategy(self) -> str:
        """What chooses tokens: `prune`, but nothing where all are kept, or `keep` names them."""
        named = isinstance(self.keep, Tensor | list | tuple)
        return "" if named or self.mode == "full" else self.prune

    @property
    def cuts(self) -> bool:
        """Whether the decoder prunes, which it does for each question on its own."""
        return bool(self.strategy) and prunes_there(self.strategy)


def ground(model: Any, image: Image.Image | str | Path | EncodedImage, expression: str,
           prune: str = "cls_attention", keep: Keep = "50%", mode: str = "gap", seed: int = 0, *,
           max_new_tokens: int = MAX_NEW_TOKENS, drafts: bool = True,
           question: str | None = None) -> Answered:
    """Find what an expression refers to, by nanogap/ground.py with another way to decode.

    drafts: whether a pass may be fed several tokens; the words are the same
    """
    asked = Asked([expression], find(prune), keep, mode, question)
    if asked.cuts:
        return ground_runs(model, image, [asked], seed, max_new_tokens)[0][0]
    encoded = model.encode_image(image)
    question = question or model.question(expression)
    input_ids = model.encode_question(question)                               # (P + 1 + A,)
    check_lengths(model, input_ids, encoded, max_new_tokens)
    form = foretell(model.box_format, model.tokenizer) if drafts else ()

    def decode(model: Any, x: Tensor, layout: Layout, max_new_tokens: int) -> Answer:
        q = Question(input_ids[-1:].tolist(), layout)      # its logits foretell the answer
        lane = Lane(x[:, :-1], layout.position_ids[:-1], [q])
        ask(model, [lane], form, max_new_tokens)
        return Answer(q.said, lane.prefill_ms, q.passes - 1,
                      row_bytes(model) * (lane.x.shape[1] + q.read))

    result = lesson.ground(model, encoded, expression, asked.prune, keep, mode, seed,
                           max_new_tokens=max_new_tokens, question=question, decode=decode)
    return Answered(**vars(result), expression=expression, prune=asked.strategy, mode=mode,
                    cells=model.cells(encoded))


def describe(model: Any, image: Image.Image | str | Path | EncodedImage,
             prune: str = "cls_attention", keep: Keep = "50%", mode: str = "gap",
             seed: int = 0, *, max_new_tokens: int = MAX_NEW_TOKENS,
             drafts: bool = True) -> Answered:
    """Say what is in a picture; the arguments are those of `ground`."""
    return ground(model, image, DESCRIBE, prune, keep, mode, seed, max_new_tokens=max_new_tokens,
                  drafts=drafts, question=DESCRIBE)


def ground_all(model: Any, image: Image.Image | str | Path | EncodedImage,
               expressions: Iterable[str], prune: str = "cls_attention", keep: Keep = "50%",
               mode: str = "gap", seed: int = 0, *, max_new_tokens: int = MAX_NEW_TOKENS,
               drafts: bool = True) -> list[Answered]:
    """Find what each of many expressions refers to in one picture, faster than one by one.

    expressions: any number of them; the other arguments are those of `ground`
    returns:     for each what `ground` returns; of the milliseconds, an equal share of what all
                 of them took
    raises:      NanogapError as `ground` does, before anything is asked
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
    runs = [asked._replace(prune=find(asked.prune)) for asked in runs]
    encode = cache(model.encode_question)              # many runs may ask the same
    lanes = [lanes_of(model, encoded, encode, asked, seed, max_new_tokens) for asked in runs]
    form = foretell(model.box_format, model.tokenizer) if drafts else ()
    ask(model, [lane for of_run in lanes for lane in of_run], form, max_new_tokens)
    cells, answers = model.cells(encoded), []
    for asked, of_run in zip(runs, lanes, strict=True):
        results: list[Result] = [
            result for lane in of_run for result in results_of(model, encoded, lane)]
        if asked.cuts:
            results += [reader.ground(model, encoded, expression, asked.prune, asked.keep,
                                      asked.mode, seed, max_new_tokens=max_new_tokens,
                                      question=asked.question)
                        for expression in asked.expressions]
        answers.append([Answered(**vars(result), expression=expression, prune=asked.strategy,
                                 mode=asked.mode, cells=cells)
                        for result, expression in zip(results, asked.expressions, strict=True)])
    return answers


def lanes_of(model: Any, encoded: EncodedImage, encode: Callable[[str], Tensor], asked: Asked,
             seed: int, max_new_tokens: int) -> list[Lane]:
    """Questions that share what is kept of the picture, TOGETHER at most, in a lane.

    Each has its own where what is kept depends on it, or where it stands before the image.
    """
    prompts = [encode(asked.question or model.question(each)) for each in asked.expressions]
    for prompt in prompts:
        check_lengths(model, prompt, encoded, max_new_tokens)
    if asked.cuts or not prompts:
        return []
    needs = needs_of(asked.strategy) if asked.strategy else frozenset()
    reads = not needs.isdisjoint({"text", "question"})
    alone = reads or model.around_image(prompts[0])[0] >= begin_alike(prompts)
    size = 1 if alone else TOGETHER
    return [lane_of(model, encoded, asked, asked.expressions[i], prompts[i:i + size], seed)
            for i in range(0, len(prompts), size)]


def lane_of(model: Any, encoded: EncodedImage, asked: Asked, expression: str,
            prompts: Sequence[Tensor], seed: int) -> Lane:
    """Select and lay out, for prompts (P + 1 + A,) that begin alike."""
    start, alike = clock_ms(model.device), begin_alike(prompts)
    kept = choose(model, encoded, expression, asked.prune, asked.keep, asked.mode, seed)
    questions = []
    for prompt in prompts:
        P, A = model.around_image(prompt)
        layout = lay_out(kept.ranked, P, encoded.n_visual, A, asked.mode, kept.n_added)
        questions.append(Question(prompt[alike:].tolist(), layout))
    layout = questions[0].layout
    x = model.embed(prompts[0][:alike], encoded, kept, layout.order)          # (1, S, C)
    return Lane(x, layout.position_ids[:x.shape[1]], questions, kept.n_added,
                clock_ms(model.device) - start)


def check_lengths(model: Any, prompt: Tensor, image: EncodedImage, max_new_tokens: int) -> None:
    """Refuse what leaves no answer, and a prompt (P + 1 + A,) longer than the model can number."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise NanogapError(f"max_new_tokens is {max_new_tokens!r:.80}: give a whole number from 1")
    model.check_length(len(prompt) - 1 + image.n_visual + max_new_tokens)


def begin_alike(prompts: Sequence[Tensor]) -> int:
    """How many tokens all prompts begin with; of each, the last is its own."""
    columns = zip(*(prompt[:-1].tolist() for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def results_of(model: Any, image: EncodedImage, lane: Lane) -> list[Result]:
    """What the lesson's `ground` returns for each question; its cache holds the rows it saw."""
    times = {"vision_ms": image.vision_ms, "prefill_ms": lane.prefill_ms / len(lane.questions),
             "decode_ms": lane.decode_ms / len(lane.questions)}
    results = []
    for q in lane.questions:
        text = model.tokenizer.decode(q.said)
        results.append(Result(
            text=text, box=model.box_in(text, image.width, image.height),
            keep=q.layout.kept, visual_tokens=len(q.layout.kept) + lane.n_added,
            position_ids=q.layout.position_ids, next_position=q.layout.next_position,
            tokens=q.said, cut_off=q.said[-1] not in model.end_tokens,
            timings=times | {"new_tokens": len(q.said), "passes": q.passes - 1},
            kv_bytes=row_bytes(model) * (lane.x.shape[1] + q.read)))
    return results
