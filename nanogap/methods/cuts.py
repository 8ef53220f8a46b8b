"""Where a strategy cuts in the decoder, and how many visual tokens it keeps there.

In:  a strategy with its settings, N visual tokens, a budget, the depth of the decoder.
Out: its cuts, as (layer, tokens that are kept from there on).

A budget is a mean over all layers: of the visual tokens that each holds in its cache, which are
those that it is fed.  ivc cuts caches below its layer too: its mean is that of the caches.
Letters: N visual tokens before pruning, n of them at a cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from nanogap.errors import NanogapError
from nanogap.methods.inside import largest
from nanogap.methods.settings import COUNTING, IN_DECODER, base_of, settings_of
from nanogap.prune import needs_of

PUBLISHED_LAYERS = 32   # of the decoder for which the methods give their layers
PUBLISHED_TOKENS = 576  # LLaVA-1.5's, for which SparseVLM gives its labels
LABELS = {              # tokens kept at each cut, without those added
    "sparsevlm": {
        192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "sparsevlm_plus": {
        192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@dataclass(frozen=True)
class Method:
    """How a method cuts."""

    layers: tuple[int, ...] = (2,)   # before which, of 32, counted from 0
    ahead: bool = False       # by the attention of that layer; else of the one before it
    raters: bool = False      # of the raters among the text; else of its last token
    corrected: bool = False   # divided by what RoPE alone makes of it
    recycles: bool = False    # whether clusters of dropped tokens are added
    caches: bool = False      # whether the caches of the layers below, but layer 0's, are cut too


METHODS = {   # one of your own cuts as FastV does
    "fastv": Method(),
    "pyramiddrop": Method((8, 16, 24), ahead=True),
    "sparsevlm": Method((3, 7, 16), raters=True, recycles=True),   # what 2, 6 and 15 give out
    "sparsevlm_plus": Method((3, 7, 16), raters=True, corrected=True),
    "ivc": Method((16,), caches=True),
}
Cuts = Sequence[tuple[int, int | None]]   # (layer, visual tokens; None: it finds how many)


def method_of(name: str) -> Method:
    """How a strategy cuts, whatever its settings."""
    return METHODS.get(base_of(name), Method())


def prunes_there(name: str) -> bool:
    """Whether a strategy prunes inside the decoder, by what its layers show."""
    return bool(needs_of(name) & IN_DECODER)


def plan(name: str, N: int, budget: int | None, layers: int) -> Cuts:
    """The cuts of a strategy as (layer, tokens that are kept), for a mean over the layers.

    budget:  None where the method or its settings say how many stay
    returns: None for what a strategy finds only when it sees the tokens
    raises:  NanogapError where there is no such layer, or the mean cannot be so low
    """
    at = where(name, layers)
    if budget is None:
        return list(zip(at, counts_said(name, N, len(at)), strict=True))
    if not COUNTING.isdisjoint(settings_of(name)):
        raise NanogapError(f"{name} says itself how many tokens stay: keep is auto for it (None in "
                           "Python)")
    labels = LABELS.get(base_of(name), {})
    nearest = min(labels, key=lambda label: abs(label / PUBLISHED_TOKENS - budget / N), default=0)
    published = labels.get(nearest)
    if published and len(at) > len(published):
        raise NanogapError(f"{name} cuts {len(published)} times at most: give ratios for more cuts")

    def cuts(size: float) -> Cuts:
        shares = [size ** (i + 1) for i in range(len(at))]
        if published:
            shares = [size * kept / PUBLISHED_TOKENS for kept in published]
        return [(layer, max(1, min(N, round(N * share))))
                for layer, share in zip(at, shares, strict=False)]

    def mean(size: float) -> float:
        return mean_tokens(name, N, counts(name, N, cuts(size)), layers)

    lowest = mean(0)
    if budget < lowest:
        raise NanogapError(f"{name} cannot keep {budget} of {N} visual tokens in the mean over "
                           f"{layers} layers, of which {1 if method_of(name).caches else at[0]} "
                           f"see all: keep from {ceil(lowest)} to {N}")
    return cuts(largest(lambda size: mean(size) <= budget, PUBLISHED_TOKENS))


def where(name: str, layers: int) -> list[int]:
    """Before which layers a strategy cuts in a decoder of so many: scaled, unless settings say."""
    settings, at = settings_of(name), list(method_of(name).layers)
    if "layers" in settings:
        at = settings["layers"]
    elif "layer" in settings:
        at = [settings["layer"]]
    elif "label" not in settings:
        at = [max(round(layer * layers / PUBLISHED_LAYERS), i) for i, layer in enumerate(at, 1)]
        at = [layer for layer in at if layer < layers] or at[:1]
    for last, layer in pairwise([0, *at]):
        if not last < layer < layers:
            raise NanogapError(f"{name} cannot cut before layer {layer} of {layers}: give layers "
                               f"from 1 to {layers - 1}, in order")
    return at


def counts_said(name: str, N: int, cuts: int) -> Sequence[int | None]:
    """How many tokens stay at each cut by settings or a published rule; None: it finds them."""
    settings, method = settings_of(name), base_of(name)
    said: list[int | None] = [None] * cuts
    if "label" in settings:
        said = [min(kept, N) for kept in LABELS[method][settings["label"]]]
    elif "drop" in settings:
        said = [max(1, round(N * (1 - settings["drop"])))]
    elif "ratios" in settings or method == "pyramiddrop":
        ratios = settings.get("ratios", [0.5 ** (i + 1) for i in range(cuts)])
        said = [max(1, int(N * ratio + 1e-6)) for ratio in ratios]
    if len(said) < cuts or len(said) > cuts and "layers" in settings:
        raise NanogapError(f"{name} cuts {cuts} times: give as many layers and ratios")
    return said[:cuts]


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
