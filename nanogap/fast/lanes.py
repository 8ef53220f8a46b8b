"""Questions that share a cache, and caches that share passes.

In:  the questions of each lane, laid out (see ground_all.py).  Out: their answers.

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
Where a picture is asked about under several prunings, each has such a cache, a lane, and the lanes
share the passes: only attention looks into each cache on its own.
Letters: S tokens that all prompts begin with, T tokens fed in a pass, D of them drafted for one
question, R rows in the cache, H heads, G key-value heads, C channels, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nanogap.fast.decoder import Cache, Look, as_scores, attend, likeliest, run_layers
from nanogap.fast.draft import NOTHING, Draft, Form, accepted, draft
from nanogap.gap import Layout
from nanogap.ground import Result
from nanogap.llama import LlamaConfig, LlamaForCausalLM, LlamaModel
from nanogap.llava import EncodedImage, clock_ms
from nanogap.prune import Kept

# What bounds memory: questions in a cache at a time, and twice as many in a pass; and the bytes of
# all caches at a time, if there are several
TOGETHER, CACHES = 32, 1 << 30
ALL = -1        # whose the rows are that all questions share
# Where a choice is drafted, its alternatives save a pass.  With more of them in a pass than these,
# their rows take longer than that pass:
ROWS = {"cpu": 32, "cuda": 256}


# ----- questions beside one another ---------------------------------------------------------------


@dataclass
class Question:
    """What is one question's own: the rest of its prompt, and then its answer."""

    number: int               # whose its rows are
    text: list[int]           # the rest of its prompt
    layout: Layout            # of its whole prompt, as it is alone
    said: list[int] = field(default_factory=list)
    read: int = 0             # how many of these tokens, text and said, have a row
    passes: int = 0           # the first of them reads its text
    drafted: Draft = NOTHING
    fed: list[tuple[int, int, int, int]] = field(default_factory=list)   # in the next pass

    def feed(self, drafted: Draft) -> None:
        """Feed the next pass what has no row yet, and a draft.

        Each token comes with the question's number, its place and its position ID.  A place counts
        the question's own tokens; those of a choice share one.
        """
        own = self.text + self.said
        tokens = [*own[self.read:], *drafted.tokens]
        places = [*range(self.read, len(own)), *drafted.places(len(own))]
        # as alone: the answer begins at next_position, and the text ends there
        first = self.layout.next_position - len(self.text)
        self.drafted = drafted
        self.fed = [(token, self.number, place, first + place)
                    for token, place in zip(tokens, places, strict=True)]

    def hear(self, new: Sequence[int], ends: Collection[int]) -> None:
        """Take what was said, up to its end."""
        for token in new:
            if not self.ended(ends):
                self.said.append(token)

    def ended(self, ends: Collection[int]) -> bool:
        """Whether its last token ends an answer."""
        return bool(self.said) and self.said[-1] in ends


def mask_of_lane(owner: Tensor, place: Tensor, T: int) -> Tensor:
    """Which of R rows the tokens in the last T see: (T, R) of bool.

    owner: (R,) the number of the question whose token is in a row, or ALL
    place: (R,) which of its tokens it is
    """
    rows = torch.arange(len(owner), device=owner.device)
    own = owner == owner[-T:, None]                                           # (T, R)
    earlier = place < place[-T:, None]                                        # (T, R)
    itself = rows == rows[-T:, None]                                          # (T, R)
    return (owner == ALL) | own & earlier | itself


