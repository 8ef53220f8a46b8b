"""Many questions about one picture, in one cache.

In:  a model, a picture, expressions, and how to prune.
Out: a Result for each expression, with the words that it gets alone.

Prompts about one picture begin alike: the words before it, the visual tokens, the first words of
the question.  That is read once.  What follows of each question lies side by side in the same
cache, and one pass of the decoder brings every question its next tokens: it reads the weights once
for all of them.  Three questions, A, B and C, whose prompts have 60 tokens in common:

    row            0 ... 59    60 61 62 63    64 65 66    67 68 69 70 71    72  73  74
    whose          all         A  A  A  A     B  B  B     C  C  C  C  C     A   B   C
    position ID    0 ... 59    60 61 62 63    60 61 62    60 61 62 63 64    64  63  65
                   the image   the rest of each prompt                      a token of each answer

A token sees the rows of all, and the earlier ones of its own question: a mask says so.  Its
position ID is the one that it has alone (gap.py), for the row says nothing about it.  There is no
batch dimension and no padding.  Drafts (draft.py) lie there too: after a pass the rows of those
that were wrong are given up.  A question that is answered is fed nothing more.
Letters: S tokens that all prompts begin with, A tokens after the image, T tokens fed in a pass, D
of them drafted for one question, R rows in the cache, C channels, V vocabulary.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanogap.errors import NanogapError
from nanogap.fast.answered import Answered, answered
from nanogap.fast.decoder import Cache, as_scores, likeliest, run
from nanogap.fast.draft import NOTHING, Draft, Form, accepted, draft, foretell
from nanogap.fast.ground import check_lengths, ground
from nanogap.gap import Layout, lay_out
from nanogap.ground import MAX_NEW_TOKENS, Keep, Result, choose
from nanogap.llama import LlamaForCausalLM
from nanogap.llava import EncodedImage, clock_ms
from nanogap.methods import find
from nanogap.methods.in_decoder import prunes_there
from nanogap.prune import Kept, needs_of

TOGETHER = 32   # questions in the cache at a time, which bounds it
ALL = -1        # whose the rows are that all questions share
# Where a choice is drafted, its alternatives save a pass.  With more of them in a pass than these,
# their rows take longer than that pass:
ROWS = {"cpu": 32, "cuda": 256}


@torch.no_grad()
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
    encoded: EncodedImage = model.encode_image(image)
    name, start = find(prune), clock_ms(model.device)
    expressions = list(expressions)
    prompts = [model.encode_question(model.question(expression)) for expression in expressions]
    for prompt in prompts:
        check_lengths(model, prompt, encoded, max_new_tokens)
    if not prompts:
        return []
    alike = begin_alike(prompts)
    P, _ = model.around_image(prompts[0])
    if P >= alike or reads_question(name, keep, mode):
        return [ground(model, encoded, expression, name, keep, mode, seed,
                       max_new_tokens=max_new_tokens, drafts=drafts) for expression in expressions]
    kept = choose(model, encoded, "", name, keep, mode, seed)

    def layout_of(input_ids: Tensor) -> Layout:
        P, A = model.around_image(input_ids)
        return lay_out(kept.ranked, P, encoded.n_visual, A, mode, kept.n_added)

    questions = [Question(number, prompt[alike:].tolist(), layout_of(prompt))
                 for number, prompt in enumerate(prompts)]
    shared = layout_of(prompts[0][:alike])
    x = model.embed(prompts[0][:alike], encoded, kept, shared.order)          # (1, S, C)
    form = foretell(model.box_format, model.tokenizer) if drafts else ()
    prefill_ms, decode_ms, row_bytes = together(
        model, x, shared, questions, form, max_new_tokens, start)
    times = {"vision_ms": encoded.vision_ms, "prefill_ms": prefill_ms / len(questions),
             "decode_ms": decode_ms / len(questions)}
    results = [result(model, encoded, q, kept, times, row_bytes * (x.shape[1] + q.read))
               for q in questions]
    return [answered(one, model.cells(encoded), expression, name, mode)
            for one, expression in zip(results, expressions, strict=True)]


def reads_question(prune: str, keep: Keep, mode: str) -> bool:
    """Whether what is kept depends on the question."""
    pruned = mode != "full" and not isinstance(keep, Tensor | list | tuple)
    return pruned and (prunes_there(prune) or bool(needs_of(prune) & {"text", "question"}))


def begin_alike(prompts: Sequence[Tensor]) -> int:
    """How many tokens all prompts begin with; of each, the last is its own."""
    columns = zip(*(prompt[:-1].tolist() for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


@torch.inference_mode()                                                       # no_grad, but faster
def together(model: Any, x: Tensor, layout: Layout, questions: "Sequence[Question]", form: Form,
             max_new_tokens: int, start: float) -> tuple[float, float, int]:
    """Ask all at once: milliseconds until their first tokens, then to the end; bytes of a row.

    x:      (1, S, C) what their prompts begin with, laid out so
    start:  when the clock began
    """
    groups = [questions[i:i + TOGETHER] for i in range(0, len(questions), TOGETHER)]
    most = max_new_tokens + max(map(len, form), default=0)
    room = max(sum(len(q.text) + most for q in group) for group in groups)
    decoder = model.language_model.model
    cache = Cache(decoder.config, x.shape[1] + room, x)
    run(decoder, x, layout.position_ids.to(x.device), cache, last=1)
    row_bytes = cache.bytes_in_use() // x.shape[1]
    lanes = Lanes(model.language_model, cache, form, max_new_tokens, model.end_tokens)
    prefill_ms = clock_ms(x.device) - start
    for group in groups:
        begun = clock_ms(x.device)
        unanswered = lanes.step(group)                                        # reads their texts
        prefill_ms += clock_ms(x.device) - begun
        while unanswered:
            unanswered = lanes.step(unanswered)
        lanes.retain(x.shape[1], [])
    return prefill_ms, clock_ms(x.device) - start - prefill_ms, row_bytes


# ----- questions beside one another ---------------------------------------------------------------


@dataclass
class Question:
    """What is one question's own: the rest of its prompt, and then its answer."""

    number: int               # whose its rows are
    text: list[int]           # the rest of its prompt
    layout: Layout            # of its whole prompt, as it is alone
    said: list[int] = field(default_factory=list)
    read: int = 0             # how many of these tokens, text and said, have a row
    drafted: Draft = NOTHING
    passes: int = 0           # the first of them reads its text

    def feed(self) -> list[tuple[int, int]]:
        """Tokens for the next pass and their places: what has no row yet, and what is drafted.

        A place counts a question's own tokens; those of a choice share one.
        """
        own = self.text + self.said
        tokens = [*own[self.read:], *self.drafted.tokens]
        places = [*range(self.read, len(own)), *self.drafted.places(len(own))]
        return list(zip(tokens, places, strict=True))

    def position_id(self, place: int) -> int:
        """As it is alone: its answer begins at next_position, and its text ends there."""
        return self.layout.next_position + place - len(self.text)

    def hear(self, new: Sequence[int], ends: Collection[int]) -> None:
        """Take what was said, up to its end."""
        for token in new:
            if not self.ended(ends):
                self.said.append(token)

    def ended(self, ends: Collection[int]) -> bool:
        """Whether its last token ends an answer."""
        return bool(self.said) and self.said[-1] in ends


