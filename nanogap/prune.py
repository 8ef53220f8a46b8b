"""Pruning strategies: which patches to keep, and what some methods make of the others.

In:  what the vision tower saw in one image, and a budget.  Out: raster indices of what to keep.

A strategy is a pure function `(seen, budget, generator) -> Kept`.  One that only ranks patches
gives them in the order of its scores, any other in the order in which its published code does; what
becomes of that order, and which position IDs the tokens get, is decided by the mode (gap.py).  To
add one, write the function and enter it in STRATEGIES.
Each does what its published code does; `differs:` and `open:` mark where not, and why.
Letters: N patches, K kept, M tokens added, C channels, H heads, D channels of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogap import gap
from nanogap.errors import NanogapError


@dataclass(frozen=True)
class Seen:
    """What a strategy may look at: an image in the vision tower, and more where one needs it."""

    features: Tensor                      # (N, C)      patches after the feature layer, raster order
    cls: Tensor                           # (C,)        the CLS token after the feature layer
    cls_attention: Tensor | None = None   # (H, N)      how much CLS attends to each patch there
    keys: Tensor | None = None            # (N, D)      that layer's keys, the mean over heads
    last_queries: Tensor | None = None    # (1 + N, C)  the next layer's, CLS first: heads not split
    last_keys: Tensor | None = None       # (1 + N, C)  and its keys
    projected: Tensor | None = None       # (N, C')     patches as the decoder is fed them
    aligned: Tensor | None = None         # (N, E)      patches in CLIP's space of images and texts, and
    text: Tensor | None = None            # (E,)        the expression in it: for those in READ_TEXT
    attention: Tensor | None = None       # (H, N)      a decoder's, last token to patches

    @property
    def grid(self) -> int:
        """Patches along one side of the square."""
        return round(len(self.features) ** 0.5)


@dataclass(frozen=True)
class Kept:
    """What is left of an image."""

    keep: Tensor                      # (K,)    raster indices, in the method's own order
    features: Tensor | None = None    # (K, C)  not the patches' own, where others are merged in
    added: Tensor | None = None       # (M, C)  tokens without a place in the image: they go last

    @property
    def n_added(self) -> int:
        return 0 if self.added is None else len(self.added)


def ranked(scores: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` highest scores (N,), highest first; ties go to the lower index."""
    return scores.argsort(descending=True, stable=True)[:budget]


def without(chosen: Tensor, n_visual: int) -> Tensor:
    """The other patches: raster indices (N - K,) of those that are not among `chosen` (K,)."""
    left = torch.ones(n_visual, dtype=torch.bool, device=chosen.device)
    left[chosen] = False
    return left.nonzero()[:, 0]


def outliers(scores: Tensor) -> int:
    """How many scores (N,) lie above Q3 + 1.5 (Q3 - Q1): the budget where a method finds its own.

    differs: where none does, the published codes keep no patch, or divide by zero; here one stays
    """
    q1, q3 = scores.quantile(scores.new_tensor([0.25, 0.75]))
    return max(1, int((scores > q3 + 1.5 * (q3 - q1)).sum()))


# ----- the baselines ------------------------------------------------------------------------------


