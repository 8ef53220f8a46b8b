"""Pruning inside the decoder: who looks at what, what is cut where, and whose IDs are left.

The oracles here keep no cache: they feed everything again for each token, cut by cut, with
attention written out and IDs counted in plain Python.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nanogap
from nanogap import NanogapError
from nanogap.gap import MODES, lay_out
from nanogap.llama import rope_angles, rotate
from nanogap.methods import find
from nanogap.methods.cuts import LABELS, mean_tokens, where
from nanogap.methods.in_decoder import counts, cuts_in_words, plan, raters_of
from nanogap.methods.inside import clusters
from nanogap.models import VLM
from nanogap.prune import STRATEGIES, Kept, VisualTokens
from tests.tiny import tiny_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the man"
PRUNED = [mode for mode in MODES if mode != "full"]
RASTER = [mode for mode in PRUNED if MODES[mode][0] == "raster"]
METHODS = ["fastv", "pyramiddrop", "sparsevlm", "sparsevlm_plus"]
SPARSE = ["sparsevlm", "sparsevlm_plus"]
LOTS = torch.Generator()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """Five layers, in which two heads each share keys and values."""
    config = tiny_config(num_hidden_layers=5, num_key_value_heads=2)
    return nanogap.load(write_checkpoint(tmp_path_factory.mktemp("deep"), config), device="cpu")


@pytest.fixture(scope="module")
def mini() -> VLM:
    return nanogap.load(ROOT / "weights/mini", device="cpu", dtype="float32")


def whole(model: VLM, mode: str = "full") -> tuple[Tensor, Tensor, int, int, int]:
    """The prompt with all patches: embeddings (1, T, C), position IDs (T,), P, N and A."""
    image = model.encode_image(ROOT / "image.jpg")
    input_ids, N = model.prompt(WORDS), image.n_visual
    P, A = model.around_image(input_ids)
    layout = lay_out(torch.arange(N), P, N, A, mode)
    x = model.embed(input_ids, image, Kept(torch.arange(N)), layout.order)
    return x, layout.position_ids, P, N, A


# ----- by hand ------------------------------------------------------------------------------------


def layers_by_hand(model: VLM, x: Tensor, ids: Tensor, start: int,
                   stop: int) -> tuple[Tensor, Tensor | None]:
    """Layers from `start` up to `stop`, attention written out: hidden states, the last (H,T,T)."""
    c, weights = model.config.text, None
    cos, sin = rope_angles(ids, c.head_dim, c.rope_theta)
    for layer in model.language_model.model.layers[start:stop]:
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (project(h).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
                   for project in (a.q_proj, a.k_proj, a.v_proj))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(2, 3) / c.head_dim ** 0.5
        later = torch.ones_like(scores[0, 0]).triu(1).bool()
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        x = x + a.o_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x, None if weights is None else weights[0]


def ids_by_hand(visual: Sequence[int | None], P: int, N: int, A: int, mode: str) -> list[int]:
    """Position IDs in plain Python; a visual token is a patch, or None where it was added."""
    _, visual_ids, text_ids = MODES[mode]
    ids = list(range(P))
    for place, patch in enumerate(visual):
        original = N - 1 if patch is None else patch
        ids.append(P + (original if visual_ids == "original" else place))
    length = N if text_ids == "original" else len(visual)
    return [*ids, *range(P + length, P + length + A)]


# which visual tokens stay, given their hidden states (n, C), the weights (H, T, T) of the layer
# before the cut and of the layer behind it, and the IDs: their places, and (M, C) to be added
Pick = Callable[[Tensor, Tensor, Tensor, list[int]], tuple[list[int], Tensor]]


class Whole:
    """A prompt that is fed as a whole, again and again, and cut by cut."""

    def __init__(self, model: VLM, mode: str, cuts: Sequence[tuple[int, Pick]]) -> None:
        self.model, self.mode, self.cuts = model, mode, cuts
        self.x, _, self.P, self.N, self.A = whole(model, mode)
        self.visual: list[list[int | None]] = []     # in each stage
        self.ids: list[list[int]] = []               # of the prompt, in each stage

    def logits(self, said: Sequence[int]) -> Tensor:
        """Behind the prompt and so many tokens of the answer: (V,)."""
        decoder = self.model.language_model.model
        x = torch.cat([self.x, decoder.embed_tokens(torch.tensor([said]).long())], 1)
        visual: list[int | None] = list(range(self.N))
        self.visual, self.ids, start = [visual], [], 0
        for layer, pick in self.cuts:
            n, T = len(visual), x.shape[1] - len(said)
            ids = ids_by_hand(visual, self.P, self.N, self.A + len(said), self.mode)
            self.ids.append(ids[:T])
            x, before = layers_by_hand(self.model, x, torch.tensor(ids), start, layer)
            _, behind = layers_by_hand(self.model, x, torch.tensor(ids), layer, layer + 1)
            own = x[0, self.P:self.P + n]
            chosen, added = pick(own, before[:, :T, :T], behind[:, :T, :T], ids[:T])
            patches = [i for i in chosen if visual[i] is not None]
            others = [i for i in chosen if visual[i] is None]
            if MODES[self.mode][0] == "raster":
                patches.sort(key=lambda i: visual[i])
            places = [*patches, *others]
            parts = [x[0, :self.P], own[places], added, x[0, self.P + n:]]
            x, start = torch.cat(parts)[None], layer
            visual = [*(visual[i] for i in places), *[None] * len(added)]
            self.visual.append(visual)
        ids = ids_by_hand(visual, self.P, self.N, self.A + len(said), self.mode)
        self.ids.append(ids[:len(ids) - len(said)])
        x, _ = layers_by_hand(self.model, x, torch.tensor(ids), start, len(decoder.layers))
        return self.model.language_model.lm_head(decoder.norm(x))[0, -1]

    def say(self, most: int) -> list[int]:
        said: list[int] = []
        while len(said) < most and not set(self.model.end_tokens) & set(said):
            said.append(int(self.logits(said).argmax()))
        return said

    def patches(self) -> list[int]:
        """Those that the last layers see."""
        return [patch for patch in self.visual[-1] if patch is not None]


def best(scores: Tensor, count: int) -> list[int]:
    """Places of the highest scores, highest first; of equal ones the first."""
    known = scores.tolist()
    return sorted(range(len(known)), key=lambda i: (-known[i], i))[:count]


def means_of_clusters(x: Tensor, count: int) -> Tensor:
    """SparseVLM's clustering as its published code does it, in loops.

    Without its noise: of equally dense tokens the first is denser.
    """
    points = x.tolist()
    m, C = len(points), len(points[0])
    apart = [[math.dist(a, b) / C ** 0.5 for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in apart]
    farthest = max(map(max, apart))
    scores = []
    for i in range(m):
        to_denser = [apart[i][j] for j in range(m)
                     if density[j] > density[i] or density[j] == density[i] and j < i]
        scores.append(min(to_denser, default=farthest) * density[i])
    centres = sorted(range(m), key=lambda i: (-scores[i], i))[:count]
    members: list[list[int]] = [[] for _ in centres]
    for i in range(m):
        if i in centres:
            members[centres.index(i)].append(i)
        else:
            to = [apart[centre][i] for centre in centres]
            members[to.index(min(to))].append(i)
    return torch.tensor([[sum(points[i][c] for i in own) / len(own) for c in range(C)]
                         for own in members])


def turned_ones(distance: int, head_dim: int, theta: float) -> float:
    """Product of two vectors of ones, so far apart, turned by RoPE and divided as scores are."""
    angles = (distance * theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2))
    return sum(2 * math.cos(angle) for angle in angles) / head_dim ** 0.5


def raters_by_hand(x: Tensor, P: int, n: int) -> list[int]:
    """Places in the sequence of the text tokens that look at the image, in loops over tokens."""
    sequence = x[0].tolist()
    visual, text = sequence[P:P + n], sequence[P + n:]
    share = [0.0] * len(text)
    for patch in visual:
        products = [sum(map(float.__mul__, patch, token)) for token in text]
        powers = [math.exp(product - max(products)) for product in products]
        for i, power in enumerate(powers):
            share[i] += power / sum(powers) / n
    return [P + n + i for i, own in enumerate(share) if own > sum(share) / len(text)]


# ----- one cut ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, keep, layer", [
    ("fastv(layer=2)", 12, 2), ("fastv(layer=1)", 8, 1), ("fastv", 8, 1)])
def test_before_the_layer_of_the_cut_what_the_last_token_looks_at_most_stays(
        model: VLM, spec: str, keep: int, layer: int):
    """Papers call the layer K.  Of 16 patches 4 stay: before layer 2 of 3 the mean is 12.

    Where no layer is given it is the paper's 2 of 32, which is none of 3, but one must see all.
    """
    x, ids, P, _, A = whole(model)
    _, weights = layers_by_hand(model, x, ids, 0, layer)
    result = model.ground(ROOT / "image.jpg", WORDS, spec, keep, "permuted", max_new_tokens=1)
    assert result.keep.tolist() == best(weights[:, -1, P:P + 16].mean(0), 4)
    assert result.cuts == [(layer, 4)] and result.visual_tokens == keep
    rows = layer * (P + 16 + A) + (3 - layer) * (P + 4 + A)
    assert result.kv_bytes == rows * 2 * 64 * 4


@pytest.mark.parametrize("mode", [*RASTER, "full"])
def test_cutting_nothing_is_no_pruning(model: VLM, mode: str):
    image = model.encode_image(ROOT / "image.jpg")
    full = model.ground(image, WORDS, mode="full", max_new_tokens=6)
    for name in METHODS:
        cut = model.ground(image, WORDS, name, 16, mode, max_new_tokens=6)
        assert cut.tokens == full.tokens and cut.position_ids.tolist() == full.position_ids.tolist()
        assert cut.visual_tokens == 16 and cut.kv_bytes == full.kv_bytes


def test_the_ids_after_the_cut_are_those_of_the_mode(model: VLM):
    P, A = model.around_image(model.prompt(WORDS))
    image = model.encode_image(ROOT / "image.jpg")
    gap = model.ground(image, WORDS, "fastv(layer=2)", 12, "gap", max_new_tokens=1)
    text = range(P + 16, P + 16 + A)
    assert gap.position_ids.tolist() == [*range(P), *(P + gap.keep).tolist(), *text]
    assert gap.next_position == P + 16 + A
    shifted = model.ground(image, WORDS, "fastv(layer=2)", 12, "shifted", max_new_tokens=1)
    assert shifted.position_ids.tolist() == list(range(P + 4 + A))
    assert shifted.next_position == P + 4 + A


@pytest.mark.parametrize("layer", [-1, 0, 3])
def test_a_cut_needs_a_layer_before_it_and_one_behind(model: VLM, layer: int):
    with pytest.raises(NanogapError, match=f"cannot cut before layer {layer} of 3: "
                                           "choose one from 1 to 2"):
        model.ground(ROOT / "image.jpg", WORDS, f"fastv(layer={layer})", 12)


@pytest.mark.parametrize("name", METHODS)
def test_a_decoder_of_one_layer_has_no_place_for_a_cut(name: str):
    with pytest.raises(NanogapError, match=f"{name} prunes between two layers of the decoder, and "
                                           "this one has 1: choose a strategy that prunes before"):
        plan(name, 16, 8, 1)


# ----- who looks at what --------------------------------------------------------------------------


def test_raters_are_text_tokens_that_have_more_than_their_share_of_the_products():
    """Two patches and four words in the plane; the words before the image do not count."""
    before, patches = [[9.0, 9.0]], [[2.0, 0.0], [0.0, 1.0]]
    words = [[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]
    # products 2 0 0 -6 and 0 0 2 0: shares .786 .106 .106 .000 and .096 .096 .711 .096
    x = torch.tensor([before + patches + words])
    assert raters_of(x, 1, 2).tolist() == [-4, -2]
    assert raters_by_hand(x, 1, 2) == [3, 5]


def test_raters_of_a_real_prompt(deep: VLM, mini: VLM):
    for model in (deep, mini):
        x, _, P, N, A = whole(model)
        raters = x.shape[1] + raters_of(x, P, N)
        assert 1 < len(raters) < A
        assert raters.tolist() == raters_by_hand(x, P, N)


def test_where_all_text_tokens_are_the_same_the_last_one_rates():
    x = torch.ones(1, 9, 4)
    assert raters_of(x, 1, 4).tolist() == [-1]


# ----- clusters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("m, count", [(1, 1), (7, 1), (7, 7), (11, 2), (25, 3), (40, 5), (83, 9)])
def test_clusters_are_those_of_the_published_code(m: int, count: int):
    x = torch.randn(m, 6, generator=torch.Generator().manual_seed(m))
    assert torch.allclose(clusters(x, count), means_of_clusters(x, count), atol=1e-5)


CORNERS = torch.tensor([[0.0, 0, 0, 0], [4, 0, 0, 0], [0, 4, 0, 0], [4, 4, 0, 0]])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_equal_densities_and_equal_points_go_to_the_lower_index(count: int):
    """Corners of a square and the same corners again: each ties with each."""
    for x in (CORNERS, CORNERS.repeat(2, 1), torch.ones(5, 4)):
        made = clusters(x, count)
        assert made.isfinite().all()
        assert torch.allclose(made, means_of_clusters(x, count))


def test_of_two_clusters_the_densest_token_and_its_neighbour_are_not_both_centres():
    """Nearest neighbours of each other are equally dense where two tokens count: 0 and 1."""
    x = torch.tensor([[0.0], [1.0], [10.0], [11.5]])
    assert clusters(x, 2).tolist() == [[0.5], [10.75]]


def test_clusters_lie_where_the_tokens_do():
    """Two heaps, far from the origin, where rounding would hide small distances from a product."""
    generator = torch.Generator().manual_seed(1)
    heaps = 1000 + torch.randn(40, 8, generator=generator) / 10
    heaps[20:] += 10
    x = heaps[torch.randperm(40, generator=generator)]
    low, high = sorted(clusters(x, 2).tolist())
    assert torch.allclose(torch.tensor(low), heaps[:20].mean(0))
    assert torch.allclose(torch.tensor(high), heaps[20:].mean(0))
    near = 1000 + torch.randn(60, 8, generator=generator)
    assert torch.allclose(clusters(near, 7), means_of_clusters(near, 7))
    assert clusters(x.bfloat16(), 2).dtype == torch.bfloat16


# ----- the methods --------------------------------------------------------------------------------


def seen(attention: Tensor, C: int = 6) -> VisualTokens:
    n = attention.shape[-1]
    features = torch.randn(n, C, generator=torch.Generator().manual_seed(n))
    return VisualTokens(features, 1, n, {"attention": attention})


@pytest.mark.parametrize("n, budget, recycled, made", [
    (40, 4, 11, 2),           # int(0.3 * 36) + 1, int(11 / 10) + 1
    (34, 4, 10, 2), (33, 4, 9, 1), (10, 9, 1, 1), (10, 7, 1, 1), (11, 7, 2, 1),
    (576, 300, 83, 9)])
def test_sparsevlm_recycles_the_best_of_the_dropped(n: int, budget: int, recycled: int, made: int):
    given = seen(torch.rand(3, n, generator=torch.Generator().manual_seed(0)))
    kept = STRATEGIES["sparsevlm"](given, budget, LOTS)
    order = best(given.attention.mean(0), n)
    assert kept.ranked.tolist() == sorted(order[:budget])
    again = given.features[order[budget:budget + recycled]]
    assert len(kept.added) == made and kept.features is None
    assert torch.allclose(kept.added, means_of_clusters(again, made), atol=1e-5)


@pytest.mark.parametrize("heads, chosen", [(32, 14), (40, 18), (28, 12), (16, 7), (8, 4), (4, 2),
                                           (2, 1), (1, 1)])
def test_sparsevlm_plus_asks_the_heads_that_look_at_the_image_most(heads: int, chosen: int):
    """14 of 32, and the same share of others.  The less a head looks, the lower its one token.

    So one head more would keep another token in the place of the first, to which a tie goes.
    """
    attention = torch.zeros(heads, heads + 1)
    for head in range(heads):
        attention[head, heads - head] = heads - head
    attention = attention[torch.randperm(heads, generator=torch.Generator().manual_seed(5))]
    kept = STRATEGIES["sparsevlm_plus"](seen(attention), chosen + 1, LOTS)
    assert kept.ranked.tolist() == [0, *range(heads - chosen + 1, heads + 1)]
    assert kept.added is None and kept.features is None


def picks(name: str, model: VLM, budget: int | None) -> list[tuple[int, Pick]]:
    """What a method does at its cuts, by hand; how many it keeps at each is tested below."""
    x, _, P, N, _ = whole(model)
    c = model.config.text
    looking = [-1]                # counted from the end, since what stands before gets shorter
    if name in SPARSE:
        looking = [place - x.shape[1] for place in raters_by_hand(x, P, N)]

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
            for layer, count in plan(name, N, budget, c.num_hidden_layers)]


def same_as_by_hand(model: VLM, name: str, budget: int | None, mode: str, most: int) -> Whole:
    """Words, tokens, counts and IDs of a method, against whole passes."""
    result = model.ground(ROOT / "image.jpg", WORDS, name, budget, mode, max_new_tokens=most)
    oracle = Whole(model, mode, picks(name, model, budget))
    assert oracle.say(most) == result.tokens
    assert oracle.patches() == result.keep.tolist()
    assert [len(visual) for visual in oracle.visual[1:]] == [left for _, left in result.cuts]
    assert oracle.ids[-1] == result.position_ids.tolist()
    return oracle


@pytest.mark.parametrize("mode", ["gap", "shifted", "ranked, original", "original, text collides"])
@pytest.mark.parametrize("name, budget", [
    ("fastv", 8), ("pyramiddrop", None), ("pyramiddrop", 9), ("sparsevlm", 9),
    ("sparsevlm_plus", 9)])
def test_a_method_does_what_it_does_by_hand(deep: VLM, name: str, budget: int | None, mode: str):
    """Of 16 patches in 5 layers, whole passes in which all is written out."""
    oracle = same_as_by_hand(deep, name, budget, mode, 4)
    assert len(oracle.visual) == (2 if name == "fastv" else 4)


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


# ----- where, and how many ------------------------------------------------------------------------


@pytest.mark.parametrize("name, label, mean, of_40", [
    ("sparsevlm", 192, 206.5, 187.8), ("sparsevlm", 128, 145.4, 124.1),
    ("sparsevlm", 96, 114.1, 96.7), ("sparsevlm", 64, 82.2, 69.4),
    ("sparsevlm_plus", 192, 206.75, 189.0), ("sparsevlm_plus", 128, 144.125, 127.3),
    ("sparsevlm_plus", 96, 113.9375, 96.75), ("sparsevlm_plus", 64, 81.8125, 69.45)])
def test_a_label_is_the_published_list_at_its_own_layers_whatever_the_depth(
        name: str, label: int, mean: float, of_40: float):
    """SparseVLM counts what layers give out: 192.0, 128.6, 96.9, 64.8.  What they are fed is more.
    """
    key = find(f"{name}(label={label})")
    for layers, expected in ((32, mean), (40, of_40)):
        cuts = plan(key, 576, None, layers)
        assert cuts == list(zip((3, 7, 16), LABELS[name][label], strict=True))
        assert mean_tokens(key, 576, cuts, layers) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("spec, N, layers, cuts", [
    ("fastv(layer=2,drop=0.5)", 576, 32, [(2, 288)]),
    ("fastv(layer=3,drop=0.75)", 576, 32, [(3, 144)]),
    ("fastv(drop=0.5)", 144, 4, [(1, 72)]),
    ("pyramiddrop(layers=[8,16,24],ratios=[0.5,0.25,0.125])", 576, 32,
     [(8, 288), (16, 144), (24, 72)]),
    ("pyramiddrop(ratios=[0.5,0.25,0.1])", 100, 40, [(10, 50), (20, 25), (30, 10)]),
    ("sparsevlm_plus(layers=[4,8],ratios=[0.29,0.1])", 100, 32, [(4, 29), (8, 10)]),
    # without settings it halves at a quarter, a half and three quarters, and leaves one at least
    ("pyramiddrop", 576, 32, [(8, 288), (16, 144), (24, 72)]),
    ("pyramiddrop", 31, 4, [(1, 15), (2, 7), (3, 3)]),                        # int(31 / 8)
    ("pyramiddrop", 577, 40, [(10, 288), (20, 144), (30, 72)]),
    ("pyramiddrop", 5, 4, [(1, 2), (2, 1), (3, 1)])])
def test_settings_say_where_and_how_many(spec: str, N: int, layers: int, cuts: list):
    key = find(spec)
    assert plan(key, N, None, layers) == cuts
    if "(" in spec:
        with pytest.raises(NanogapError, match="says itself how many tokens stay: keep is auto "):
            plan(key, N, 50, layers)


def test_published_fastv_costs_as_much_as_papers_say():
    """K = 2, R = 50 % is 306 tokens in the mean over 32 layers, K = 2, R = 75 % 171."""
    for spec, mean in (("2,drop=0.5", 306), ("2,drop=0.75", 171), ("3,drop=0.5", 315)):
        key = find(f"fastv(layer={spec})")
        assert mean_tokens(key, 576, plan(key, 576, None, 32), 32) == mean
    assert plan("fastv", 576, 306, 32) == [(2, 288)]


def test_with_what_it_adds_sparsevlm_feeds_so_many():
    """The 192 of its paper: 300 and 9 clusters, then 200 and 4, then 110 and 4."""
    cuts = [(3, 300), (7, 200), (16, 110)]
    assert counts("sparsevlm", 576, cuts) == [(3, 309), (7, 204), (16, 113)]
    assert counts("sparsevlm_plus", 576, cuts) == cuts
    assert counts("fastv", 576, [(2, None)]) == [(2, None)]

@pytest.mark.parametrize("layers, fastv, pyramiddrop, sparsevlm", [
    (32, [2], [8, 16, 24], [3, 7, 16]),
    (40, [2], [10, 20, 30], [4, 9, 20]),
    (28, [2], [7, 14, 21], [3, 6, 14]),
    (5, [1], [1, 2, 4], [1, 2, 3]),
    (4, [1], [1, 2, 3], [1, 2, 3]),
    (3, [1], [1, 2], [1, 2]),
    (2, [1], [1], [1])])
def test_layers_scale_with_the_depth_of_the_decoder(layers, fastv, pyramiddrop, sparsevlm):
    assert where("fastv", layers) == fastv
    assert where("pyramiddrop", layers) == pyramiddrop
    for name in SPARSE:
        assert where(name, layers) == sparsevlm


def simulated_mean(N: int, cuts: Sequence[tuple[int, int]], layers: int, recycles: bool) -> float:
    """Layer by layer."""
    kept, n, total = dict(cuts), N, 0
    for layer in range(layers):
        if layer in kept:
            left = min(kept[layer], n)
            dropped = n - left
            n = left
            if recycles and dropped > 0:
                n += (int(0.3 * dropped) + 1) // 10 + 1
        total += n
    return total / layers


def every_plan(name: str, N: int, layers: int, budget: int) -> list[list[tuple[int, int]]]:
    """All lists of a method's own proportions: between any two sizes at which a number changes."""
    at = where(name, layers)
    powers = [1, 2, 3] if name == "pyramiddrop" else [1, 1, 1]
    factors = [1.0, 1.0, 1.0]
    if name in SPARSE:
        nearest = min(LABELS[name], key=lambda own: abs(own / 576 - budget / N))
        factors = [kept / 576 for kept in LABELS[name][nearest]]
    sizes = sorted({((k + 0.5) / N / factor) ** (1 / power) for k in range(N)
                    for _, factor, power in zip(at, factors, powers, strict=False)})
    sizes = [0.0, *((a + b) / 2 for a, b in zip(sizes, sizes[1:], strict=False)), 2 * sizes[-1]]
    return [[(layer, max(1, min(N, round(N * factor * size ** power))))
             for layer, factor, power in zip(at, factors, powers, strict=False)] for size in sizes]