@dataclass
class Lane:
    """One pruning, and a cache in which its questions stand side by side, behind what they share.
    """

    kept: Kept
    layout: Layout            # of what they share
    x: Tensor                 # (1, S, C) its embeddings
    questions: list[Question]
    prefill_ms: float         # so far
    decode_ms: float = 0.0
    mask: Tensor | None = None     # (T, R) for the next pass; none for what they share

    def __post_init__(self) -> None:
        self.groups = [self.questions[i:i + TOGETHER]                         # still to be answered
                       for i in range(0, len(self.questions), TOGETHER)]

    def rows(self, longest: int) -> int:
        """Rows for what the questions share, and for answers of at most `longest` tokens."""
        return self.x.shape[1] + max(sum(len(q.text) + longest for q in group)
                                     for group in self.groups)

    def row_bytes(self, config: LlamaConfig) -> int:
        """Keys and values of a token, in all layers."""
        numbers = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return 2 * numbers * self.x.element_size()

    def begin(self, config: LlamaConfig, longest: int) -> None:
        """Make the cache."""
        S, device = self.x.shape[1], self.x.device
        self.cache = Cache(config, self.rows(longest), self.x)
        self.owner = torch.full((S,), ALL, device=device)                     # (R,)
        self.place = torch.zeros_like(self.owner)                             # (R,)

    def feed(self) -> Tensor:
        """What the next pass is fed (T, 4), as in `Question.feed`; the mask is made for it."""
        fed = torch.tensor([token for q in self.groups[0] for token in q.fed],
                           device=self.owner.device)
        self.owner = torch.cat([self.owner, fed[:, 1]])                       # (R,)
        self.place = torch.cat([self.place, fed[:, 2]])                       # (R,)
        self.mask = as_scores(mask_of_lane(self.owner, self.place, len(fed)), self.x.dtype)
        return fed

    def hear(self, best: Iterator[int], max_new_tokens: int, ends: Collection[int]) -> None:
        """Take the likeliest tokens, behind what was said and behind each drafted token."""
        row = start = len(self.owner) - sum(len(q.fed) for q in self.groups[0])
        stay: list[int] = []
        for q in self.groups[0]:
            fed, D = len(q.fed), len(q.drafted.tokens)
            agreed, new = accepted([*islice(best, 1 + D)], q.drafted)
            right = fed - D + agreed                       # the others were drafted in vain
            stay += range(row, row + right)
            row += fed
            q.read += right
            q.passes += 1
            q.hear(new, ends)
        self.groups[0] = [q for q in self.groups[0]
                          if len(q.said) < max_new_tokens and not q.ended(ends)]
        if self.groups[0]:
            self.retain(start, stay)
        else:
            self.groups.pop(0)
            self.retain(self.x.shape[1], [])

    def retain(self, start: int, rows: Sequence[int]) -> None:
        """Of the rows from `start` on only these stay."""
        if start + len(rows) == len(self.owner):
            return                                                            # all of them
        stay = torch.tensor([*range(start), *rows], device=self.owner.device)
        self.owner, self.place = self.owner[stay], self.place[stay]
        self.cache.retain(start, stay[start:])

    def results(self, model: Any, image: EncodedImage) -> list[Result]:
        """What `ground` returns for each question; its cache holds the rows that it saw."""
        times = {"vision_ms": image.vision_ms, "prefill_ms": self.prefill_ms / len(self.questions),
                 "decode_ms": self.decode_ms / len(self.questions)}
        row_bytes = self.row_bytes(model.config.text)
        results = []
        for q in self.questions:
            text = model.tokenizer.decode(q.said)
            results.append(Result(
                box=model.box_in(text, image.width, image.height), text=text,
                keep=q.layout.kept, visual_tokens=len(q.layout.kept) + self.kept.n_added,
                position_ids=q.layout.position_ids, next_position=q.layout.next_position,
                tokens=q.said, cut_off=not q.ended(model.end_tokens),
                timings=times | {"new_tokens": len(q.said), "passes": q.passes - 1},
                kv_bytes=row_bytes * (self.x.shape[1] + q.read)))
        return results


# ----- lanes beside one another -------------------------------------------------------------------


@torch.inference_mode()                                                       # no_grad, but faster
def ask(model: Any, lanes: Sequence[Lane], form: Form, max_new_tokens: int) -> None:
    """Answer the questions of all lanes: as many lanes at a time as there is room for."""
    longest = max_new_tokens + max(map(len, form), default=0)
    for asked in together(lanes, model.config.text, longest):
        begin(model.language_model.model, asked, longest)
        while asked:
            step(model.language_model, asked, form, max_new_tokens, model.end_tokens)
            for lane in asked:
                if not lane.groups:
                    del lane.cache
            asked = [lane for lane in asked if lane.groups]


