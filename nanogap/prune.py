"""Pruning strategies: which patches to keep, and what some methods make of the others.

In:  what the vision tower saw in one image, and a budget.  Out: raster indices of the patches to keep.

A strategy is a pure function `(seen, budget, generator) -> Kept`.  It gives the indices in the order in
which its scores rank them; what becomes of that order, and which position IDs the tokens get, is decided
by the mode (gap.py).  To add one, write the function and enter it in STRATEGIES.
Each does what the published code of its method does; `differs:` and `open:` mark where and why not.
Letters: N patches, K patches kept, C channels, H heads, D channels of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogap.errors import NanogapError


@dataclass(frozen=True)
class Seen:
    """What a strategy may look at: one image in the vision tower, and more where a method needs it."""

    features: Tensor                  # (N, C)      patches after the feature layer, raster order
    cls: Tensor                       # (C,)        the CLS token after the feature layer
    cls_attention: Tensor             # (H, N)      how much CLS attends to each patch there, per head
    keys: Tensor                      # (N, D)      that layer's keys, the mean over heads
    last_queries: Tensor              # (1 + N, C)  the next layer's queries, CLS first: heads not split
    last_keys: Tensor                 # (1 + N, C)  and its keys
    projected: Tensor                 # (N, C')     patches as the decoder is fed them
    aligned: Tensor | None = None     # (N, E)      patches in CLIP's space of images and texts, and
    text: Tensor | None = None        # (E,)        the expression in it: for the methods in READ_TEXT
    attention: Tensor | None = None   # (H, N)      a decoder layer's, last token to patches: IN_DECODER

    @property
    def grid(self) -> int:
        """Patches along one side of the square."""
        return round(len(self.features) ** 0.5)


@dataclass(frozen=True)
class Kept:
    """What is left of an image."""

    keep: Tensor                      # (K,)    raster indices, in the order in which the method ranks them
    features: Tensor | None = None    # (K, C)  in place of the patches' own, where others are merged into them
    added: Tensor | None = None       # (M, C)  tokens without a place of their own, which go last

    @property
    def n_added(self) -> int:
        return 0 if self.added is None else len(self.added)


def ranked(scores: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` highest scores (N,), the highest first; ties go to the lower index."""
    return scores.float().argsort(descending=True, stable=True)[:budget]


# ----- the baselines ------------------------------------------------------------------------------


def random(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Any patches, in any order: the baseline that no score explains."""
    return Kept(torch.randperm(len(seen.features), generator=generator)[:budget])


def spatial(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """A regular 2-D grid of patches: every second row and column where a quarter is kept.

    open: the paper does not define its spatial baseline.  Here `budget` patches stand in evenly spaced
    rows, and evenly spaced within each; they have no scores, so their order is raster order.
    """
    rows = math.ceil(budget ** 0.5)
    keep = []
    for row in range(rows):
        count = budget * (row + 1) // rows - budget * row // rows             # patches in this row
        y = (2 * row + 1) * seen.grid // (2 * rows)
        keep += [y * seen.grid + (2 * i + 1) * seen.grid // (2 * count) for i in range(count)]
    return Kept(torch.tensor(keep))


def cls_similarity(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Patches most like the CLS token: cosine similarity of their features.

    open: the paper names this baseline and does not define it.
    """
    return Kept(ranked(F.cosine_similarity(seen.features.float(), seen.cls.float()[None], dim=-1), budget))


def text_similarity(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Patches most like the expression: cosine similarity in CLIP's space of images and texts.

    open: the paper names this baseline and does not define it.
    """
    return Kept(ranked(F.cosine_similarity(seen.aligned.float(), seen.text.float()[None], dim=-1), budget))


def cls_attention(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Patches that CLS attends to most, the mean over heads: FasterVLM, arXiv 2412.01818."""
    return Kept(ranked(seen.cls_attention.float().mean(0), budget))


# ----- the published methods ----------------------------------------------------------------------


def fastv(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Patches that the prompt's last token attends to most, in a decoder layer: FastV, arXiv 2403.06764.

    differs: the paper speaks of the attention of all tokens; its code takes the last one's, as here.
    """
    return Kept(ranked(seen.attention.float().mean(0), budget))


Strategy = Callable[[Seen, int | None, torch.Generator], Kept]
STRATEGIES: dict[str, Strategy] = {
    "random": random,
    "spatial": spatial,
    "cls_similarity": cls_similarity,
    "cls_attention": cls_attention,
    "text_similarity": text_similarity,
    "fastv": fastv,
}
ADAPTIVE = ("prumerge", "prumerge_plus", "trim")   # without a budget they find one themselves
READ_TEXT = ("text_similarity", "trim")            # they look at the expression
IN_DECODER = ("fastv",)                            # they prune between two layers of the decoder


def select(name: str, seen: Seen, budget: int | None, seed: int = 0) -> Kept:
    """Run a strategy by its name; `keep` comes back on the CPU, the most important patch first.

    raises: NanogapError for an unknown name, or a budget that is not between 1 and N
    """
    check(name, len(seen.features), budget)
    kept = STRATEGIES[name](seen, budget, torch.Generator().manual_seed(seed))
    return Kept(kept.keep.cpu(), kept.features, kept.added)


def check(name: str, n_visual: int, budget: int | None) -> None:
    """Refuse a strategy that there is not, or a budget that it cannot have: see `select`."""
    if name not in STRATEGIES:
        raise NanogapError(f"unknown strategy {name!r}: choose from {', '.join(STRATEGIES)}")
    if budget is None and name in ADAPTIVE:
        return
    if budget is None:
        raise NanogapError(f"{name} needs a budget: keep from 1 to {n_visual} visual tokens, or 1% to 100%")
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= n_visual:
        raise NanogapError(f"cannot keep {budget} of {n_visual} visual tokens: "
                           f"keep from 1 to {n_visual}, or 1% to 100%")
