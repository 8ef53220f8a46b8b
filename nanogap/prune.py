"""Pruning strategies: which patches to keep, and what some methods make of the others.

In:  what the vision tower saw in an image, and a budget.  Out: indices of what to keep.

A strategy is a pure function `(seen, budget, generator) -> Kept`, and `@strategy` says what it
needs to see.  A strategy that only ranks patches returns them in the order of its scores, any other
in the order of its published code; the mode (gap.py) decides what becomes of that order, and which
position IDs the tokens get.  To add one, write the function, here or in a file of your own
(`find`).  Each does what its published code does; `differs:` and `open:` mark where not, and why.
Letters: N patches, K kept, M tokens added, C channels, H heads, D channels of a head.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogap import gap
from nanogap.checks.command import NanogapError

FIELDS = {   # what a strategy may need to see, besides the features
    "cls":           "(C,)        the CLS token after the feature layer",
    "cls_attention": "(H, N)      how much CLS attends to each patch in the feature layer",
    "keys":          "(N, D)      the feature layer's keys, the mean over heads",
    "last_queries":  "(1 + N, C)  the next layer's queries, CLS first: heads not split; where the "
                     "feature layer is the last one, its own",
    "last_keys":     "(1 + N, C)  and its keys",
    "projected":     "(N, C')     patches as the decoder is fed them",
    "aligned":       "(N, E)      patches in CLIP's space of images and texts",
    "text":          "(E,)        the expression in that space",
    "attention":     "(H, N)      of a decoder layer: from the last token to the patches",
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
        if name not in FIELDS:
            raise AttributeError(f"there is no `{name}` to see: only features, rows, columns, "
                                 f"{', '.join(FIELDS)}")
        if name not in self.fields:
            raise NanogapError(f"`{name}` is not there: add it to needs, as in "
                               f"@strategy(needs={{\"{name}\"}})")
        return self.fields[name]


@dataclass(frozen=True)
class Kept:
    """What is left of an image."""

    keep: Tensor                      # (K,)    raster indices, in the method's own order
    features: Tensor | None = None    # (K, C)  not the patches' own, where others are merged in
    added: Tensor | None = None       # (M, C)  tokens without a place in the image: they go last

    @property
    def n_added(self) -> int:
        return 0 if self.added is None else len(self.added)


Strategy = Callable[[VisualTokens, Any, torch.Generator], Kept]   # Any: a budget, or None as well
STRATEGIES: dict[str, Strategy] = {}


def strategy(needs: Iterable[str] = (),
             finds_budget: bool = False) -> Callable[[Strategy], Strategy]:
    """Enter a function in STRATEGIES, and note what it needs.

    needs:        names of FIELDS that it looks at; nothing else is computed for it
    finds_budget: whether it is called with budget None as well, and finds one itself
    raises:       NanogapError for a name that is not in FIELDS
    """
    needs = frozenset(needs)
    unknown = needs - set(FIELDS)
    if unknown:
        raise NanogapError(f"no strategy can see {min(unknown)!r}: choose from {', '.join(FIELDS)}")

    def enter(function: Strategy) -> Strategy:
        function.needs = needs                 # type: ignore[attr-defined]
        function.finds_budget = finds_budget   # type: ignore[attr-defined]
        STRATEGIES[function.__name__] = function
        return function

    return enter


def needs_of(name: str) -> frozenset[str]:
    """What a strategy needs to see; nothing where it does not say."""
    return getattr(STRATEGIES[name], "needs", frozenset())


def finds_budget(name: str) -> bool:
    """Whether a strategy finds its own budget when it is given none."""
    return getattr(STRATEGIES[name], "finds_budget", False)


def in_decoder(name: str) -> bool:
    """Whether a strategy prunes between two layers of the decoder, by what these attend to."""
    return "attention" in needs_of(name)


def find(name: str) -> str:
    """The name of a strategy that is known, or of one in a file: "FILE.py:NAME" enters it.

    raises: NanogapError where there is no such strategy, file or function
    """
    if not isinstance(name, str):
        raise NanogapError(f"a strategy has a name, and is not of type {type(name).__name__}: "
                           f"choose from {', '.join(STRATEGIES)}")
    file, colon, function = name.rpartition(":")
    if not colon:
        if name not in STRATEGIES:
            raise NanogapError(f"unknown strategy {name!r:.80}: choose from "
                               f"{', '.join(STRATEGIES)}, or give one of your own as FILE.py:NAME")
        return name
    path = Path(file)
    if not os.path.isfile(path):             # False for a name that no file can have
        raise NanogapError(f"{name!r:.200}: there is no file {file:.200}; give FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise NanogapError(f"{name!r}: {file} is no Python file; give FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:   # the file is the user's own, and may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise NanogapError(f"{file} cannot be imported ({reason}); mend it there") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise NanogapError(f"{file} has no function {function!r}; give FILE.py:NAME")
    STRATEGIES[function] = found
    return function


# ----- what strategies share ----------------------------------------------------------------------


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

    differs: without outliers the published codes keep no patch, or divide by zero; here one stays
    """
    q1, q3 = scores.quantile(scores.new_tensor([0.25, 0.75]))
    return max(1, int((scores > q3 + 1.5 * (q3 - q1)).sum()))


