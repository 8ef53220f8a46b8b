"""Reading the prompt, and pruning on the way, between two layers of the decoder.

In:  a prompt with its visual tokens, and a list of cuts.
Out: logits, and a cache whose later layers hold fewer rows where there were cuts.

With an empty list this is prefill as everybody knows it.  A cut stands before a layer.  The layers
below it have read everything, and what the text looks at there says which visual tokens stay.  The
mode decides about their order and IDs (gap.py), as it does before the decoder.  Three methods:

    fastv           one cut, early                            arXiv 2403.06764
    pyramiddrop     three, which keep the same share each     arXiv 2410.17247
    sparsevlm       three; text tokens that look at the       arXiv 2410.04417
    sparsevlm_plus  image most decide, and not the last one   (version 2 of its code)

Their published codes keep the old position IDs (FastV, SparseVLM's version 2) or renumber what is
left at each cut (PyramidDrop, SparseVLM's version 1); here each can be asked in every mode.
Letters: P tokens before the image, N visual tokens, n of them at a cut, K kept, M added, A tokens
after the image; H heads, T tokens in the sequence, D of them drafted, Q that look at the others.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import cast

import torch
from torch import Tensor

from nanogap import gap
from nanogap.checks.command import NanogapError
from nanogap.gap import Layout
from nanogap.llama import Decoder, KVCache, LlamaDecoderLayer, LlamaForCausalLM, rope_angles, rotate
from nanogap.prompt import NOTHING, Draft
from nanogap.prune import (
    Kept,
    View,
    VisualTokens,
    check,
    in_decoder,
    ranked,
    select,
    strategy,
    without,
)

PUBLISHED_LAYERS = 32   # of the decoder for which the methods give their layers
FASTV_LAYER = 2         # FastV's K, of so many
SPARSE_LAYERS = (3, 7, 16)   # SparseVLM prunes what layers 2, 6 and 15 give out, counted from 0
PUBLISHED_TOKENS = 576       # LLaVA-1.5's, for which SparseVLM gives its budgets
SPARSE_BUDGETS = {      # what its code calls a budget: tokens kept at each cut, without those added
    "sparsevlm": {
        192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "sparsevlm_plus": {
        192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


# ----- who stays ----------------------------------------------------------------------------------


@strategy(needs={"attention"})
def fastv(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """Patches that the prompt's last token attends to in a decoder layer: FastV, arXiv 2403.06764.

    The paper speaks of the attention of all tokens; its code takes the last one's row, as here.
    """
    return Kept(ranked(seen.attention.float().mean(0), budget))


@strategy(needs={"attention"}, finds_budget=True)
def pyramiddrop(seen: VisualTokens, budget: int | None, generator: torch.Generator) -> Kept:
    """The same at each of three cuts, by the layer that comes next: PyramidDrop, arXiv 2410.17247.

    Without a budget half of the tokens go at each cut, as in the paper.
    differs: of a single token the code would keep none; here it stays
    """
    if budget is None:
        budget = max(1, len(seen.features) // 2)
    return Kept(ranked(seen.attention.float().mean(0), budget).sort().values)


@strategy(needs={"attention"})
def sparsevlm(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """Patches that the raters attend to, and clusters of some others: SparseVLM, arXiv 2410.04417.

    Of those dropped, the best 30 % and one are clustered, ten to a cluster, and the mean of each
    cluster is added behind the kept ones.
    differs: see `clusters`
    """
    scores = seen.attention.float().mean(0)                      # (n,)
    keep = ranked(scores, budget).sort().values
    dropped = without(keep, len(scores))
    if len(dropped) == 0:
        return Kept(keep)
    recycled = dropped[ranked(scores[dropped], int(0.3 * len(dropped)) + 1)]
    return Kept(keep, added=clusters(seen.features[recycled], len(recycled) // 10 + 1))


@strategy(needs={"attention"})
def sparsevlm_plus(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """Patches that the raters attend to in the heads that look at the image most: SparseVLM+.

    The code takes 14 heads, of the 32 of a 7B; of other numbers it is the same share here.  No
    token is added.
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
    share = torch.nn.functional.one_hot(member, count).T.float()              # (count, m)
    return (share @ points / share.sum(1, keepdim=True)).to(x.dtype)


