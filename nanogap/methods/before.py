"""Later strategies that prune before the decoder: they enter STRATEGIES when nanogap is imported.

In:  what the vision tower saw in an image, and a budget.  Out: indices of what to keep, ranked.

Each does what its published code does; `differs:` and `open:` mark where not, and why.
Letters: N patches, K kept, M tokens added, C channels, H heads, D channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator

from nanogap.prune import (
    Kept,
    VisualTokens,
    last_attention,
    merge,
    outliers,
    ranked,
    strategy,
    without,
)


@strategy(needs={"last_queries", "last_keys"}, finds_budget=True)
def prumerge_plus(seen: VisualTokens, budget: int | None, generator: Generator) -> Kept:
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


@strategy(needs={"cls", "cls_attention", "keys"})
def visionzip(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
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
def divprune(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
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
def vispruner(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
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