# ----- the baselines ------------------------------------------------------------------------------


@strategy()
def random(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """Any patches, in any order: the baseline that no score explains."""
    return Kept(torch.randperm(len(seen.features), generator=generator)[:budget])


@strategy()
def spatial(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """A regular 2-D grid of patches: every second row and column where a quarter is kept.

    open: the paper does not define its spatial baseline.  Here `budget` patches stand in evenly
    spaced rows, and evenly spaced within each; they have no scores, so their order is raster order.
    """
    R, C = seen.rows, seen.columns
    rows = min(budget, math.ceil((budget * R / C) ** 0.5))       # as far apart as columns are
    keep = []
    for row in range(rows):
        y = (2 * row + 1) * R // (2 * rows)
        count = budget * (row + 1) // rows - budget * row // rows   # patches in this row
        for i in range(count):
            x = (2 * i + 1) * C // (2 * count)
            keep.append(y * C + x)
    return Kept(torch.tensor(keep))


@strategy(needs={"cls"})
def cls_similarity(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """Patches most like the CLS token: cosine similarity of their features.

    open: the paper names this baseline and does not define it.
    """
    scores = F.cosine_similarity(seen.features.float(), seen.cls.float(), dim=-1)
    return Kept(ranked(scores, budget))


@strategy(needs={"text", "aligned"})
def text_similarity(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """Patches most like the expression: cosine similarity in CLIP's space of images and texts.

    open: the paper names this baseline and does not define it.
    """
    scores = F.cosine_similarity(seen.aligned.float(), seen.text.float(), dim=-1)
    return Kept(ranked(scores, budget))


@strategy(needs={"cls_attention"})
def cls_attention(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """Patches that CLS attends to most, the mean over heads: FasterVLM, arXiv 2412.01818."""
    return Kept(ranked(seen.cls_attention.float().mean(0), budget))


# ----- the published methods ----------------------------------------------------------------------

NEAREST = 32   # how many patches PruMerge merges into each that it keeps


def last_attention(seen: VisualTokens) -> Tensor:
    """PruMerge's score (N,): how much CLS attends to each patch, in the layer after the features.

    As in the code, all heads count as one that is C wide, and CLS has its share of the softmax.
    """
    q = seen.last_queries[0].float()                             # (C,)
    k = seen.last_keys.float()                                   # (1 + N, C)
    scores = k @ q * len(q) ** -0.5                              # (1 + N,C) x (C,) -> (1 + N,)
    return scores.softmax(0)[1:]


def merge(seen: VisualTokens, keep: Tensor, scores: Tensor) -> Kept:
    """Add to each kept patch its NEAREST by their keys, and sum up the dropped in one more token.

    Kept patches count as near too.  The weights are the scores as they are: the published code has
    its normalisation commented out, so features grow, and the token added is a short vector.
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


@strategy(needs={"last_queries", "last_keys"}, finds_budget=True)
def prumerge(seen: VisualTokens, budget: int | None, generator: torch.Generator) -> Kept:
    """Patches that CLS attends to, others merged into them: PruMerge, arXiv 2403.15388.

    Without a budget it keeps the outliers among its scores.  The code leaves them in score order.
    """
    scores = last_attention(seen)                                # (N,)
    if budget is None:
        budget = outliers(scores)
    return merge(seen, ranked(scores, budget), scores)


@strategy(needs={"last_queries", "last_keys"}, finds_budget=True)
def prumerge_plus(seen: VisualTokens, budget: int | None, generator: torch.Generator) -> Kept:
    """PruMerge's patches, and then some in even steps: PruMerge+, of the same paper.

    The steps go along the raster, not the grid, and never meet its last patch, as in the code.
    With over a third outliers the step would be 0 and the code fail.  Quartiles leave a quarter at
    most, but the best of two patches is half of them; then the step is 1 here.
    differs: the code's fixed budget takes some patches twice; ours is half by score, and half in
    even steps among the others
    """
    N = len(seen.features)
    scores = last_attention(seen)                                # (N,)
    if budget is None:
        best = ranked(scores, outliers(scores))
        others = without(best, N)
        step = max(N // len(best) // 3, 1)
        spread = others[(others % step == 0) & (others < N - 1)]
    else:
        half = budget // 2
        best = ranked(scores, budget - half)
        others = without(best, N)
        steps = torch.arange(half, device=others.device)
        spread = others[(2 * steps + 1) * len(others) // (2 * half)]
    return merge(seen, torch.cat([best, spread]), scores)


@strategy(needs={"text", "aligned"}, finds_budget=True)
def trim(seen: VisualTokens, budget: int | None, generator: torch.Generator) -> Kept:
    """Patches least like the expression, and the mean of the others: TRIM, arXiv 2409.10994.

    Least: the published code has a minus sign, and its author says that it belongs there.  Neither
    side is normalised, though the paper speaks of cosines.  Without a budget it keeps the outliers
    of the softmax over patches.
    differs: where nothing is dropped, no token is added
    """
    scores = -(seen.aligned.float() @ seen.text.float())         # (N,E) x (E,) -> (N,)
    if budget is None:
        budget = outliers(scores.softmax(0))
    keep = ranked(scores, budget).sort().values
    dropped = seen.features[without(keep, len(scores))]
    if len(dropped) == 0:
        return Kept(keep)
    return Kept(keep, added=dropped.mean(0, keepdim=True))       # (1, C)


@strategy(needs={"cls", "cls_attention", "keys"})
def visionzip(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """CLS, patches it attends to, and a few that gather the others: VisionZip, arXiv 2412.04467.

    CLS counts within the budget, and 10 in 64 gather: patches in even steps among those left over,
    each plus the mean of those whose keys are most like its own (a sum, so about twice as long).
    differs: the code puts CLS first; here it goes last, for it has no place in the image, and with
    a budget of one the best patch stays, without CLS
    """
    attention = seen.cls_attention.float().sum(0)                # (N,)
    gathering = round(budget * 10 / 64)
    best = ranked(attention, max(1, budget - 1 - gathering)).sort().values
    cls = seen.cls[None] if budget > 1 else None                 # (1, C)
    if gathering == 0:
        return Kept(best, added=cls)
    others = without(best, len(attention))
    targets = others[::len(others) // gathering][:gathering]
    keep = torch.cat([best, targets])                            # (K,)
    rest = without(keep, len(attention))                         # (N - K,)
    x = seen.features.float()                                    # (N, C)
    keys = F.normalize(seen.keys.float(), dim=-1)                # (N, D)
    target = (keys[rest] @ keys[targets].T).argmax(1)            # (N - K,) one each
    share = F.one_hot(target, gathering).T.float()               # (targets, N - K)
    means = share @ x[rest] / share.sum(1, keepdim=True).clamp(min=1)   # zero where none came
    features = torch.cat([x[best], x[targets] + means])          # (K, C)
    return Kept(keep, features.to(seen.features.dtype), cls)


@strategy(needs={"projected"})
def divprune(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """Patches as unlike each other as can be, whatever is asked: DivPrune, arXiv 2503.02175.

    The first is the farthest from its nearest neighbour, the next is always the farthest from all
    before it; how far is one minus the cosine of what the decoder is fed.
    differs: in float32, where the code's half precision makes ties; no patch is taken twice
    """
    x = F.normalize(seen.projected.float(), dim=-1)              # (N, C')
    distance = (1 - x @ x.T).fill_diagonal_(-math.inf)           # (N, N)
    far = distance.sort(0).values[:2][-1]                        # (N,) the least is itself
    nearest = torch.full_like(far, math.inf)                     # (N,) from those kept
    keep = []
    for _ in range(budget):
        keep.append(far.argmax())
        nearest = torch.minimum(nearest, distance[keep[-1]])     # (N,) -inf for those kept
        far = nearest
    return Kept(torch.stack(keep).sort().values)


@strategy(needs={"cls_attention"})
def vispruner(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """Half by the attention of CLS, half without duplicates: VisPruner, arXiv 2412.01818.

    The paper is FasterVLM's under a later title.  The patches that attention did not choose, best
    first, are split into every first and every second one.  Up to 8 of the first group go, those
    most like any of the second.  What is left of the first, most alike in front, and the second
    group are joined and split again, until the budget is met.
    differs: the code fails where the number to split is odd, or where 8 must go of fewer than 16;
    here the first group has one more, and all of it may go
    """
    order = ranked(seen.cls_attention.float().mean(0), len(seen.features))      # (N,)
    best = order[:budget // 2]
    rest = order[budget // 2:]
    x = F.normalize(seen.features.float(), dim=-1)               # (N, C)
    while (surplus := len(best) + len(rest) - budget) > 0:
        first = rest[::2]
        second = rest[1::2]
        likeness = (x[first] @ x[second].T).amax(1)              # one each of the first
        first = first[ranked(likeness, len(first))]
        rest = torch.cat([first[min(8, surplus):], second])
    return Kept(torch.cat([best, rest]).sort().values)


# ----- choosing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """One of the rectangles of patches that an image is seen as; LLaVA-1.5 has a single one."""

    seen: VisualTokens
    index: Tensor          # (n,) which of the image's N visual tokens each of its patches is


def select(name: str, views: Sequence[View], budget: int | None, seed: int = 0) -> Kept:
    """Run a strategy on each view, with its share of the budget; what is kept of all of them.

    budget:  of visual tokens; None where the strategy finds one itself
    returns: indices among the image's visual tokens, on the CPU, in the method's own order
    raises:  NanogapError for an unknown name, a budget out of range, or a Kept that cannot be fed
    """
    sizes = [len(view.index) for view in views]
    check(name, sum(sizes), budget)
    shares = [None] * len(sizes) if budget is None else shared_out(budget, sizes)
    generator = torch.Generator().manual_seed(seed)      # one for all views: they differ
    used = []
    parts = []
    for view, share in zip(views, shares, strict=True):
        if share != 0:
            kept = STRATEGIES[name](view.seen, share, generator)
            check_kept(name, kept, view.seen, share)
            used.append(view)
            parts.append(kept)
    return join(used, parts)


def join(views: Sequence[View], parts: Sequence[Kept]) -> Kept:
    """What is kept of each view, as one: view after view, and what is added behind all of them."""
    keep = torch.cat([view.index.cpu()[kept.keep.cpu()]
                      for view, kept in zip(views, parts, strict=True)])      # (K,)
    features = None
    if any(kept.features is not None for kept in parts):
        features = torch.cat([view.seen.features[kept.keep] if kept.features is None
                              else kept.features
                              for view, kept in zip(views, parts, strict=True)])   # (K, C)
    added = [kept.added for kept in parts if kept.added is not None]
    return Kept(keep, features, torch.cat(added) if added else None)


def close_rows(kept: Kept, row_end: Tensor) -> Kept:
    """Put the token that closes a row behind the last patch of it that was kept.

    row_end: (N,) which visual token closes the row of each, -1 where none does
    differs: the published codes of pruning for LLaVA-1.6 leave these tokens out; here they stay, as
             the other tokens that are no patches do.  They have no scores: where patches go by rank
             a row is closed behind the lowest of it
    """
    ends = row_end[kept.keep].tolist()
    last = {end: i for i, end in enumerate(ends) if end >= 0}                 # of each row
    rows = []                                                   # of `kept`; -1 for a row's end
    keep = []
    for i, (index, end) in enumerate(zip(kept.keep.tolist(), ends, strict=True)):
        rows.append(i)
        keep.append(index)
        if last.get(end) == i:
            rows.append(-1)
            keep.append(end)
    features = kept.features
    if features is not None:
        features = torch.cat([features, torch.zeros_like(features[:1])])[rows]   # (K, C)
    return Kept(torch.tensor(keep), features, kept.added)


def shared_out(budget: int, sizes: Sequence[int]) -> list[int]:
    """Whole shares of a budget, in proportion to sizes; the largest fractions are rounded up."""
    exact = [budget * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    largest_first = sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])
    for i in largest_first[:budget - sum(shares)]:
        shares[i] += 1
    return shares


def budget_of(keep: int | str | None, n_visual: int) -> int | None:
    """A budget as it was asked for, 64 or "64" or "25%", in visual tokens; "auto" is None.

    A share is rounded, but never to none.  None: the strategy finds its own budget.
    raises: NanogapError for words that are no budget, or for one out of range
    """
    if not isinstance(keep, str):
        return keep
    if keep == "auto":
        return None
    digits = keep.removesuffix("%")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 9):
        raise NanogapError(f"keep is {keep!r:.80} here: give a number of visual tokens such as 64, "
                           "a share such as \"25%\", or \"auto\"")
    number = int(digits)
    highest = 100 if keep.endswith("%") else n_visual
    if not 1 <= number <= highest:
        raise NanogapError(f"cannot keep {keep} of {n_visual} visual tokens: "
                           f"keep from 1 to {n_visual}, or 1% to 100%")
    if keep.endswith("%"):
        return max(1, round(n_visual * number / 100))
    return number


def check(name: str, n_visual: int, budget: int | None) -> None:
    """Refuse a strategy that there is not, or a budget that it cannot have: see `select`."""
    if name not in STRATEGIES:
        raise NanogapError(f"unknown strategy {name!r}: choose from {', '.join(STRATEGIES)}")
    if budget is None and finds_budget(name):
        return
    if budget is None:
        adaptive = [other for other in STRATEGIES if finds_budget(other)]
        raise NanogapError(f"{name} needs a budget: keep from 1 to {n_visual} visual tokens, "
                           f"or 1% to 100% (those that find one themselves are "
                           f"{', '.join(adaptive)})")
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise NanogapError(f"keep is {budget!r} here: give a whole number from 1 to {n_visual}")
    if not 1 <= budget <= n_visual:
        raise NanogapError(f"cannot keep {budget} of {n_visual} visual tokens: "
                           f"keep from 1 to {n_visual}, or 1% to 100%")


def check_kept(name: str, kept: Kept, seen: VisualTokens, budget: int | None) -> None:
    """Refuse what a strategy returned where it cannot be fed, and name the file to mend."""
    N, C = seen.features.shape
    most = budget or N
    try:
        gap.check(kept.keep, N, "gap")
        fits = isinstance(kept, Kept) and 1 <= len(kept.keep) <= most
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        raise NanogapError(f"the strategy {name} must return Kept(keep) with at most {most} "
                           f"raster indices, each once; {mend(name)}")
    K = len(kept.keep)
    features, added = kept.features, kept.added
    if features is not None and features.shape != (K, C):
        raise NanogapError(f"the strategy {name}: features must be (K, C) = ({K}, {C}), a row for "
                           f"each of keep; they are {tuple(features.shape)}; {mend(name)}")
    if added is not None and (added.dim() != 2 or added.shape[1] != C):
        raise NanogapError(f"the strategy {name}: added must be (M, C) = (any, {C}), a row for "
                           f"each token; they are {tuple(added.shape)}; {mend(name)}")


def mend(name: str) -> str:
    """Where a strategy that went wrong is to be mended."""
    code = getattr(STRATEGIES[name], "__code__", None)
    if code is None:
        return "mend it in the file that it comes from"
    return f"mend it in {code.co_filename}, line {code.co_firstlineno}"