@pytest.mark.parametrize("N, layers", [(16, 3), (144, 4), (30, 32)])
@pytest.mark.parametrize("name", METHODS)
def test_a_plan_is_the_best_that_rounding_allows_and_no_more(name: str, N: int, layers: int):
    recycles = name == "sparsevlm"
    lowest = math.ceil(simulated_mean(N, every_plan(name, N, layers, 1)[0], layers, recycles))
    for budget in range(1, N + 1, 1 if N < 100 else 7):
        if budget < lowest:
            with pytest.raises(NanogapError, match=f"{name} cannot keep {budget} of {N} visual "
                                                   f"tokens in the mean over {layers} layers, of "
                                                   f"which {where(name, layers)[0]} see "
                                                   f"all: keep from {lowest} to {N}"):
                plan(name, N, budget, layers)
            continue
        cuts = plan(name, N, budget, layers)
        plans = every_plan(name, N, layers, budget)
        means = [simulated_mean(N, other, layers, recycles) for other in plans]
        mean = mean_tokens(name, N, cuts, layers)
        assert mean == simulated_mean(N, cuts, layers, recycles)
        assert mean == max(own for own in means if own <= budget)
        assert cuts in plans
    assert plan(name, N, lowest, layers) and plan(name, N, N, layers)[0][1] == N


