"""Strategies that prune inside the decoder: who stays, by what a layer tells of its tokens.

In:  n visual tokens as a layer sees them, and a budget.  Out: which of them stay, ranked.

Their keyword arguments are settings (settings.py), which say where and how many tokens are cut:
cuts.py reads them.
Letters: n visual tokens at a cut, Q tokens of the question, H heads, C channels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nanogap.prune import FIELDS, Kept, VisualTokens, ranked, strategy, without

FIELDS |= {   # only at a cut in the decoder, where `features` are hidden states
    "attention":       "(H, n)      how much the text looks at each visual token in a layer",
    "value_attention": "(n + Q, n)  how much visual tokens, then the question's, would look at "
                       "each by their values alone",
    "axes":            "(2, n)      mean cosine and sine of RoPE at each one's position ID",
}
Layers = list[int] | None           # before which it cuts
Ratios = list[float] | None         # of the visual tokens, that stay at each cut


@strategy(needs={"attention"})
def fastv(seen: VisualTokens, budget: int, generator: Generator, *, layer: int | None = None,
          drop: float | None = None) -> Kept:
    """Patches that the prompt's last token attends to in a decoder layer: FastV, arXiv 2403.06764.

    The paper speaks of the attention of all tokens; its code takes the last one's row, as here.
    Published as (K, R): the layer before which it cuts, and the share that is dropped there.
    """
    return Kept(ranked(seen.attention.float().mean(0), budget))


@strategy(needs={"attention"}, finds_budget=True)
def pyramiddrop(seen: VisualTokens, budget: int, generator: Generator, *, layers: Layers = None,
                ratios: Ratios = None) -> Kept:
    """The same at each of three cuts, by the layer that comes next: PyramidDrop, arXiv 2410.17247.

    Without a budget half of the tokens go at each cut, as in the paper.
    differs: of a single token the code would keep none; here it stays
    """
    return Kept(ranked(seen.attention.float().mean(0), budget).sort().values)


@strategy(needs={"attention"})
def sparsevlm(seen: VisualTokens, budget: int, generator: Generator, *, layers: Layers = None,
              ratios: Ratios = None, label: int | None = None) -> Kept:
    """Patches that the raters attend to, and clusters of some others: SparseVLM, arXiv 2410.04417.

    Of those dropped, the best 30 % and one are clustered, ten to a cluster, and the mean of each
    cluster is added behind the kept ones.  Its labels are no means: 192, 128, 96, 64 cost 206.5,
    145.4, 114.1 and 82.2 tokens in the mean over 32 layers.
    differs: asked for all tokens its code drops one at each cut; here they stay.  See `clusters`
    """
    scores = seen.attention.float().mean(0)                      # (n,)
    keep = ranked(scores, budget).sort().values
    dropped = without(keep, len(scores))
    if len(dropped) == 0:
        return Kept(keep)
    recycled = dropped[ranked(scores[dropped], int(0.3 * len(dropped)) + 1)]
    return Kept(keep, added=clusters(seen.features[recycled], len(recycled) // 10 + 1))


@strategy(needs={"attention"})
def sparsevlm_plus(seen: VisualTokens, budget: int, generator: Generator, *,
                   layers: Layers = None, ratios: Ratios = None, label: int | None = None) -> Kept:
    """Patches that the raters attend to in the heads that look at the image most: SparseVLM+.

    The code takes 14 heads, of the 32 of a 7B; of other numbers it is the same share here.  No
    token is added.
    differs: as for sparsevlm, all stay where all are asked for
    """
    attention = seen.attention.float()                           # (H, n)
    heads = ranked(attention.sum(1), max(1, round(len(attention) * 14 / 32)))
    return Kept(ranked(attention[heads].mean(0), budget).sort().values)


def clusters(x: Tensor, count: int) -> Tensor:
    """The means (count, C) of so many clusters of tokens (m, C), by density peaks among neighbours.

    A centre is dense, and far from any that is denser; the others go to the nearest centre.
    differs: the code adds random noise, so that no two are equally dense, as nearest neighbours of
             each other are among two clusters; here the first of them counts as denser
    source:  cluster_and_merge in SparseVLM's code, after DPC-KNN
    """
    points = x.float()
    exact = "donot_use_mm_for_euclid_dist"   # a matrix product would lose small distances
    distance = torch.cdist(points, points, compute_mode=exact)                # (m, m)
    distance = distance / points.shape[1] ** 0.5
    nearest = distance.sort(dim=1).values[:, :count]                          # itself among them
    density = (-nearest.pow(2).mean(1)).exp()                                 # (m,)
    earlier = torch.ones_like(distance).tril(-1).bool()
    equal = density[None, :] == density[:, None]
    denser = (density[None, :] > density[:, None]) | (equal & earlier)        # (m, m)
    far = torch.where(denser, distance, distance.max()).min(1).values         # from any denser one
    centres = ranked(far * density, count)
    member = distance[centres].argmin(0)                                      # (m,) one each
    member[centres] = torch.arange(count, device=x.device)
    share = F.one_hot(member, count).T.float()                                # (count, m)
    return (share @ points / share.sum(1, keepdim=True)).to(x.dtype)


@strategy(needs={"value_attention", "axes"}, finds_budget=True)
def ivc(seen: VisualTokens, budget: int | None, generator: Generator, *,
        layer: int | None = None) -> Kept:
    """Seeds, foreground, and the axes of RoPE's coordinates: IVC-Prune, arXiv 2602.03060.

    Seeds (1 %) are what the question's values are most alike to, foreground (20 %) what those of
    the question and the seeds are.  Axes are the patches (5 % and 5 %) at whose position ID RoPE
    turns least (the highest mean cosine), or by a quarter (the highest mean sine).  They only serve
    as axes where they keep their IDs, so this is the strategy that needs GAP by its own definition.
    Without a budget 20 to 31 % of the patches stay, by how far the four overlap.
    differs: a budget scales foreground and axes together, as far as it reaches; the code has none
    """
    weights, n = seen.value_attention.float(), len(seen.features)   # (n + Q, n)
    question = weights[n:]                                       # (Q, n)
    seeds = ranked(question.mean(0), max(1, round(0.01 * n)))
    foreground = ranked(torch.cat([weights[seeds], question]).mean(0), n)
    least, quarter = (ranked(turn, n) for turn in seen.axes.float())

    def stay(scale: float) -> Tensor:
        axes = round(0.05 * scale * n)
        parts = [seeds, foreground[:round(0.2 * scale * n)], least[:axes], quarter[:axes]]
        return torch.cat(parts).unique()                         # in raster order

    if budget is None:
        return Kept(stay(1))
    if budget <= len(seeds):
        return Kept(seeds[:budget].sort().values)
    return Kept(stay(largest(lambda scale: len(stay(scale)) <= budget, 20)))


def largest(fits: Callable[[float], bool], high: float) -> float:
    """The largest size up to `high` that fits, where 0 does, and all below one that does."""
    if fits(high):
        return high
    low = 0.0
    for _ in range(64):                               # halves: more than a float can tell apart
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