def result(model: Any, image: EncodedImage, q: Question, kept: Kept, times: dict,
           kv_bytes: int) -> Result:
    """What `ground` returns for a question; kv_bytes are those of the rows that it saw."""
    text = model.tokenizer.decode(q.said)
    return Result(
        box=model.box_in(text, image.width, image.height),
        text=text,
        keep=q.layout.kept,
        visual_tokens=len(q.layout.kept) + kept.n_added,
        position_ids=q.layout.position_ids,
        next_position=q.layout.next_position,
        tokens=q.said,
        timings=times | {"new_tokens": len(q.said), "passes": q.passes - 1},
        kv_bytes=kv_bytes,
        cut_off=not q.ended(model.end_tokens))


def mask_of_lanes(owner: Tensor, place: Tensor, T: int) -> Tensor:
    """Which of R rows the tokens in the last T see: (T, R) of bool.

    owner: (R,) the number of the question whose token is in a row, or ALL
    place: (R,) which of its tokens it is
    """
    rows = torch.arange(len(owner), device=owner.device)
    own = owner == owner[-T:, None]                                           # (T, R)
    earlier = place < place[-T:, None]                                        # (T, R)
    itself = rows == rows[-T:, None]                                          # (T, R)
    return (owner == ALL) | own & earlier | itself