# ----- where, and how many ------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Visual tokens are dropped before a layer."""

    layer: int                               # counted from 0
    choose: Callable[[VisualTokens], Kept]   # of n hidden states, with the attention to them
    ahead: bool = False       # by the attention of this layer; else of the one before it
    raters: bool = False      # of the raters among the text; else of its last token
    corrected: bool = False   # divided by what RoPE alone makes of it


def scaled(published: Sequence[int], layers: int) -> list[int]:
    """Layers of a published decoder in one of another depth, each higher than the last."""
    found: list[int] = []
    for layer in published:
        lowest = found[-1] + 1 if found else 1
        at = max(round(layer * layers / PUBLISHED_LAYERS), lowest)
        if at < layers:
            found.append(at)
    return found


def counts(N: int, cuts: Sequence[tuple[int, int | None]],
           recycles: bool) -> list[tuple[int, int | None]]:
    """Visual tokens from each cut on, as (layer, how many), those that are added included.

    cuts:     (layer, tokens that are kept from there on)
    recycles: whether clusters of dropped ones are added to them, as `sparsevlm` does
    """
    found: list[tuple[int, int | None]] = []
    n = N
    for layer, kept in cuts:
        if kept is not None:
            dropped = n - kept
            n = kept
            if recycles and dropped > 0:
                n += (int(0.3 * dropped) + 1) // 10 + 1
        found.append((layer, None if kept is None else n))
    return found


def mean_tokens(N: int, cuts: Sequence[tuple[int, int]], layers: int, recycles: bool) -> float:
    """Visual tokens in the mean over the inputs of all layers: see `counts`."""
    total, start, n = 0, 0, N
    for layer, left in counts(N, cuts, recycles):
        total += (layer - start) * n
        start = layer
        n = cast(int, left)                           # since each of `cuts` is one
    return (total + (layers - start) * n) / layers


