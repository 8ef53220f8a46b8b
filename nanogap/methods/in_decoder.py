"""Strategies that prune inside the decoder: who stays, where they cut, and how many they keep.

In:  n visual tokens as a layer sees them, and a budget.  Out: which of them stay, ranked.
And for N visual tokens, a budget and a depth: the cuts, as (layer, tokens kept from there on).

A budget is a mean over all layers: of the visual tokens in the cache of each, which are those that
it is fed, but below the cut of ivc, which cuts these caches too.
Keyword arguments are settings (own.py), which say where and how many tokens are cut.
Letters: N visual tokens before pruning, n at a cut, Q of the question, H heads, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nanogap import prune
from nanogap.errors import NanogapError
from nanogap.prune import Kept, VisualTokens, needs_of, ranked, strategy, without

IN_DECODER = {   # fields that only a decoder layer shows, where `features` are hidden states
    "attention":       "(H, n)      how much the text looks at each visual token in a layer",
    "value_attention": "(n + Q, n)  how much visual tokens, then the question's, would look at "
                       "each by their values alone",
    "axes":            "(2, n)      mean cosine and sine of RoPE at each one's position ID",
}
prune.FIELDS.update(IN_DECODER)


@strategy(needs={"attention"})
def fastv(seen: VisualTokens, budget: int, generator: Generator, *, layer: int | None = None,
          drop: float | None = None) -> Kept:
    """Patches that the prompt's last token attends to in a decoder layer: FastV, arXiv 2403.06764.

    As in its code; the paper speaks of all tokens.  Published as (K, R): layer and share dropped.
    """
    return Kept(ranked(seen.attention.float().mean(0), budget))


@strategy(needs={"attention"}, finds_budget=True)
def pyramiddrop(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
    """The same at each of three cuts, by the layer that comes next: PyramidDrop, arXiv 2410.17247.

    Without a budget half of the tokens go at each cut, as in the paper.
    differs: of a single token the code would keep none; here it stays
    """
    return Kept(ranked(seen.attention.float().mean(0), budget).sort().values)


@strategy(needs={"attention"})
def sparsevlm(seen: VisualTokens, budget: int, generator: Generator, *,
              label: int | None = None) -> Kept:
    """Patches that the raters attend to, and clusters of some others: SparseVLM, arXiv 2410.04417.

    Of those dropped, the best 30 % and one are clustered, ten to a cluster, whose mean is added.
    Its labels are no means: 192, 128, 96, 64 cost 206.5, 145.4, 114.1, 82.2 tokens over 32 layers.
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
                   label: int | None = None) -> Kept:
    """Patches that the raters attend to in the heads that look at the image most: SparseVLM+.

    They are 14 of 32, or that share.  differs: as for sparsevlm, all stay where all are asked for
    """
    attention = seen.attention.float()                           # (H, n)
    heads = ranked(attention.sum(1), max(1, round(len(attention) * 14 / 32)))
    return Kept(ranked(attention[heads].mean(0), budget).sort().values)


def clusters(x: Tensor, count: int) -> Tensor:
    """The means (count, C) of so many clusters of tokens (m, C), by density peaks among neighbours.

    A centre is dense, and far from any that is denser; the others go to the nearest centre.
    differs: the code adds random noise, so that no two are equally dense; here the first is denser
    source:  cluster_and_merge in SparseVLM's code, after DPC-KNN
    """
    points = x.float()
    exact = "donot_use_mm_for_euclid_dist"   # a matrix product would lose small distances
    distance = torch.cdist(points, points, compute_mode=exact) / x.shape[1] ** 0.5    # (m, m)
    nearest = distance.sort(dim=1).values[:, :count]                          # itself among them
    density = (-nearest.pow(2).mean(1)).exp()                                 # (m,)
    place = ranked(density, len(x)).argsort()                                 # (m,) 0: the densest
    denser = place < place[:, None]                                           # (m, m)
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
    the question and the seeds are.  Axes (5 % and 5 %) are patches at whose position ID RoPE turns
    least, or by a quarter, in the mean.  Only at their own IDs are they axes: this strategy needs
    GAP by its own definition.  Without a budget 20 to 31 % stay, by how far the four overlap.
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


COUNTING = {"drop", "label"}    # settings that say how many tokens stay
PUBLISHED_LAYERS = 32   # of the decoder for which the methods give their layers
PUBLISHED_TOKENS = 576  # LLaVA-1.5's, for which SparseVLM gives its labels


@dataclass(frozen=True)
class Method:
    """How a method cuts."""
    layers: tuple[int, ...] = (2,)   # before which, of 32, counted from 0
    ahead: bool = False       # by the attention of that layer; else of the one before it
    raters: bool = False      # of the raters among the text; else of its last token
    corrected: bool = False   # divided by what RoPE alone makes of it
    halves: bool = False      # whether without a budget half of the tokens stay at each cut
    recycles: bool = False    # whether clusters of dropped tokens are added
    caches: bool = False      # whether the caches of the layers below, but layer 0's, are cut too
    labels: dict[int, tuple[int, ...]] = field(default_factory=dict)   # name -> kept at each cut