def together(lanes: Sequence[Lane], config: LlamaConfig, longest: int) -> Iterator[list[Lane]]:
    """Lanes that share their passes: as many as the bounds on memory allow, and one at least."""
    asked: list[Lane] = []
    questions = size = 0
    for lane in lanes:
        count, needed = len(lane.groups[0]), lane.rows(longest) * lane.row_bytes(config)
        if asked and (questions + count > 2 * TOGETHER or size + needed > CACHES):
            yield asked
            asked, questions, size = [], 0, 0
        asked.append(lane)
        questions, size = questions + count, size + needed
    if asked:
        yield asked


def begin(decoder: LlamaModel, lanes: Sequence[Lane], longest: int) -> None:
    """One pass that reads what the questions of each lane share."""
    start, device = clock_ms(lanes[0].x.device), lanes[0].x.device
    for lane in lanes:
        lane.begin(decoder.config, longest)
    sizes = [lane.x.shape[1] for lane in lanes]
    x = torch.cat([lane.x for lane in lanes], dim=1)                          # (1, T, C)
    position_ids = torch.cat([lane.layout.position_ids for lane in lanes]).to(device)   # (T,)

    def write(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keys and values are all that is wanted of the last layer."""
        append(lanes, sizes, layer, k, v)
        return q

    run_layers(decoder, x, position_ids, look_into_each(lanes, sizes), 1, write)
    spent = clock_ms(device) - start
    for lane, size in zip(lanes, sizes, strict=True):
        lane.prefill_ms += spent * size / sum(sizes)


def step(model: LlamaForCausalLM, lanes: Sequence[Lane], form: Form, max_new_tokens: int,
         ends: Collection[int]) -> None:
    """One pass that brings each question its next tokens."""
    start, device = clock_ms(lanes[0].x.device), lanes[0].x.device
    questions = [q for lane in lanes for q in lane.groups[0]]
    few = len(questions) * max(map(len, form), default=1) <= ROWS.get(device.type, ROWS["cpu"])
    for q in questions:
        drafted = draft(form, q.said, max_new_tokens - len(q.said) - 1)
        q.feed(drafted if few else Draft(drafted.chain))
    fed = [lane.feed() for lane in lanes]
    best = iter(likeliest(logits_of(model, lanes, fed)))
    prompts_read = [lane.groups[0][0].passes == 0 for lane in lanes]
    for lane in lanes:
        lane.hear(best, max_new_tokens, ends)
    spent = clock_ms(device) - start
    for lane, tokens, prompt_read in zip(lanes, fed, prompts_read, strict=True):
        share = spent * len(tokens) / sum(map(len, fed))
        if prompt_read:
            lane.prefill_ms += share
        else:
            lane.decode_ms += share


def logits_of(model: LlamaForCausalLM, lanes: Sequence[Lane], fed: Sequence[Tensor]) -> Tensor:
    """A pass: logits (.., V) behind the last token of each question, and behind each drafted one.

    fed: for each lane (T, 4), as in `Question.feed`
    """
    tokens, _, _, position_ids = torch.cat([*fed]).T                          # (T,) each
    look = look_into_each(lanes, [*map(len, fed)])
    x = model.model.embed_tokens(tokens)[None]                                # (1, T, C)
    hidden = run_layers(model.model, x, position_ids, look, len(tokens), look)[0]     # (T, C)
    rows: list[int] = []
    end = 0
    for q in (q for lane in lanes for q in lane.groups[0]):
        end += len(q.fed)
        rows += range(end - 1 - len(q.drafted.tokens), end)
    return model.logits(hidden[rows])


def look_into_each(lanes: Sequence[Lane], sizes: Sequence[int]) -> Look:
    """The tokens of each lane, so many, look into its cache."""
    def look(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = append(lanes, sizes, layer, k, v)
        return torch.cat([attend(q, k, v, lane.mask) for lane, q, (k, v) in
                          zip(lanes, q.split(sizes, 2), rows, strict=True)], dim=2)   # (1, H, T, D)
    return look


def append(lanes: Sequence[Lane], sizes: Sequence[int], layer: int, k: Tensor,
           v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Write keys and values (1, G, T, D) into each lane's cache; all of its rows so far."""
    return [lane.cache.append(layer, k, v) for lane, k, v in
            zip(lanes, k.split(sizes, 2), v.split(sizes, 2), strict=True)]
