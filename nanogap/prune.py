"""Pruning strategies: which patches to keep.

In:  what the vision tower saw in one image, and a budget.  Out: raster indices of the patches to keep.

A strategy is a pure function `(seen, budget, generator) -> keep`.  It returns the indices in the order
in which its scores rank them; what becomes of that order, and which position IDs the tokens get, is
decided by the mode (gap.py).  To add one, write the function and enter it in STRATEGIES.
Letters: N patches, K patches kept, C channels, H heads.
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
    """What a strategy may look at: one image after the feature layer of the vision tower."""

    features: Tensor          # (N, C)  patches, raster order
    cls: Tensor               # (C,)    the CLS token
    cls_attention: Tensor     # (H, N)  how much CLS attends to each patch, per head

    @property
    def grid(self) -> int:
        """Patches along one side of the square."""
        return round(len(self.features) ** 0.5)


def ranked(scores: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` highest scores (N,), the highest first; ties go to the lower index."""
    return scores.float().argsort(descending=True, stable=True)[:budget]


def random(seen: Seen, budget: int, generator: torch.Generator) -> Tensor:
    """Any patches, in any order: the baseline that no score explains."""
    return torch.randperm(len(seen.features), generator=generator)[:budget]


def spatial(seen: Seen, budget: int, generator: torch.Generator) -> Tensor:
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
    return torch.tensor(keep)


def cls_similarity(seen: Seen, budget: int, generator: torch.Generator) -> Tensor:
    """Patches most like the CLS token: cosine similarity of their features.

    open: the paper names this baseline and does not define it.
    """
    return ranked(F.cosine_similarity(seen.features.float(), seen.cls.float()[None], dim=-1), budget)


def cls_attention(seen: Seen, budget: int, generator: torch.Generator) -> Tensor:
    """Patches that CLS attends to most, the mean over heads: FasterVLM, arXiv 2412.01818."""
    return ranked(seen.cls_attention.float().mean(0), budget)


Strategy = Callable[[Seen, int, torch.Generator], Tensor]
STRATEGIES: dict[str, Strategy] = {
    "random": random,
    "spatial": spatial,
    "cls_similarity": cls_similarity,
    "cls_attention": cls_attention,
}


def select(name: str, seen: Seen, budget: int | None, seed: int = 0) -> Tensor:
    """Run a strategy by its name: raster indices (K,) on the CPU, the most important first.

    raises: NanogapError for an unknown name, or a budget that is not between 1 and N
    """
    N = len(seen.features)
    if name not in STRATEGIES:
        raise NanogapError(f"unknown strategy {name!r}: choose from {', '.join(STRATEGIES)}")
    if budget is None:
        raise NanogapError(f"{name} needs a budget: keep from 1 to {N} visual tokens, or 1% to 100%")
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= N:
        raise NanogapError(f"cannot keep {budget} of {N} visual tokens: keep from 1 to {N}, or 1% to 100%")
    return STRATEGIES[name](seen, budget, torch.Generator().manual_seed(seed)).cpu()