METHODS = {   # one of your own cuts as FastV does
    "fastv": Method(),
    "pyramiddrop": Method((8, 16, 24), ahead=True, halves=True),
    "sparsevlm": Method((3, 7, 16), raters=True, recycles=True, labels={   # what 2, 6, 15 give out
        192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}),
    "sparsevlm_plus": Method((3, 7, 16), raters=True, corrected=True, labels={
        192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}),
    "ivc": Method((16,), caches=True),
}
Cuts = Sequence[tuple[int, int | None]]   # (layer, visual tokens; None: it finds how many)


def settings_of(name: str) -> dict[str, Any]:
    """What differs from the defaults in a strategy that stands in STRATEGIES."""
    return getattr(prune.STRATEGIES[name], "settings", {})


def method_of(name: str) -> Method:
    """How a strategy cuts, whatever its settings."""
    base = name.partition("(")[0] if settings_of(name) else name
    return METHODS.get(base, Method())


def prunes_there(name: str) -> bool:
    """Whether a strategy prunes inside the decoder, by what its layers show."""
    return not needs_of(name).isdisjoint(IN_DECODER)


def plan(name: str, N: int, budget: int | None, layers: int) -> Cuts:
    """The cuts of a strategy as (layer, tokens that are kept), for a mean over the layers.

    budget:  None where the method or its settings say how many stay
    returns: None for what a strategy finds only when it sees the tokens
    raises:  NanogapError where there is no such layer, or the mean cannot be so low
    """
    at, method = where(name, layers), method_of(name)
    if budget is None:
        return list(zip(at, counts_said(name, N, len(at)), strict=True))
    if not COUNTING.isdisjoint(settings_of(name)):
        raise NanogapError(f"{name} says itself how many tokens stay: keep is auto for it (None in "
                           "Python)")
    nearest = min(method.labels, key=lambda label: abs(label / PUBLISHED_TOKENS - budget / N),
                  default=0)

    def cuts(size: float) -> Cuts:
        shares = [size ** (i + 1) for i in range(len(at))]
        if nearest:
            shares = [size * kept / PUBLISHED_TOKENS for kept in method.labels[nearest]]
        return [(layer, max(1, min(N, round(N * share))))
                for layer, share in zip(at, shares, strict=False)]

    def mean(size: float) -> float:
        return mean_tokens(name, N, counts(name, N, cuts(size)), layers)

    lowest = mean(0)
    if budget < lowest:
        raise NanogapError(f"{name} cannot keep {budget} of {N} visual tokens in the mean over "
                           f"{layers} layers, of which {1 if method.caches else at[0]} "
                           f"see all: keep from {ceil(lowest)} to {N}")
    return cuts(largest(lambda size: mean(size) <= budget, PUBLISHED_TOKENS))


def where(name: str, layers: int) -> list[int]:
    """Before which layers a strategy cuts in a decoder of so many: scaled, unless settings say."""
    settings, at = settings_of(name), list(method_of(name).layers)
    if "layer" in settings:
        at = [settings["layer"]]
    elif "label" not in settings:
        at = [max(round(layer * layers / PUBLISHED_LAYERS), i) for i, layer in enumerate(at, 1)]
        at = [layer for layer in at if layer < layers] or at[:1]
    for layer in at:
        if not 0 < layer < layers:
            raise NanogapError(f"{name} cannot cut before layer {layer} of {layers}: give one from "
                               f"1 to {layers - 1}, or leave its settings out")
    return at


def counts_said(name: str, N: int, cuts: int) -> Sequence[int | None]:
    """How many tokens stay at each cut by settings or a published rule; None: it finds them."""
    settings, method = settings_of(name), method_of(name)
    if method.labels and "label" in settings:
        return [min(kept, N) for kept in method.labels[settings["label"]]]
    if "drop" in settings:
        return [max(1, round(N * (1 - settings["drop"])))] * cuts
    if method.halves:
        return [max(1, N // 2 ** (i + 1)) for i in range(cuts)]
    return [None] * cuts


def counts(name: str, N: int, cuts: Cuts) -> Cuts:
    """Visual tokens from each cut of a plan on, those that are added included."""
    found, n = [], N
    for layer, kept in cuts:
        if kept is not None and kept < n:
            recycled = int(0.3 * (n - kept)) + 1
            n = kept + (recycled // 10 + 1 if method_of(name).recycles else 0)
        found.append((layer, kept and n))
    return found


def mean_tokens(name: str, N: int, counted: Cuts, layers: int) -> float:
    """Visual tokens in the mean over the caches of all layers, by what `counts` gives."""
    held = [N] * layers
    for layer, n in counted:
        first = 1 if method_of(name).caches else layer
        held[first:] = [n or N] * (layers - first)
    return sum(held) / layers


def cuts_in_words(name: str, counted: Cuts, layers: int) -> str:
    """The cuts for people, in one line."""
    left = ", ".join(f"{n or 'what it finds'} from layer {layer} on" for layer, n in counted)
    below = ", and in the caches of all layers but 0" if method_of(name).caches else ""
    return f"{name} in {layers} layers, counted from 0: visual tokens cut to {left}{below}"
