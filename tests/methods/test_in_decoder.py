"""Pruning inside the decoder: who looks at what, what is cut where, and whose IDs are left."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import nanogap
from nanogap.gap import MODES
from nanogap.methods import find
from nanogap.methods.in_decoder import clusters, counts, plan
from nanogap.models import VLM
from nanogap.prune import STRATEGIES, Kept, VisualTokens
from tests.methods.by_hand import (
    PICTURE,
    WORDS,
    Pick,
    Whole,
    best,
    means_of_clusters,
    raters_by_hand,
    turned_ones,
    whole,
)
from tests.tiny import tiny_config, write_checkpoint

METHODS = ["fastv", "pyramiddrop", "sparsevlm", "sparsevlm_plus"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """Five layers, in which two heads each share keys and values."""
    config = tiny_config(num_hidden_layers=5, num_key_value_heads=2)
    return nanogap.load(write_checkpoint(tmp_path_factory.mktemp("deep"), config), device="cpu")


def noise(m: int, C: int = 6) -> Tensor:
    return torch.randn(m, C, generator=torch.Generator().manual_seed(m))


CORNERS = torch.tensor([[0.0, 0, 0, 0], [4, 0, 0, 0], [0, 4, 0, 0], [4, 4, 0, 0]])
TIES = [CORNERS, CORNERS.repeat(2, 1), torch.ones(5, 4)]     # the lower index is the first
SIZES = [(1, 1), (7, 1), (7, 7), (11, 2), (25, 3), (40, 5), (83, 9)]


@pytest.mark.parametrize("x, count", [
    *[(noise(m), count) for m, count in SIZES],
    (1000 + noise(60, 8), 7),          # rounding would hide small distances from a product
    *[(x, count) for x in TIES for count in (1, 2, 3, 4)]])
def test_clusters_are_those_of_the_published_code(x: Tensor, count: int):
    assert torch.allclose(clusters(x, count), means_of_clusters(x, count), atol=1e-5)


def picks(spec: str, model: VLM, budget: int | None) -> list[tuple[int, Pick]]:
    """What a method does at its cuts, by hand; how many it keeps at each is tested below."""
    x, P, N, A = whole(model)
    c, name = model.config.text, spec.partition("(")[0]
    looking = [-1]                # counted from the end, since what stands before gets shorter
    if name.startswith("sparsevlm"):
        looking = [place - x.shape[1] for place in raters_by_hand(x, P, N)]
        assert 1 < len(looking) < A

    def pick(count: int, own: Tensor, before: Tensor, behind: Tensor, ids: list[int]):
        weights = behind if name == "pyramiddrop" else before
        weights = weights[:, looking, P:P + len(own)]                         # (H, Q, n)
        if name == "sparsevlm_plus":
            weights = weights / torch.tensor([
                [turned_ones(ids[query] - ids[P + i], c.head_dim, c.rope_theta)
                 for i in range(len(own))] for query in looking])
            heads = best(weights.sum((1, 2)), max(1, round(len(weights) * 14 / 32)))
            weights = weights[heads]
        scores = weights.mean((0, 1))
        keep = best(scores, count)
        dropped = [i for i in range(len(own)) if i not in keep]
        if name != "fastv":
            keep.sort()
        if name != "sparsevlm" or not dropped:
            return keep, own[:0]
        again = [dropped[i] for i in best(scores[dropped], int(0.3 * len(dropped)) + 1)]
        return keep, means_of_clusters(own[again], len(again) // 10 + 1)

    return [(layer, partial(pick, count))
            for layer, count in plan(find(spec), N, budget, c.num_hidden_layers)]


def same_as_by_hand(model: VLM, spec: str, budget: int | None, mode: str, most: int) -> Whole:
    """Words, tokens, IDs, counts and rows in the cache of a method, against whole passes."""
    result = model.ground(PICTURE, WORDS, spec, budget, mode, max_new_tokens=most)
    oracle, c = Whole(model, mode, picks(spec, model, budget), most), model.config.text
    assert oracle.said == result.tokens
    assert [patch for patch in oracle.visual[-1] if patch is not None] == result.keep.tolist()
    assert oracle.ids[-1] == result.position_ids.tolist()
    assert oracle.ids[-1][-1] + 1 == result.next_position
    at = [layer for layer, _ in oracle.cuts]
    assert list(zip(at, map(len, oracle.visual[1:]), strict=True)) == result.cuts
    planned = plan(find(spec), oracle.N, budget, c.num_hidden_layers)
    assert result.cuts == counts(spec, oracle.N, planned)
    depths = [stop - start for start, stop in pairwise([0, *at, c.num_hidden_layers])]
    visual, rows = (sum(depth * len(tokens) for depth, tokens in zip(depths, stages, strict=True))
                    for stages in (oracle.visual, oracle.ids))
    assert result.visual_tokens == visual / c.num_hidden_layers
    rows += c.num_hidden_layers * (len(oracle.said) - 1)
    assert result.kv_bytes == rows * 2 * c.num_key_value_heads * c.head_dim * 4
    return oracle


@pytest.mark.parametrize("mode", ["gap", "shifted", "ranked, original", "original, text collides"])
@pytest.mark.parametrize("spec, budget", [
    ("fastv", 8), ("fastv(layer=2)", 10), ("pyramiddrop", None), ("pyramiddrop", 9),
    ("sparsevlm", 9), ("sparsevlm_plus", 9)])
def test_a_method_does_what_it_does_by_hand(deep: VLM, spec: str, budget: int | None, mode: str):
    """Of 16 patches in 5 layers, whole passes in which all is written out."""
    oracle = same_as_by_hand(deep, spec, budget, mode, 4)
    assert len(oracle.visual) == (2 if "fastv" in spec else 4)


@pytest.mark.parametrize("budget, mode, added", [
    (60, "gap", [4, 4 + 1, 4 + 1]), (60, "shifted", [4, 2 + 1, 2 + 1]),
    (41, "gap", [5, 3 + 1, 2 + 1]), (41, "shifted", [5, 2 + 1, 1 + 1])])
def test_tokens_that_sparsevlm_added_stay_or_go_at_the_next_cut(mini: VLM, budget: int,
                                                                mode: str, added: list[int]):
    """In the mini model: those that stay, and what the cut adds itself.  They stay in the end.

    With 41 of 144 only such tokens stay at last, and no patch.
    """
    oracle = same_as_by_hand(mini, "sparsevlm", budget, mode, 2)
    assert [visual.count(None) for visual in oracle.visual] == [0, *added]
    for visual in oracle.visual[1:]:
        patches = [patch for patch in visual if patch is not None]
        assert visual == sorted(patches) + [None] * (len(visual) - len(patches))


@pytest.mark.parametrize("mode", [mode for mode in MODES if MODES[mode][0] == "raster"])
def test_cutting_nothing_is_no_pruning(model: VLM, mode: str):
    image = model.encode_image(PICTURE)
    full = model.ground(image, WORDS, mode="full", max_new_tokens=6)
    for name in METHODS:
        cut = model.ground(image, WORDS, name, 16, mode, max_new_tokens=6)
        assert cut.tokens == full.tokens and cut.position_ids.tolist() == full.position_ids.tolist()
        assert cut.visual_tokens == 16 and cut.kv_bytes == full.kv_bytes


@pytest.mark.parametrize("mode", ["gap", "permuted"])
def test_what_was_made_of_kept_tokens_goes_where_they_go(model: VLM, mode: str, monkeypatch):
    """Features are given in the order of rank, and raster modes sort them with the tokens."""
    def mine(seen: VisualTokens, *rest: object) -> Kept:
        ranked = STRATEGIES["fastv"](seen, *rest).ranked
        return Kept(ranked, seen.features[ranked])

    vars(mine)["needs"] = frozenset({"attention"})
    monkeypatch.setitem(STRATEGIES, "mine", mine)
    ours, fastv = (model.ground(PICTURE, WORDS, name, 10, mode, max_new_tokens=6)
                   for name in ("mine", "fastv"))
    assert ours.tokens == fastv.tokens and ours.cuts == fastv.cuts