def random(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Any patches, in any order: the baseline that no score explains."""
    return Kept(torch.randperm(len(seen.features), generator=generator)[:budget])


def spatial(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """A regular 2-D grid of patches: every second row and column where a quarter is kept.

    open: the paper does not define its spatial baseline.  Here `budget` patches stand in evenly
    spaced rows, and evenly spaced within each; they have no scores, so their order is raster order.
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
    scores = F.cosine_similarity(seen.features.float(), seen.cls.float(), dim=-1)
    return Kept(ranked(scores, budget))


def text_similarity(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Patches most like the expression: cosine similarity in CLIP's space of images and texts.

    open: the paper names this baseline and does not define it.
    """
    scores = F.cosine_similarity(seen.aligned.float(), seen.text.float(), dim=-1)
    return Kept(ranked(scores, budget))


def cls_attention(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Patches that CLS attends to most, the mean over heads: FasterVLM, arXiv 2412.01818."""
    return Kept(ranked(seen.cls_attention.float().mean(0), budget))


# ----- the published methods ----------------------------------------------------------------------

NEAREST = 32   # so many patches PruMerge merges into each that it keeps


def last_attention(seen: Seen) -> Tensor:
    """PruMerge's score (N,): how much CLS attends to each patch, in the layer after the features.

    As in the code, all heads count as one that is C wide, and CLS has its share of the softmax.
    """
    q, k = seen.last_queries[0].float(), seen.last_keys.float()
    return (k @ q * len(q) ** -0.5).softmax(0)[1:]               # (1 + N,C) x (C,) -> (1 + N,)


def merge(seen: Seen, keep: Tensor, scores: Tensor) -> Kept:
    """Add to each kept patch its NEAREST by their keys, and sum up the dropped in one more token.

    Kept patches count as near too.  The weights are the scores as they are: the published code has
    its normalisation commented out, so features grow, and the token added is a short vector.
    differs: where nothing is dropped, no token is added; in the code it is zero
    """
    x, keys = seen.features.float(), F.normalize(seen.last_keys[1:].float(), dim=-1)  # (N, C) both
    alike = keys[keep] @ keys.T                                  # (K,C) x (C,N) -> (K,N)
    alike.scatter_(1, keep[:, None], -math.inf)                  # a patch is not near itself
    near = alike.argsort(dim=1, descending=True, stable=True)[:, :min(NEAREST, len(x) - 1)]
    weights = torch.zeros_like(alike).scatter(1, near, scores[near])                  # (K, N)
    features = (x[keep] + weights @ x).to(seen.features.dtype)   # (K, C)
    dropped = without(keep, len(x))
    if len(dropped) == 0:
        return Kept(keep, features)
    return Kept(keep, features, (scores[dropped] @ x[dropped])[None].to(features.dtype))


def prumerge(seen: Seen, budget: int | None, generator: torch.Generator) -> Kept:
    """Patches that CLS attends to, others merged into them: PruMerge, arXiv 2403.15388.

    Without a budget it keeps the outliers among its scores.  The code leaves them in score order.
    """
    scores = last_attention(seen)
    return merge(seen, ranked(scores, outliers(scores) if budget is None else budget), scores)


def prumerge_plus(seen: Seen, budget: int | None, generator: torch.Generator) -> Kept:
    """PruMerge's patches, and then some in even steps: PruMerge+, of the same paper.

    The steps go along the raster, not the grid, and never meet its last patch, as in the code.
    With over a third outliers the step would be 0 and the code fail, but quartiles leave a quarter
    at most.
    differs: the code's fixed budget takes some patches twice; ours is half by score, and half in
    even steps among the others
    """
    scores, N = last_attention(seen), len(seen.features)
    best = ranked(scores, outliers(scores) if budget is None else budget - budget // 2)
    others = without(best, N)
    if budget is None:
        step = N // len(best) // 3
        spread = others[(others % step == 0) & (others < N - 1)]
    else:
        half = torch.arange(budget // 2, device=others.device)
        spread = others[(2 * half + 1) * len(others) // (2 * len(half))]
    return merge(seen, torch.cat([best, spread]), scores)


def trim(seen: Seen, budget: int | None, generator: torch.Generator) -> Kept:
    """Patches least like the expression, and the mean of the others: TRIM, arXiv 2409.10994.

    Least: the published code has a minus sign, and its author says that it belongs there.  Neither
    side is normalised, though the paper speaks of cosines.  Without a budget it keeps the outliers
    of the softmax over patches.
    differs: where nothing is dropped, no token is added
    """
    scores = -(seen.aligned.float() @ seen.text.float())         # (N,E) x (E,) -> (N,)
    budget = outliers(scores.softmax(0)) if budget is None else budget
    keep = ranked(scores, budget).sort().values
    dropped = seen.features[without(keep, len(scores))]
    if len(dropped) == 0:
        return Kept(keep)
    return Kept(keep, added=dropped.mean(0, keepdim=True))       # (1, C)


def visionzip(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """CLS, patches it attends to, and a few that gather the others: VisionZip, arXiv 2412.04467.

    CLS counts within the budget, and 10 in 64 gather: patches in even steps among those left over,
    each plus the mean of those whose keys are most like its own (a sum, so about twice as long).
    differs: the code puts CLS first; here it goes last, for it has no place in the image, and with
    a budget of one the best patch stays, without CLS
    """
    attention, gathering = seen.cls_attention.float().sum(0), round(budget * 10 / 64)  # (N,)
    best = ranked(attention, max(1, budget - 1 - gathering)).sort().values
    cls = seen.cls[None] if budget > 1 else None                 # (1, C)
    if gathering == 0:
        return Kept(best, added=cls)
    others = without(best, len(attention))
    targets = others[::len(others) // gathering][:gathering]
    keep = torch.cat([best, targets])                            # (K,)
    rest = without(keep, len(attention))                         # (N - K,)
    x, keys = seen.features.float(), F.normalize(seen.keys.float(), dim=-1)
    target = (keys[rest] @ keys[targets].T).argmax(1)            # (N - K,) one each
    share = F.one_hot(target, gathering).T.float()               # (targets, N - K)
    means = share @ x[rest] / share.sum(1, keepdim=True).clamp(min=1)   # zero where none came
    features = torch.cat([x[best], x[targets] + means])          # (K, C)
    return Kept(keep, features.to(seen.features.dtype), cls)


def divprune(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Patches as unlike each other as can be, whatever is asked: DivPrune, arXiv 2503.02175.

    The first is the farthest from its nearest neighbour, the next is always the farthest from all
    before it; how far is one minus the cosine of what the decoder is fed.
    differs: in float32, where the code's half precision makes ties; no patch is taken twice
    """
    x = F.normalize(seen.projected.float(), dim=-1)              # (N, C')
    distance = (1 - x @ x.T).fill_diagonal_(-math.inf)           # (N, N)
    far = distance.sort(0).values[:2][-1]                        # (N,) the least is itself
    keep, nearest = [], torch.full_like(far, math.inf)           # (N,) from those kept
    for _ in range(budget):
        keep.append(far.argmax())
        far = nearest = torch.minimum(nearest, distance[keep[-1]])      # -inf for those kept
    return Kept(torch.stack(keep).sort().values)


def vispruner(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Half by the attention of CLS, and half with duplicates out: VisPruner, arXiv 2412.01818 (FasterVLM's
    paper under a later title).

    The rest, best first, is dealt into two hands; of the first, up to 8 go that are most like any
    of the second; what is left of the first, most alike on top, goes on the second, and all is
    dealt again.
    differs: the code fails where an odd number is dealt, or fewer than 16 of which 8 must go; here
    the first hand has one more, and goes whole
    """
    order = ranked(seen.cls_attention.float().mean(0), len(seen.features))      # (N,)
    best, rest = order[:budget // 2], order[budget // 2:]
    x = F.normalize(seen.features.float(), dim=-1)
    while (surplus := len(best) + len(rest) - budget) > 0:
        first, second = rest[::2], rest[1::2]
        likeness = (x[first] @ x[second].T).amax(1)
        first = first[ranked(likeness, len(first))]
        rest = torch.cat([first[min(8, surplus):], second])
    return Kept(torch.cat([best, rest]).sort().values)


def fastv(seen: Seen, budget: int, generator: torch.Generator) -> Kept:
    """Patches that the prompt's last token attends to, in a decoder layer: FastV, arXiv 2403.06764.

    The paper speaks of the attention of all tokens; its code takes the last one's row, as here.
    """
    return Kept(ranked(seen.attention.float().mean(0), budget))


Strategy = Callable[[Seen, int | None, torch.Generator], Kept]
STRATEGIES: dict[str, Strategy] = {
    "random": random,
    "spatial": spatial,
    "cls_similarity": cls_similarity,
    "cls_attention": cls_attention,
    "text_similarity": text_similarity,
    "prumerge": prumerge,
    "prumerge_plus": prumerge_plus,
    "trim": trim,
    "visionzip": visionzip,
    "divprune": divprune,
    "vispruner": vispruner,
    "fastv": fastv,
}
ADAPTIVE = ("prumerge", "prumerge_plus", "trim")   # without a budget they find one themselves
READ_TEXT = ("text_similarity", "trim")            # they look at the expression
IN_DECODER = ("fastv",)                            # they prune between two layers of the decoder


def select(name: str, seen: Seen, budget: int | None, seed: int = 0) -> Kept:
    """Run a strategy by its name; `keep` comes back on the CPU, in the method's own order.

    raises: NanogapError for an unknown name, or a budget that is not between 1 and N
    """
    N, C = seen.features.shape
    check(name, N, budget)
    kept = STRATEGIES[name](seen, budget, torch.Generator().manual_seed(seed))
    try:
        gap.check(kept.keep, N, "gap")
        fits = isinstance(kept, Kept) and 1 <= len(kept.keep) <= (budget or N)
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        raise NanogapError(f"the strategy {name} must return Kept(keep) with at most {budget or N} raster "
                           f"indices, each once; mend it in {file_of(name)}")
    for what, rows, given in (("features", f"(K, C) = ({len(kept.keep)}, {C}), a row for each of keep", kept.features),
                              ("added", f"(M, C) = (any, {C}), a row for each token", kept.added)):
        wrong = given is not None and (given.dim() != 2 or given.shape[1] != C
                                       or what == "features" and len(given) != len(kept.keep))
        if wrong:
            raise NanogapError(f"the strategy {name}: {what} must be {rows}; they are {tuple(given.shape)}; "
                               f"mend it in {file_of(name)}")
    return Kept(kept.keep.cpu(), kept.features, kept.added)


def file_of(name: str) -> str:
    """Where a strategy is defined, for whoever has to mend it."""
    code = getattr(STRATEGIES[name], "__code__", None)
    return f"{code.co_filename}, line {code.co_firstlineno}" if code else "the file that it comes from"


def check(name: str, n_visual: int, budget: int | None) -> None:
    """Refuse a strategy that there is not, or a budget that it cannot have: see `select`."""
    if name not in STRATEGIES:
        raise NanogapError(f"unknown strategy {name!r}: choose from {', '.join(STRATEGIES)}")
    if budget is None and name in ADAPTIVE:
        return
    if budget is None:
        raise NanogapError(f"{name} needs a budget: keep from 1 to {n_visual} visual tokens, or 1% to 100% "
                           f"(those that find one themselves are {', '.join(ADAPTIVE)})")
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise NanogapError(f"keep is {budget!r} here: give a whole number from 1 to {n_visual}")
    if not 1 <= budget <= n_visual:
        raise NanogapError(f"cannot keep {budget} of {n_visual} visual tokens: "
                           f"keep from 1 to {n_visual}, or 1% to 100%")
