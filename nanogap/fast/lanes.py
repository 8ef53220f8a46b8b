"""Questions that share a cache, and caches that share passes.

Prompts about one picture begin alike: the words before it, the visual tokens, the first words of
the question.  That is read once.  What follows of each question lies side by side in the same
cache, and one pass of the decoder brings every question its next tokens: it reads the weights once
for all of them.  Three questions, A, B and C, whose prompts have 60 tokens in common:

    row            0 ... 59    60 61 62 63    64 65 66    67 68 69 70 71    72  73  74
    whose          all         A  A  A  A     B  B  B     C  C  C  C  C     A   B   C
    position ID    0 ... 59    60 61 62 63    60 61 62    60 61 62 63 64    64  63  65
                   the image   the rest of each prompt                      a token of each answer

A token sees the rows of all, and the earlier ones of its own question: a mask says so.  Its
position ID is the one that it has alone (gap.py), for the row says nothing about it.  Drafts lie
there too: after a pass the rows of those that were wrong are given up.
Where a picture is asked about under several prunings, each has such a cache, a lane, and the lanes
share the passes: only attention looks into each cache on its own.
Letters: S tokens that are shared, T fed in a pass, R rows in the cache, C channels, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

from nanogap.errors import NanogapError
from nanogap.fast.decode import Form, Question, draft
from nanogap.fast.decoder import Part, run
from nanogap.ground import NOT_FINITE
from nanogap.llama import KVCache, LlamaConfig
from nanogap.llava import clock_ms

CACHES = 1 << 30    # bytes of all caches that share passes, if there are several
SHARED = -1         # whose the rows are that all questions share
# Where a choice is drafted, its alternatives save a pass.  With more questions in a pass than
# these, their rows take longer than that pass:
CHOICES = {"cpu": 3, "cuda": 25}


def mask_of(owner: Tensor, position_ids: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """Which of R rows the tokens in the last T see: (T, R), 0 where they do, else -inf.

    owner:        (R,) the number of the question whose token is in a row, or SHARED
    position_ids: (R,) of these tokens; a question's own go up, and those of a choice share one
    """
    rows = torch.arange(len(owner), device=owner.device)
    own = owner == owner[-T:, None]                                           # (T, R)
    earlier = position_ids < position_ids[-T:, None]                          # (T, R)
    itself = rows == rows[-T:, None]                                          # (T, R)
    sees = (owner == SHARED) | own & earlier | itself
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, float("-inf"))


@dataclass
class Lane:
    """Questions under one pruning, and a cache in which they stand behind what they share."""

    x: Tensor                 # (1, S, C) embeddings of what they share
    position_ids: Tensor      # (S,) of that; later (R,), of all that the cache holds
    questions: list[Question]
    n_added: int = 0          # visual tokens that the pruning added
    prefill_ms: float = 0.0   # so far
    decode_ms: float = 0.0

    def rows(self, longest: int) -> int:
        """Rows for what the questions share, and for answers and drafts of `longest` tokens."""
        return self.x.shape[1] + sum(len(q.text) + longest for q in self.questions)

    def begin(self, config: LlamaConfig, longest: int) -> Part:
        """Make the cache, into which the next pass reads what the questions share."""
        self.cache = KVCache(config, self.rows(longest), self.x)
        self.position_ids = self.position_ids.to(self.x.device)
        self.owner = torch.full_like(self.position_ids, SHARED)               # (R,)
        return Part(self.cache, self.x.shape[1], None)

    def open(self) -> list[Question]:
        """The questions that are not answered yet."""
        return [q for q in self.questions if not q.answered]

    def feed(self, form: Form, max_new_tokens: int, choices: bool) -> tuple[Tensor, Tensor, Part]:
        """The tokens (T,) of the next pass, and their position IDs (T,); they get the next rows."""
        fed = []
        for number, q in enumerate(self.questions):
            if not q.answered:
                drafted = draft(form, q.said, max_new_tokens - len(q.said) - 1, choices)
                fed += [(*each, number) for each in q.feed(drafted)]
        tokens, position_ids, owner = torch.tensor(fed, device=self.owner.device).T
        self.position_ids = torch.cat([self.position_ids, position_ids])      # (R,)
        self.owner = torch.cat([self.owner, owner])                           # (R,)
        mask = None                                    # one token of the only question sees all
        if len(fed) > 1 or len(self.questions) > 1:
            mask = mask_of(self.owner, self.position_ids, len(fed), self.x.dtype)
        return tokens, position_ids, Part(self.cache, len(fed), mask)

    def hear(self, greedy: Iterator[int], max_new_tokens: int, ends: Collection[int]) -> None:
        """Take the likeliest token behind each that was fed; rows of wrong drafts are given up."""
        row = start = len(self.owner) - sum(q.fed for q in self.open())
        stay: list[int] = []
        for q in self.open():
            right = q.hear([*islice(greedy, q.fed)], max_new_tokens, ends)
            stay += range(row, row + right)
            row += q.fed
        if not self.open():
            del self.cache
            return
        end = start + len(stay)
        if stay[-1] >= end:                            # not in one piece: they are moved together
            rows = torch.tensor(stay, device=self.owner.device)
            for numbers in (self.owner, self.position_ids):                   # (R,)
                numbers[start:end] = numbers[rows]
            for held in (self.cache.keys, self.cache.values):                 # (..., R, D)
                held[..., start:end, :] = held[..., rows, :]
        self.owner, self.position_ids = self.owner[:end], self.position_ids[:end]
        self.cache.lengths = [end] * len(self.cache.lengths)


@torch.inference_mode()                                                       # no_grad, but faster
def ask(model: Any, lanes: Sequence[Lane], form: Form, max_new_tokens: int) -> None:
    """Answer the questions of all lanes: as many lanes at a time as there is memory for."""
    longest = max_new_tokens + max(map(len, form), default=0)
    for asked in together(lanes, longest, row_bytes(model)):
        prompts = [lane.begin(model.config.text, longest) for lane in asked]
        while asked:
            step(model, asked, form, max_new_tokens, prompts)
            asked, prompts = [lane for lane in asked if lane.open()], []


def row_bytes(model: Any) -> int:
    """Keys and values of a token, in all layers."""
    c = model.config.text
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize


def together(lanes: Sequence[Lane], longest: int, row_bytes: int) -> Iterator[Sequence[Lane]]:
    """Lanes that share their passes: as many as CACHES allows, and one at least."""
    while lanes:
        sizes = accumulate(lane.rows(longest) * row_bytes for lane in lanes)
        number = max(sum(size <= CACHES for size in sizes), 1)
        yield lanes[:number]
        lanes = lanes[number:]


def step(model: Any, lanes: Sequence[Lane], form: Form, max_new_tokens: int,
         prompts: Sequence[Part]) -> None:
    """One pass that brings each question its next tokens.

    prompts: what the questions of each lane share, in the first pass; it is read before them
    """
    start, device, decoder = clock_ms(model.device), model.device, model.language_model.model
    choices = sum(len(lane.open()) for lane in lanes) <= CHOICES.get(device.type, CHOICES["cpu"])
    fed = [lane.feed(form, max_new_tokens, choices) for lane in lanes]
    parts = [part for _, _, part in fed]
    tokens = torch.cat([tokens for tokens, _, _ in fed])                      # (T,)
    position_ids = torch.cat([ids for _, ids, _ in fed])                      # (T,)
    x = decoder.embed_tokens(tokens)[None]                                    # (1, T, C)
    if prompts:
        x = torch.cat([*(lane.x for lane in lanes), x], dim=1)
        shared = [lane.position_ids[:lane.x.shape[1]] for lane in lanes]
        position_ids = torch.cat([*shared, position_ids])
    if model.next_pass and not prompts and len(lanes) == len(lanes[0].questions) == 1:
        hidden = model.next_pass(x, position_ids, parts[0])
    else:
        hidden = run(decoder, x, position_ids, [*prompts, *parts], len(tokens))
    logits = model.language_model.logits(hidden)                              # (T, V)
    if not bool(logits.isfinite().all()):
        raise NanogapError(NOT_FINITE)
    greedy = iter(logits.argmax(-1).tolist())
    for lane in lanes:
        lane.hear(greedy, max_new_tokens, model.end_tokens)
    spent = clock_ms(device) - start
    for lane, part in zip(lanes, parts, strict=True):
        if prompts:
            lane.prefill_ms += spent * (lane.x.shape[1] + part.size) / x.shape[1]
        else:
            lane.decode_ms += spent * part.size / x.shape[1]
