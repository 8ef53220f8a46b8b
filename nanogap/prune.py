"""Pruning strategies: which patches to keep, and what some methods make of the others.

In:  what the vision tower saw in an image, and a budget.  Out: indices of what to keep, ranked.
A strategy is a pure function `(seen, budget, generator) -> Kept`, and `@strategy` says what it
needs to see.  It ranks; the mode (gap.py) decides what becomes of the order and of the IDs.  Each
does what its published code does; `differs:` and `open:` mark where not, and why.
Letters: N patches, K kept, M tokens added, C channels, H heads, D channels of a head.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nanogap.errors import NanogapError

FIELDS = {   # what a strategy may need to see, besides the features
    "cls":           "(C,)        the CLS token after the feature layer, the tower's last but one",
    "cls_attention": "(H, N)      how much CLS attends to each patch in the feature layer",
    "keys":          "(N, D)      the feature layer's keys, the mean over heads",
    "last_queries":  "(1 + N, C)  the next layer's queries, CLS first: heads not split",
    "last_keys":     "(1 + N, C)  and its keys; both its own, where the feature layer is the last",
    "projected":     "(N, C')     patches as the decoder is fed them",
    "aligned":       "(N, E)      patches in CLIP's space of images and texts",
    "text":          "(E,)        the expression in that space",
}


@dataclass(frozen=True)
class VisualTokens:
    """A rectangle of patches as a vision tower saw them: what a strategy may look at."""
    features: Tensor             # (N, C) after the feature layer, in raster order
    rows: int
    columns: int                 # N = rows * columns
    fields: dict[str, Tensor] = field(default_factory=dict)   # what was needed: see FIELDS

    def __getattr__(self, name: str) -> Tensor:
        """A field, such as seen.cls_attention, if the strategy asked for it."""
        if name in self.__dict__.get("fields", {}):
            return self.fields[name]
        raise AttributeError(f"`{name}` is not there: @strategy(needs={{...}}) asks for it, and "
                             f"may name {', '.join(FIELDS)}")


@dataclass(frozen=True)
class Kept:
    """What is left of an image."""
    ranked: Tensor                    # (K,)    raster indices, in the method's own order
    features: Tensor | None = None    # (K, C)  not the patches' own, where others are merged in
    added: Tensor | None = None       # (M, C)  tokens without a place in the image: they go last

    @property
    def n_added(self) -> int:
        return 0 if self.added is None else len(self.added)


Strategy = Callable[[VisualTokens, Any, Generator], Kept]    # Any: a budget, or None as well
STRATEGIES: dict[str, Strategy] = {}


def strategy(needs: Iterable[str] = (),
             finds_budget: bool = False) -> Callable[[Strategy], Strategy]:
    """Enter a function in STRATEGIES, with the FIELDS that it needs to see.

    finds_budget: whether it is called with budget None as well, and finds one itself
    """
    if callable(needs):
        raise NanogapError("write @strategy() with its parentheses")
    needs = frozenset(needs)
    if not needs <= set(FIELDS):
        raise NanogapError(f"no strategy can see {', '.join(needs - set(FIELDS))}: choose from "
                           f"{', '.join(FIELDS)}")

    def enter(function: Strategy) -> Strategy:
        function.needs = needs                 # type: ignore[attr-defined]
        function.finds_budget = finds_budget   # type: ignore[attr-defined]
        STRATEGIES[function.__name__] = function
        return function

    return enter


def needs_of(name: str) -> frozenset[str]:
    """What a strategy needs to see; nothing where it does not say."""
    if name not in STRATEGIES:
        raise NanogapError(f"unknown strategy {name!r:.80}: choose from {', '.join(STRATEGIES)}")
    return getattr(STRATEGIES[name], "needs", frozenset())


def budget_of(keep: int | str | None, n_visual: int, prune: str) -> int | None:
    """How many visual tokens to keep: 64, "64" or "25%"; None or "auto": the strategy can tell."""
    needs_of(prune)                                              # refuses an unknown name
    finds_budget = getattr(STRATEGIES[prune], "finds_budget", False)
    if finds_budget and keep in (None, "auto"):
        return None
    words, budget = str(keep), 0
    with suppress(ValueError):                                   # words that are no number
        if not words.endswith("%"):
            budget = int(words)
        elif 0 < float(words[:-1]) <= 100:
            budget = max(1, round(n_visual * float(words[:-1]) / 100))
    if not 1 <= budget <= n_visual:
        raise NanogapError(f"{prune} cannot keep {keep!s:.80} of {n_visual} visual tokens: give a "
                           f"whole number from 1 to {n_visual}, or a share such as 25%"
                           + ", or auto" * finds_budget)
    return budget


def ranked(scores: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` highest scores (N,), highest first; ties go to the lower index."""
    return scores.argsort(descending=True, stable=True)[:budget]


def without(chosen: Tensor, n_visual: int) -> Tensor:
    """The other patches: raster indices (N - K,) of those not among `chosen` (K,)."""
    left = torch.ones(n_visual, dtype=torch.bool, device=chosen.device)
    left[chosen] = False
    return left.nonzero()[:, 0]


