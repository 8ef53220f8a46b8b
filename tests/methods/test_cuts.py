"""Where strategies cut in the decoder, and how many tokens they keep there."""

import math

import pytest

from nanogap import NanogapError
from nanogap.methods import find
from nanogap.methods.in_decoder import counts, mean_tokens, method_of, plan, where

SPARSE = ["sparsevlm", "sparsevlm_plus"]
METHODS = ["fastv", "pyramiddrop", *SPARSE]


@pytest.mark.parametrize("spec, mean, of_40", [
    ("sparsevlm(label=192)", 206.5, 187.8), ("sparsevlm(label=128)", 145.4, 124.1),
    ("sparsevlm(label=96)", 114.1, 96.7), ("sparsevlm(label=64)", 82.2, 69.4),
    ("sparsevlm_plus(label=192)", 206.75, 189.0), ("sparsevlm_plus(label=128)", 144.125, 127.3),
    ("sparsevlm_plus(label=96)", 113.9375, 96.75), ("sparsevlm_plus(label=64)", 81.8125, 69.45),
    # FastV, as papers say: K = 2, R = 50 %
    ("fastv(layer=2,drop=0.5)", 306, 302.4), ("fastv(layer=2,drop=0.75)", 171, 165.6),
    ("fastv(layer=3,drop=0.5)", 315, 309.6)])
def test_published_settings_cost_so_many_tokens_in_the_mean(spec: str, mean: float, of_40: float):
    """SparseVLM counts what layers give out: 192.0, 128.6, 96.9, 64.8.  What they are fed is more.
    """
    key = find(spec)
    for layers, expected in ((32, mean), (40, of_40)):
        cuts = counts(key, 576, plan(key, 576, None, layers))
        assert mean_tokens(key, 576, cuts, layers) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("spec, N, layers, cuts", [
    ("fastv(layer=2,drop=0.5)", 576, 32, [(2, 288)]),
    ("fastv(drop=0.5)", 144, 4, [(1, 72)]),
    # a label is the published list at its own layers, whatever the depth
    ("sparsevlm(label=192)", 576, 32, [(3, 300), (7, 200), (16, 110)]),
    ("sparsevlm_plus(label=64)", 576, 40, [(3, 66), (7, 34), (16, 20)]),
    # without settings it halves at a quarter, a half and three quarters, and leaves one at least
    ("pyramiddrop", 31, 4, [(1, 15), (2, 7), (3, 3)]),                        # int(31 / 8)
    ("pyramiddrop", 577, 40, [(10, 288), (20, 144), (30, 72)]),
    ("pyramiddrop", 5, 4, [(1, 2), (2, 1), (3, 1)])])
def test_settings_say_where_and_how_many(spec: str, N: int, layers: int, cuts: list):
    key = find(spec)
    assert plan(key, N, None, layers) == cuts
    if "(" in spec:
        with pytest.raises(NanogapError, match="says itself how many tokens stay: keep is auto "):
            plan(key, N, 50, layers)


@pytest.mark.parametrize("layers, fastv, pyramiddrop, sparsevlm", [
    (40, [2], [10, 20, 30], [4, 9, 20]),
    (5, [1], [1, 2, 4], [1, 2, 3]),
    (2, [1], [1], [1])])
def test_layers_scale_with_the_depth_of_the_decoder(layers, fastv, pyramiddrop, sparsevlm):
    assert where("fastv", layers) == fastv
    assert where("pyramiddrop", layers) == pyramiddrop
    for name in SPARSE:
        assert where(name, layers) == sparsevlm


@pytest.mark.parametrize("spec, layer, layers", [
    ("fastv(layer=-1)", -1, 3), ("fastv(layer=0)", 0, 3), ("fastv(layer=3)", 3, 3),
    ("sparsevlm(label=64)", 7, 5), ("pyramiddrop", 1, 1)])
def test_a_cut_needs_a_layer_before_it_and_one_behind(spec: str, layer: int, layers: int):
    with pytest.raises(NanogapError, match=f"cannot cut before layer {layer} of {layers}: give "
                                           f"one from 1 to {layers - 1}, or leave its settings"):
        plan(find(spec), 16, 8, layers)


def every_plan(name: str, N: int, layers: int, budget: int) -> list[list[tuple[int, int]]]:
    """All lists of a method's own proportions: between any two sizes at which a number changes."""
    at = where(name, layers)
    powers = [1, 2, 3] if name == "pyramiddrop" else [1, 1, 1]
    factors = [1.0, 1.0, 1.0]
    if name in SPARSE:
        labels = method_of(name).labels
        nearest = min(labels, key=lambda own: abs(own / 576 - budget / N))
        factors = [kept / 576 for kept in labels[nearest]]
    sizes = sorted({((k + 0.5) / N / factor) ** (1 / power) for k in range(N)
                    for _, factor, power in zip(at, factors, powers, strict=False)})
    sizes = [0.0, *((a + b) / 2 for a, b in zip(sizes, sizes[1:], strict=False)), 2 * sizes[-1]]
    return [[(layer, max(1, min(N, round(N * factor * size ** power))))
             for layer, factor, power in zip(at, factors, powers, strict=False)] for size in sizes]


@pytest.mark.parametrize("N, layers", [(16, 3), (144, 4), (30, 32)])
@pytest.mark.parametrize("name", METHODS)
def test_a_plan_is_the_best_that_rounding_allows_and_no_more(name: str, N: int, layers: int):
    def mean(cuts: list[tuple[int, int]]) -> float:
        return mean_tokens(name, N, counts(name, N, cuts), layers)

    lowest = math.ceil(mean(every_plan(name, N, layers, 1)[0]))
    for budget in range(1, N + 1, 1 if N < 100 else 7):
        if budget < lowest:
            with pytest.raises(NanogapError, match=f"{name} cannot keep {budget} of {N} visual "
                                                   f"tokens in the mean over {layers} layers, of "
                                                   f"which {where(name, layers)[0]} see "
                                                   f"all: keep from {lowest} to {N}"):
                plan(name, N, budget, layers)
            continue
        cuts, plans = plan(name, N, budget, layers), every_plan(name, N, layers, budget)
        means = [mean(other) for other in plans]
        assert means[plans.index(cuts)] == max(mean for mean in means if mean <= budget)
    assert plan(name, N, lowest, layers) and plan(name, N, N, layers)[0][1] == N