def plan(name: str, N: int, budget: int | None, layers: int,
         layer: int | None = None) -> list[tuple[int, int | None]]:
    """The cuts of a method as (layer, tokens that are kept), for a budget in the mean over layers.

    budget:  None where the method has a rule of its own
    layer:   FastV's K, if not its published one
    returns: None for what a strategy of your own finds only when it sees the tokens
    raises:  NanogapError where there is no such layer, or the mean cannot be so low
    """
    check(name, N, budget)
    at = where(name, layers, layer)
    if budget is None:
        halves = name == "pyramiddrop"
        return [(before, max(1, N // 2 ** (i + 1)) if halves else None)
                for i, before in enumerate(at)]
    published = SPARSE_BUDGETS.get(name, {})
    if (N, layers) == (PUBLISHED_TOKENS, PUBLISHED_LAYERS) and budget in published:
        return list(zip(at, published[budget], strict=True))

    def cuts(size: float) -> list[tuple[int, int]]:
        shares = shares_of(name, size, budget / N, len(at))
        return [(before, max(1, min(N, round(N * share))))
                for before, share in zip(at, shares, strict=True)]

    def mean(size: float) -> float:
        return mean_tokens(N, cuts(size), layers, name == "sparsevlm")

    lowest = mean(0)
    if budget < lowest:
        raise NanogapError(f"{name} cannot keep {budget} of {N} visual tokens in the mean over "
                           f"{layers} layers, of which {at[0]} see all: keep from "
                           f"{ceil(lowest)} to {N}")
    return list(cuts(largest(lambda size: mean(size) <= budget, PUBLISHED_TOKENS)))


def largest(fits: Callable[[float], bool], high: float) -> float:
    """The largest size up to `high` that fits, where 0 does, and all below one that does."""
    low = 0.0
    for _ in range(64):                               # halves: more than a float can tell apart
        middle = (low + high) / 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def shares_of(name: str, size: float, share: float, count: int) -> list[float]:
    """Which share of the visual tokens a method keeps at each of its cuts, for a size to be found.

    share: of them in the mean, by which SparseVLM takes the nearest of its published budgets
    """
    published = SPARSE_BUDGETS.get(name)
    if published is None:
        return [size ** (i + 1) for i in range(count)]
    nearest = min(published, key=lambda own: abs(own / PUBLISHED_TOKENS - share))
    return [size * kept / PUBLISHED_TOKENS for kept in published[nearest][:count]]


def check_layer(layer: int | None, names: Iterable[str]) -> None:
    """Refuse a layer that none of the strategies would cut before."""
    fixed = {"pyramiddrop", *SPARSE_BUDGETS}
    if layer is not None and all(not in_decoder(name) or name in fixed for name in names):
        raise NanogapError("--layer says where fastv cuts, or a strategy of your own in the "
                           "decoder: give --prune fastv, or leave it out")


def where(name: str, layers: int, layer: int | None) -> list[int]:
    """Before which layers a method cuts in a decoder of so many; one of your own cuts as FastV."""
    if layers < 2:
        raise NanogapError(f"{name} prunes between two layers of the decoder, and this one has "
                           f"{layers}: choose a strategy that prunes before it")
    if name in SPARSE_BUDGETS:
        at = scaled(SPARSE_LAYERS, layers)
    elif name == "pyramiddrop":
        at = scaled([PUBLISHED_LAYERS * quarter // 4 for quarter in (1, 2, 3)], layers)
    else:
        at = scaled([FASTV_LAYER], layers) if layer is None else [layer]
    if not 0 < at[0] < layers:
        raise NanogapError(f"{name} cannot cut before layer {at[0]} of {layers}: "
                           f"choose one from 1 to {layers - 1}")
    return at


def cuts_of(name: str, N: int, budget: int | None, seed: int, layers: int,
            layer: int | None = None) -> list[Cut]:
    """The cuts of a strategy in a decoder of so many layers: see `plan`."""
    def cut(before: int, kept: int | None) -> Cut:
        def choose(seen: VisualTokens) -> Kept:
            everything = torch.arange(len(seen.features))
            return select(name, [View(seen, everything)], kept, seed)
        return Cut(before, choose, ahead=name == "pyramiddrop", raters=name in SPARSE_BUDGETS,
                   corrected=name == "sparsevlm_plus")

    return [cut(before, kept) for before, kept in plan(name, N, budget, layers, layer)]


def cuts_in_words(name: str, cuts: Sequence[tuple[int, int | None]], layers: int) -> str:
    """The same for people, in one line."""
    left = ", ".join(f"{kept or 'what it finds'} from layer {layer} on" for layer, kept in cuts)
    return f"{name} in {layers} layers, counted from 0: visual tokens cut to {left}"


# ----- who looks at what --------------------------------------------------------------------------


def raters_of(x: Tensor, layout: Layout) -> Tensor:
    """Which tokens after the image are about it: places (Q,), counted from the end, -1 the last.

    x: (1, T, C) embeddings of the prompt.  A rater's share of the products with visual tokens is
    above the mean; where all are equal, the last token rates.  source: SparseVLM's code
    """
    end = layout.P + layout.visual_tokens
    visual, text = x[0, layout.P:end].float(), x[0, end:].float()             # (n, C), (A, C)
    share = (visual @ text.T).softmax(1).mean(0)                              # (A,)
    raters = (share > share.mean()).nonzero()[:, 0]
    return raters - len(text) if len(raters) else raters.new_tensor([-1])


def attention_to_image(model: LlamaForCausalLM, layer: int, x: Tensor, queries: Tensor,
                       layout: Layout, corrected: bool = False) -> Tensor:
    """How much some tokens look at the visual ones in a layer, the mean over these tokens: (H, n).

    x:         (1, T, C), what that layer is fed; queries: (Q,) places of the tokens that look
    corrected: weights are divided by the products of vectors of ones under RoPE
    """
    block = cast(LlamaDecoderLayer, model.model.layers[layer])
    attention, config, T = block.self_attn, model.model.config, x.shape[1]
    ids = layout.position_ids.to(x.device)                                    # (T,)
    cos, sin = (t.to(x.dtype) for t in rope_angles(ids, config.head_dim, config.rope_theta))
    h = block.input_layernorm(x)                                              # (1, T, C)
    q = attention.split(attention.q_proj(h[:, queries]))                      # (1, H, Q, D)
    q = rotate(q, cos[queries], sin[queries])
    k = rotate(attention.split(attention.k_proj(h)), cos, sin)                # (1, G, T, D)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)                  # (1, H, T, D)
    scores = q @ k.transpose(2, 3) * config.head_dim ** -0.5                  # (1, H, Q, T)
    later = torch.arange(T, device=x.device) > queries[:, None]               # (Q, T)
    weights = scores.float().masked_fill(later, float("-inf")).softmax(-1)[0]
    if corrected:
        ones = torch.ones(1, 1, T, config.head_dim, device=x.device)
        turned = rotate(ones, cos.float(), sin.float())[0, 0]                 # (T, D)
        weights = weights / (turned[queries] @ turned.T * config.head_dim ** -0.5)
    return weights[:, :, layout.P:layout.P + layout.visual_tokens].mean(1)


# ----- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A run of layers that see the same tokens."""

    start: int                # the first of these layers
    layout: Layout            # which token stands where, in them


@dataclass
class Prefilled:
    """A prompt that was read: what an answer goes on from."""

    model: LlamaForCausalLM
    cache: KVCache
    logits: Tensor                 # (1 + D, V) after the prompt, and after each of D drafted tokens
    drafted: Draft
    stages: list[Stage]             # one, and one more for each cut
    decoder: Decoder | None = None  # runs a pass in place of the model: bench/graph.py
    passes: int = 0                 # of the decoder since then

    @property
    def layout(self) -> Layout:
        """Which token stands where in the last layers."""
        return self.stages[-1].layout

    @property
    def next_position(self) -> int:
        """ID of the first generated token, as the first layers see it."""
        return self.stages[0].layout.next_position

    def feed(self, tokens: Sequence[int], position_ids: Sequence[int],
             alternatives: int = 1) -> Tensor:
        """A pass over new tokens: logits (T, V).

        position_ids: as the first layers see them; behind a cut that renumbered they are lower
        """
        decoder, device = self.model.model, self.logits.device
        x = decoder.embed_tokens(torch.tensor(tokens, device=device))[None]   # (1, T, C)
        ids = torch.tensor(position_ids, device=device)                       # (T,)
        self.passes += 1
        if len(self.stages) == 1:
            return (self.decoder or self.model)(x, ids, self.cache, alternatives)[0]
        for stage, stop in zip(self.stages, self.ends(), strict=True):
            moved = self.next_position - stage.layout.next_position
            x = decoder.run(x, ids - moved, self.cache, stage.start, stop, alternatives)
        return self.model.logits(decoder.norm(x))[0]

    def ends(self) -> list[int]:
        """Before which layer each stage ends."""
        return [stage.start for stage in self.stages[1:]] + [len(self.cache.lengths)]

    def visual_tokens(self) -> float:
        """Visual tokens in the decoder, the mean over its layers."""
        if len(self.stages) == 1:
            return self.layout.visual_tokens
        total = sum((end - stage.start) * stage.layout.visual_tokens
                    for stage, end in zip(self.stages, self.ends(), strict=True))
        return total / len(self.cache.lengths)


def prefill(model: LlamaForCausalLM, x: Tensor, layout: Layout, cuts: Sequence[Cut] = (),
            drafted: Draft = NOTHING, room: int = 0, prefix: KVCache | None = None) -> Prefilled:
    """Read a prompt, and drop visual tokens before the layer of each cut.

    x:       (1, T, C) embeddings of the prompt
    layout:  which of its tokens stands where
    drafted: tokens that are read with it and stand behind it; none where there are cuts
    room:    rows of the cache that stay free
    prefix:  the cache of its first tokens, where these were read before; None where there are cuts
    """
    decoder, ids = model.model, layout.position_ids.to(x.device)              # (T,)
    behind = torch.tensor(drafted.tokens, device=x.device).long()             # (D,)
    places = torch.tensor(drafted.places(layout.next_position), device=x.device).long()
    x = torch.cat([x, decoder.embed_tokens(behind)[None]], dim=1)             # (1, T + D, C)
    ids = torch.cat([ids, places])                                            # (T + D,)
    cache, stages = KVCache(decoder.config, len(ids) + room, x), [Stage(0, layout)]
    read = cache.copy(prefix) if prefix else 0
    x, ids = x[:, read:], ids[read:]
    raters = raters_of(x, layout) if any(cut.raters for cut in cuts) else None
    for cut in cuts:
        x, stage = run_to(cut, model, x, stages[-1], cache, raters)
        stages.append(stage)
        ids = stage.layout.position_ids.to(x.device)
    x = decoder.run(x, ids, cache, stages[-1].start, None, drafted.alternatives,
                    last=1 + len(drafted.tokens))                             # (1, 1 + D, C)
    logits = model.logits(decoder.norm(x))[0]                                 # (1 + D, V)
    return Prefilled(model, cache, logits, drafted, stages)


def run_to(cut: Cut, model: LlamaForCausalLM, x: Tensor, stage: Stage, cache: KVCache,
           raters: Tensor | None) -> tuple[Tensor, Stage]:
    """Run a stage up to a cut: what stays of the sequence (1, T, C), and the next stage.

    raters: (Q,) places of text tokens, counted from the end of the sequence: -1 is the last
    """
    decoder, layout = model.model, stage.layout
    ids = layout.position_ids.to(x.device)                                    # (T,)
    attending = cut.layer if cut.ahead else cut.layer - 1
    fed = decoder.run(x, ids, cache, stage.start, attending)                  # (1, T, C)
    x = decoder.run(fed, ids, cache, attending, cut.layer)                    # (1, T, C)
    looking = torch.tensor([-1], device=x.device)
    if cut.raters and raters is not None:
        looking = raters
    queries = x.shape[1] + looking                                            # (Q,)
    attention = attention_to_image(model, attending, fed, queries, layout, cut.corrected)
    n = layout.visual_tokens
    hidden = x[0, layout.P:layout.P + n]                                      # (n, C)
    kept = cut.choose(VisualTokens(hidden, 1, n, {"attention": attention}))
    x, layout = leave(x, layout, kept)
    return x, Stage(cut.layer, layout)


def leave(x: Tensor, layout: Layout, kept: Kept) -> tuple[Tensor, Layout]:
    """What stays of a sequence (1, T, C), and which token stands where in it.

    kept: places among the visual tokens: patches first, then those added at earlier cuts, which
          have no place in the image and stay behind the patches
    """
    P, end = layout.P, layout.P + layout.visual_tokens
    patch = kept.keep < len(layout.keep)                                      # (K,)
    patches = patch.nonzero()[:, 0]
    others = (~patch).nonzero()[:, 0]
    left = gap.lay_out(layout.keep[kept.keep[patches]], P, layout.N, layout.A, layout.mode,
                       len(others) + kept.n_added)
    order = torch.cat([patches[left.order], others]).to(x.device)             # (K,)
    visual = x[0, P:end][kept.keep.to(x.device)] if kept.features is None else kept.features
    parts = [x[0, :P], visual[order]]
    if kept.added is not None:
        parts.append(kept.added)
    parts.append(x[0, end:])
    return torch.cat(parts)[None], left