@pytest.mark.parametrize("name", METHODS)
def test_what_was_fed_is_what_was_planned(deep: VLM, mini: VLM, name: str):
    """A real run reports the mean over the inputs of all layers: at most what was asked for."""
    lowest = {"fastv": 37, "pyramiddrop": 37, "sparsevlm": 39, "sparsevlm_plus": 37}[name]
    for model, budgets in ((deep, (7, 9, 11, 16)), (mini, (lowest, 72, 108))):
        image = model.encode_image(ROOT / "image.jpg")
        N, layers = image.n_visual, model.config.text.num_hidden_layers
        for budget in budgets:
            result = model.ground(image, WORDS, name, budget, "gap", max_new_tokens=1)
            cuts = plan(name, N, budget, layers)
            assert result.visual_tokens == mean_tokens(name, N, cuts, layers)
            assert result.cuts == counts(name, N, cuts)
            assert budget - 1 < result.visual_tokens <= budget
    with pytest.raises(NanogapError, match=f"keep from {lowest} to 144"):
        mini.ground(ROOT / "image.jpg", WORDS, name, lowest - 1)


def test_cuts_in_words_name_layers_and_numbers():
    assert cuts_in_words("sparsevlm", [(1, 71), (2, 47)], 4) == (
        "sparsevlm in 4 layers, counted from 0: visual tokens cut to 71 from layer 1 on, "
        "47 from layer 2 on")
    assert cuts_in_words("fastv", [(1, None)], 2).endswith("cut to what it finds from layer 1 on")