class Lanes:
    """A cache in which questions stand side by side, behind what they share."""

    def __init__(self, model: LlamaForCausalLM, cache: Cache, form: Form, max_new_tokens: int,
                 ends: Collection[int]) -> None:
        self.model, self.cache = model, cache
        self.form, self.max_new_tokens, self.ends = form, max_new_tokens, ends
        device = cache.keys.device
        widest = max(map(len, form), default=1)
        self.few = ROWS.get(device.type, ROWS["cpu"]) // widest               # questions
        self.owner = torch.full((cache.lengths[0],), ALL, device=device)   # (R,) or ALL
        self.place = torch.zeros_like(self.owner)                             # (R,)

    def step(self, questions: Sequence[Question]) -> list[Question]:
        """One pass that brings each question its next tokens; returns those not yet answered."""
        for q in questions:
            drafted = draft(self.form, q.said, self.max_new_tokens - len(q.said) - 1)
            q.drafted = drafted if len(questions) <= self.few else Draft(drafted.chain)
        fed = [q.feed() for q in questions]
        start = row = len(self.owner)
        best = iter(likeliest(self.logits(questions, fed)))
        stay: list[int] = []
        for q, tokens in zip(questions, fed, strict=True):
            D = len(q.drafted.tokens)
            agreed, new = accepted([*islice(best, 1 + D)], q.drafted)
            right = len(tokens) - D + agreed               # the others were drafted in vain
            stay += range(row, row + right)
            row += len(tokens)
            q.read += right
            q.passes += 1
            q.hear(new, self.ends)
        self.retain(start, stay)
        return [q for q in questions
                if len(q.said) < self.max_new_tokens and not q.ended(self.ends)]

    def logits(self, questions: Sequence[Question], fed: Sequence[list[tuple[int, int]]]) -> Tensor:
        """A pass: logits behind the last token of each question, and behind each drafted one.

        fed: tokens and places, for each question
        """
        decoder, device = self.model.model, self.owner.device
        new = [(token, q.number, place, q.position_id(place))
               for q, pairs in zip(questions, fed, strict=True) for token, place in pairs]
        tokens, owner, place, position_ids = torch.tensor(new, device=device).T   # (T,) each
        self.owner = torch.cat([self.owner, owner])                           # (R,)
        self.place = torch.cat([self.place, place])                           # (R,)
        x = decoder.embed_tokens(tokens)[None]                                # (1, T, C)
        mask = as_scores(mask_of_lanes(self.owner, self.place, len(new)), x.dtype)
        hidden = run(decoder, x, position_ids, self.cache, mask=mask)[0]      # (T, C)
        parts = hidden.split([len(pairs) for pairs in fed])
        ends = [part[-1 - len(q.drafted.tokens):]
                for q, part in zip(questions, parts, strict=True)]
        return self.model.logits(torch.cat(ends))                             # (.., V)

    def retain(self, start: int, rows: Sequence[int]) -> None:
        """Of the rows from `start` on only these stay."""
        if start + len(rows) == len(self.owner):
            return                                                            # all of them
        stay = torch.tensor([*range(start), *rows], device=self.owner.device)
        self.owner, self.place = self.owner[stay], self.place[stay]
        self.cache.retain(start, stay[start:])