def outliers(scores: Tensor) -> int:
    """How many scores (N,) lie above Q3 + 1.5 (Q3 - Q1).  differs: where none does, one stays."""
    q1, q3 = scores.quantile(scores.new_tensor([0.25, 0.75]))
    return max(1, int((scores > q3 + 1.5 * (q3 - q1)).sum()))


@strategy()
def random(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
    """Any patches, in any order: the baseline that no score explains."""
    return Kept(torch.randperm(len(seen.features), generator=generator)[:budget])


@strategy()
def spatial(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
    """A regular 2-D grid of patches: every second row and column where a quarter is kept.

    open: the paper does not define it.  Here rows are evenly spaced, and patches within each.
    """
    R, C = seen.rows, seen.columns
    rows = min(budget, math.ceil((budget * R / C) ** 0.5))       # as far apart as columns are
    indices = []
    for row in range(rows):
        y = (2 * row + 1) * R // (2 * rows)
        count = budget * (row + 1) // rows - budget * row // rows   # patches in this row
        for i in range(count):
            x = (2 * i + 1) * C // (2 * count)
            indices.append(y * C + x)
    return Kept(torch.tensor(indices))


@strategy(needs={"cls"})
def cls_similarity(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
    """Patches most like CLS, by the cosine of features.  open: the paper does not define it."""
    scores = F.cosine_similarity(seen.features.float(), seen.cls.float(), dim=-1)
    return Kept(ranked(scores, budget))


@strategy(needs={"text", "aligned"})
def text_similarity(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
    """Patches most like the expression, in CLIP's space.  open: the paper does not define it."""
    scores = F.cosine_similarity(seen.aligned.float(), seen.text.float(), dim=-1)
    return Kept(ranked(scores, budget))


@strategy(needs={"cls_attention"})
def cls_attention(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
    """Patches that CLS attends to most, the mean over heads: FasterVLM, arXiv 2412.01818."""
    return Kept(ranked(seen.cls_attention.float().mean(0), budget))


NEAREST = 32   # how many patches PruMerge merges into each that it keeps


@strategy(needs={"last_queries", "last_keys"}, finds_budget=True)
def prumerge(seen: VisualTokens, budget: int | None, generator: Generator) -> Kept:
    """Patches that CLS attends to, others merged into them: PruMerge, arXiv 2403.15388."""
    scores = last_attention(seen)                                # (N,)
    return merge(seen, ranked(scores, budget or outliers(scores)), scores)


def last_attention(seen: VisualTokens) -> Tensor:
    """PruMerge's score (N,): how much CLS attends to each patch in the layer after the features.

    All heads count as one that is C wide, and CLS has its share of the softmax, as in the code.
    """
    q = seen.last_queries[0].float()                             # (C,)
    k = seen.last_keys.float()                                   # (1 + N, C)
    scores = k @ q * len(q) ** -0.5                              # (1 + N,C) x (C,) -> (1 + N,)
    return scores.softmax(0)[1:]


def merge(seen: VisualTokens, keep: Tensor, scores: Tensor) -> Kept:
    """Add to each kept patch its NEAREST by their keys, and sum up the dropped in one more token.

    Kept patches count as near too.  The weights are the scores, not normalised, as in the code.
    differs: where nothing is dropped, no token is added; in the code it is zero
    """
    x = seen.features.float()                                    # (N, C)
    keys = F.normalize(seen.last_keys[1:].float(), dim=-1)       # (N, C)
    alike = keys[keep] @ keys.T                                  # (K,C) x (C,N) -> (K,N)
    alike.scatter_(1, keep[:, None], -math.inf)                  # a patch is not near itself
    near = alike.argsort(dim=1, descending=True, stable=True)[:, :min(NEAREST, len(x) - 1)]
    weights = torch.zeros_like(alike).scatter(1, near, scores[near])  # (K, N)
    features = (x[keep] + weights @ x).to(seen.features.dtype)   # (K, C)
    dropped = without(keep, len(x))                              # (N - K,)
    if len(dropped) == 0:
        return Kept(keep, features)
    added = scores[dropped] @ x[dropped]                         # (N - K,) x (N - K,C) -> (C,)
    return Kept(keep, features, added[None].to(features.dtype))


@strategy(needs={"text", "aligned"}, finds_budget=True)
def trim(seen: VisualTokens, budget: int | None, generator: Generator) -> Kept:
    """Patches least like the expression, and the mean of the others: TRIM, arXiv 2409.10994.

    Least: the published code has a minus sign, and its author says that it belongs there.  Neither
    side is normalised.  Without a budget it keeps the outliers of the softmax over patches.
    differs: where nothing is dropped, no token is added
    """
    scores = -(seen.aligned.float() @ seen.text.float())         # (N,E) x (E,) -> (N,)
    keep = ranked(scores, budget or outliers(scores.softmax(0))).sort().values
    dropped = seen.features[without(keep, len(scores))]
    return Kept(keep, added=dropped.mean(0, keepdim=True) if len(dropped) else None)   # (1, C)
