"""Pruning inside the decoder: who looks at what, what is cut where, and whose IDs are left.

The oracles here keep no cache: they feed everything again for each token, cut by cut, with
attention written out and IDs counted in plain Python.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nanogap
from nanogap import NanogapError
from nanogap.fast.decode import decode
from nanogap.gap import MODES, Layout, lay_out
from nanogap.ground import EncodedImage
from nanogap.llama import KVCache, rope_angles, rotate
from nanogap.methods.in_decoder import (
    Cut,
    Prefilled,
    Stage,
    attention_to_image,
    clusters,
    counts,
    cuts_in_words,
    cuts_of,
    mean_tokens,
    plan,
    prefill,
    raters_of,
    where,
)
from nanogap.models.llava import Llava
from nanogap.prompt import Draft
from nanogap.prune import STRATEGIES, Kept, View, VisualTokens, in_decoder, select, strategy
from tests.tiny import tiny_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the man"
PRUNED = [mode for mode in MODES if mode != "full"]
RASTER = [mode for mode in PRUNED if MODES[mode][0] == "raster"]
METHODS = [name for name in STRATEGIES if in_decoder(name)]
SPARSE = ["sparsevlm", "sparsevlm_plus"]


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, in which two heads each share keys and values."""
    config = tiny_config(num_hidden_layers=5, num_key_value_heads=2)
    return write_checkpoint(tmp_path_factory.mktemp("deep"), config)


@pytest.fixture(scope="module")
def deep(deep_folder: Path) -> Llava:
    return nanogap.load(deep_folder, device="cpu")


@pytest.fixture(scope="module")
def mini() -> Llava:
    return nanogap.load(ROOT / "weights/mini", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def shown(mini: Llava) -> EncodedImage:
    return mini.encode_image(ROOT / "image.jpg")


def whole(model: Llava, mode: str = "full") -> tuple[Tensor, Layout]:
    """The prompt with all patches: embeddings, and where they stand."""
    image = model.encode_image(ROOT / "image.jpg")
    input_ids, everything = model.prompt(WORDS), Kept(torch.arange(image.n_visual))
    P, A = model.around_image(input_ids)
    layout = lay_out(everything.keep, P, image.n_visual, A, mode)
    return model.embed(input_ids, image, everything, layout.order), layout


# ----- by hand ------------------------------------------------------------------------------------


def layers_by_hand(model: Llava, x: Tensor, ids: Tensor, start: int,
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

    def __init__(self, model: Llava, mode: str, cuts: Sequence[tuple[int, Pick]]) -> None:
        self.model, self.mode, self.cuts = model, mode, cuts
        self.x, layout = whole(model, mode)
        self.P, self.N, self.A = layout.P, layout.N, layout.A
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


def nothing(like: Tensor) -> Tensor:
    return like[:0]


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


# ----- FastV: one cut -----------------------------------------------------------------------------

# three layers cut before the third: 12 of 16 in the mean are (16 + 16 + 4) / 3, so 4 stay
FOUR = {"keep": 12, "layer": 2}


def test_what_stays_is_what_the_last_token_looks_at_most(model: Llava):
    x, layout = whole(model)
    _, weights = layers_by_hand(model, x, layout.position_ids, 0, 2)
    looked_at = weights[:, -1, layout.P:layout.P + 16].mean(0)
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", mode="permuted", max_new_tokens=1,
                          **FOUR)
    assert result.keep.tolist() == looked_at.argsort(descending=True)[:4].tolist()


def test_of_three_layers_the_first_alone_sees_all_where_no_layer_is_given(model: Llava):
    """It is before layer 2 of 32 in the paper, which is none of 3, but one must see the patches."""
    x, layout = whole(model)
    _, weights = layers_by_hand(model, x, layout.position_ids, 0, 1)
    looked_at = weights[:, -1, layout.P:layout.P + 16].mean(0)
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", 8, "permuted", max_new_tokens=1)
    assert result.keep.tolist() == looked_at.argsort(descending=True)[:4].tolist()
    assert result.cuts == [(1, 4)] and result.visual_tokens == 8


@pytest.mark.parametrize("mode", [*RASTER, "full"])
def test_cutting_nothing_is_no_pruning(model: Llava, mode: str):
    image = model.encode_image(ROOT / "image.jpg")
    full = model.ground(image, WORDS, mode="full", max_new_tokens=6)
    for name in METHODS:
        cut = model.ground(image, WORDS, name, 16, mode, max_new_tokens=6)
        assert cut.tokens == full.tokens and cut.position_ids.tolist() == full.position_ids.tolist()
        assert cut.visual_tokens == 16 and cut.kv_bytes == full.kv_bytes


@pytest.mark.parametrize("mode", PRUNED)
def test_generation_with_a_cache_says_what_whole_passes_say(model: Llava, mode: str):
    """Everything fed again for each token: all rows below the cut, and from there the kept ones."""
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", mode=mode, max_new_tokens=6, **FOUR)
    x, layout = whole(model)
    P, ids = layout.P, layout.position_ids
    decoder, said = model.language_model.model, []
    for i in range(len(result.tokens)):
        early = decoder.run(x, ids, None, 0, 2)
        stays = torch.cat([torch.arange(P), P + result.keep, torch.arange(P + 16, x.shape[1])])
        late_ids = torch.cat([result.position_ids, result.next_position + torch.arange(i)])
        late = decoder.run(early[:, stays], late_ids, None, 2)
        said.append(int(model.language_model.lm_head(decoder.norm(late))[0, -1].argmax()))
        x = torch.cat([x, decoder.embed_tokens(torch.tensor([[said[-1]]]))], 1)
        ids = torch.arange(x.shape[1])
    assert said == result.tokens


def test_the_ids_after_the_cut_are_those_of_the_mode(model: Llava):
    P, A = model.around_image(model.prompt(WORDS))
    image = model.encode_image(ROOT / "image.jpg")
    gap = model.ground(image, WORDS, "fastv", 12, "gap", layer=2, max_new_tokens=1)
    text = range(P + 16, P + 16 + A)
    assert gap.position_ids.tolist() == [*range(P), *(P + gap.keep).tolist(), *text]
    assert gap.next_position == P + 16 + A
    shifted = model.ground(image, WORDS, "fastv", 12, "shifted", layer=2, max_new_tokens=1)
    assert shifted.position_ids.tolist() == list(range(P + 4 + A))
    assert shifted.next_position == P + 4 + A


def test_later_layers_hold_fewer_rows(model: Llava):
    """Three layers, cut before the third: 2 x (P + 16 + A) rows and 1 x (P + 4 + A)."""
    P, A = model.around_image(model.prompt(WORDS))
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", 12, "gap", layer=2, max_new_tokens=1)
    assert result.kv_bytes == (2 * (P + 16 + A) + P + 4 + A) * 2 * 64 * 4     # k and v, C, bytes
    assert result.visual_tokens == (16 + 16 + 4) / 3 and result.cuts == [(2, 4)]


@pytest.mark.parametrize("layer, keep", [(1, 8), (2, 12)])
def test_the_layer_of_the_cut_can_be_chosen(model: Llava, layer: int, keep: int):
    """Papers call it K.  Cut before layer 1 of three, two layers hold the few rows."""
    P, A = model.around_image(model.prompt(WORDS))
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", keep, "shifted", layer=layer,
                          max_new_tokens=1)
    rows = layer * (P + 16 + A) + (3 - layer) * (P + 4 + A)
    assert result.kv_bytes == rows * 2 * 64 * 4
    assert result.visual_tokens == (16 * layer + 4 * (3 - layer)) / 3 == keep


@pytest.mark.parametrize("layer", [-1, 0, 3])
def test_a_cut_needs_a_layer_before_it_and_one_behind(model: Llava, layer: int):
    with pytest.raises(NanogapError, match=f"fastv cannot cut before layer {layer} of 3: "
                                           "choose one from 1 to 2"):
        model.ground(ROOT / "image.jpg", WORDS, "fastv", 12, layer=layer)


@pytest.mark.parametrize("name", METHODS)
def test_a_decoder_of_one_layer_has_no_place_for_a_cut(name: str):
    with pytest.raises(NanogapError, match=f"{name} prunes between two layers of the decoder, and "
                                           "this one has 1: choose a strategy that prunes before"):
        plan(name, 16, 8, 1)


def prefilled(model: Llava, kept: list[tuple[int, int]], layers: int, N: int) -> Prefilled:
    """A prompt that was read with so many visual tokens (start of a stage, K)."""
    rows = KVCache(model.config.text, 0, torch.zeros(1))
    rows.lengths = [0] * layers
    stages = [Stage(start, lay_out(torch.arange(K), 1, N, 1, "gap")) for start, K in kept]
    return Prefilled(model.language_model, rows, torch.zeros(1, 1), Draft(), stages)


def test_the_mean_number_of_tokens_is_the_one_that_papers_give(model: Llava):
    """FastV on LLaVA-1.5, K = 2: 288 and 144 of 576 tokens kept are 306 and 171 over 32 layers."""
    assert prefilled(model, [(0, 576), (2, 288)], 32, 576).visual_tokens() == 306
    assert prefilled(model, [(0, 576), (2, 144)], 32, 576).visual_tokens() == 171
    assert prefilled(model, [(0, 576), (8, 288), (16, 144)], 32, 576).visual_tokens() == 288
    assert prefilled(model, [(0, 100)], 32, 576).visual_tokens() == 100
    assert plan("fastv", 576, 306, 32) == [(2, 288)] and plan("fastv", 576, 171, 32) == [(2, 144)]


# ----- who looks at what --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "permuted"])
@pytest.mark.parametrize("layer", [0, 2])
def test_attention_is_the_row_of_the_last_token(deep: Llava, layer: int, mode: str):
    """In each of four heads, two of which share keys."""
    x, layout = whole(deep, mode)
    fed, _ = layers_by_hand(deep, x, layout.position_ids, 0, layer)
    _, weights = layers_by_hand(deep, fed, layout.position_ids, layer, layer + 1)
    seen = attention_to_image(deep.language_model, layer, fed, torch.tensor([x.shape[1] - 1]),
                              layout)
    assert seen.shape == (4, 16)
    assert torch.allclose(seen, weights[:, -1, layout.P:layout.P + 16], atol=1e-5)


def test_attention_of_raters_is_the_mean_over_their_rows(deep: Llava):
    x, layout = whole(deep)
    _, weights = layers_by_hand(deep, x, layout.position_ids, 0, 1)
    end = layout.P + 16
    queries = [end, end + 3, end + 4, x.shape[1] - 2]
    seen = attention_to_image(deep.language_model, 0, x, torch.tensor(queries), layout)
    mean = sum(weights[:, query, layout.P:end] for query in queries) / 4
    assert torch.allclose(seen, mean, atol=1e-5)


def test_a_query_in_the_image_does_not_see_the_patches_behind_it(deep: Llava):
    x, layout = whole(deep)
    seen = attention_to_image(deep.language_model, 0, x, torch.tensor([layout.P + 9]), layout)
    assert bool((seen[:, :10] > 0).all()) and bool((seen[:, 10:] == 0).all())


def test_corrected_weights_are_divided_by_what_rope_makes_of_ones(deep: Llava):
    """Their product is a sum of cosines of the distance; it depends on the IDs, not on the rows."""
    x, layout = whole(deep)
    layout = lay_out(layout.keep, layout.P, 16, layout.A, "gap")
    ids = layout.position_ids.clone()
    ids[layout.P + 16:] += 5                                     # the text farther away
    moved = Layout(layout.keep, layout.order, ids, layout.next_position + 5, layout.P, 16,
                   layout.A, "gap")
    _, weights = layers_by_hand(deep, x, ids, 0, 1)
    end, last = layout.P + 16, x.shape[1] - 1
    queries = [end + 2, last]
    seen = attention_to_image(deep.language_model, 0, x, torch.tensor(queries), moved, True)
    for patch in range(16):
        key = layout.P + patch
        rows = []
        for query in queries:
            ones = turned_ones(int(ids[query] - ids[key]), 16, deep.config.text.rope_theta)
            rows.append(weights[:, query, key] / ones)
        assert torch.allclose(seen[:, patch], sum(rows) / 2, rtol=1e-3, atol=1e-5)


def test_raters_are_text_tokens_that_have_more_than_their_share_of_the_products():
    """Two patches and four words in the plane; the words before the image do not count."""
    before, patches = [[9.0, 9.0]], [[2.0, 0.0], [0.0, 1.0]]
    words = [[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]
    # products 2 0 0 -6 and 0 0 2 0: shares .786 .106 .106 .000 and .096 .096 .711 .096
    x = torch.tensor([before + patches + words])
    layout = lay_out(torch.arange(2), 1, 2, 4, "gap")
    assert raters_of(x, layout).tolist() == [-4, -2]
    assert raters_by_hand(x, 1, 2) == [3, 5]


def test_raters_of_a_real_prompt(deep: Llava, mini: Llava):
    for model in (deep, mini):
        x, layout = whole(model)
        raters = x.shape[1] + raters_of(x, layout)
        assert 1 < len(raters) < layout.A
        assert raters.tolist() == raters_by_hand(x, layout.P, layout.N)


def test_where_all_text_tokens_are_the_same_the_last_one_rates():
    x = torch.ones(1, 9, 4)
    assert raters_of(x, lay_out(torch.arange(4), 1, 4, 4, "gap")).tolist() == [-1]


# ----- clusters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("m, count", [(1, 1), (7, 1), (7, 7), (11, 2), (25, 3), (40, 5), (83, 9)])
def test_clusters_are_those_of_the_published_code(m: int, count: int):
    x = torch.randn(m, 6, generator=torch.Generator().manual_seed(m))
    assert torch.allclose(clusters(x, count), means_of_clusters(x, count), atol=1e-5)


def test_one_cluster_is_the_mean_and_as_many_as_tokens_are_the_tokens():
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(clusters(x, 1), x.mean(0, keepdim=True), atol=1e-6)
    order = [int((x - one).abs().sum(1).argmin()) for one in clusters(x, 12)]
    assert sorted(order) == list(range(12))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_equal_densities_and_equal_points_go_to_the_lower_index(count: int):
    """Corners of a square and the same corners again: each ties with each."""
    for x in (CORNERS, CORNERS.repeat(2, 1), torch.ones(5, 4)):
        made = clusters(x, count)
        assert made.isfinite().all()
        assert torch.allclose(made, means_of_clusters(x, count))


CORNERS = torch.tensor([[0.0, 0, 0, 0], [4, 0, 0, 0], [0, 4, 0, 0], [4, 4, 0, 0]])


def test_of_four_corners_the_first_two_are_centres():
    """The third is nearest to the first, and the fourth to the second."""
    assert clusters(CORNERS, 2).tolist() == [[0, 2, 0, 0], [4, 2, 0, 0]]
    assert torch.equal(clusters(CORNERS, 4), CORNERS)


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


def drawn(heads: int, n: int, seed: int = 0) -> Tensor:
    return torch.rand(heads, n, generator=torch.Generator().manual_seed(seed))


LOTS = torch.Generator()


def test_pyramiddrop_keeps_raster_order_and_half_where_no_budget_is_given():
    attention = torch.tensor([[1.0, 5, 2, 9, 4, 3, 0], [1.0, 5, 2, 9, 8, 3, 0]])
    drop = STRATEGIES["pyramiddrop"]
    assert drop(seen(attention), 3, LOTS).keep.tolist() == [1, 3, 4]
    assert drop(seen(attention), None, LOTS).keep.tolist() == [1, 3, 4]       # int(7 / 2)
    assert drop(seen(attention[:, :1]), None, LOTS).keep.tolist() == [0]      # never none


@pytest.mark.parametrize("n, budget, recycled, made", [
    (40, 4, 11, 2),           # int(0.3 * 36) + 1, int(11 / 10) + 1
    (34, 4, 10, 2), (33, 4, 9, 1), (10, 9, 1, 1), (10, 7, 1, 1), (11, 7, 2, 1),
    (576, 300, 83, 9)])
def test_sparsevlm_recycles_the_best_of_the_dropped(n: int, budget: int, recycled: int, made: int):
    given = seen(drawn(3, n))
    kept = STRATEGIES["sparsevlm"](given, budget, LOTS)
    order = best(given.attention.mean(0), n)
    assert kept.keep.tolist() == sorted(order[:budget])
    again = given.features[order[budget:budget + recycled]]
    assert len(kept.added) == made and kept.features is None
    assert torch.allclose(kept.added, means_of_clusters(again, made), atol=1e-5)


def test_sparsevlm_adds_nothing_where_nothing_is_dropped():
    assert STRATEGIES["sparsevlm"](seen(drawn(3, 9)), 9, LOTS).added is None


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
    assert kept.keep.tolist() == [0, *range(heads - chosen + 1, heads + 1)]
    assert kept.added is None and kept.features is None


def fastv_pick(P: int, count: int) -> Pick:
    def pick(own: Tensor, before: Tensor, behind: Tensor, ids: list[int]):
        return best(before[:, -1, P:P + len(own)].mean(0), count), nothing(own)
    return pick


def pyramiddrop_pick(P: int, count: int) -> Pick:
    """By the layer that comes next."""
    def pick(own: Tensor, before: Tensor, behind: Tensor, ids: list[int]):
        return sorted(best(behind[:, -1, P:P + len(own)].mean(0), count)), nothing(own)
    return pick


def sparsevlm_pick(P: int, count: int, raters: list[int]) -> Pick:
    """`raters` counted from the end, since what stands before them gets shorter."""
    def pick(own: Tensor, before: Tensor, behind: Tensor, ids: list[int]):
        scores = before[:, raters, P:P + len(own)].mean((0, 1))
        keep = sorted(best(scores, count))
        dropped = [i for i in range(len(own)) if i not in keep]
        if not dropped:
            return keep, nothing(own)
        again = [dropped[i] for i in best(scores[dropped], int(0.3 * len(dropped)) + 1)]
        return keep, means_of_clusters(own[again], len(again) // 10 + 1)
    return pick


def sparsevlm_plus_pick(P: int, count: int, raters: list[int], theta: float) -> Pick:
    def pick(own: Tensor, before: Tensor, behind: Tensor, ids: list[int]):
        head_dim, heads = 128 // 8, len(before)
        ones = torch.tensor([[turned_ones(ids[query] - ids[P + i], head_dim, theta)
                              for i in range(len(own))] for query in raters])
        weights = before[:, raters, P:P + len(own)] / ones
        chosen = best(weights.sum((1, 2)), max(1, round(heads * 14 / 32)))
        return sorted(best(weights[chosen].mean((0, 1)), count)), nothing(own)
    return pick


def picks(name: str, model: Llava, budget: int | None) -> list[tuple[int, Pick]]:
    """What a method does at its cuts, by hand; how many it keeps at each is tested below."""
    x, layout = whole(model)
    raters = [place - x.shape[1] for place in raters_by_hand(x, layout.P, layout.N)]
    layers, theta = model.config.text.num_hidden_layers, model.config.text.rope_theta
    make = {"fastv": lambda count: fastv_pick(layout.P, count),
            "pyramiddrop": lambda count: pyramiddrop_pick(layout.P, count),
            "sparsevlm": lambda count: sparsevlm_pick(layout.P, count, raters),
            "sparsevlm_plus": lambda count: sparsevlm_plus_pick(layout.P, count, raters, theta)}
    return [(layer, make[name](count))
            for layer, count in plan(name, layout.N, budget, layers)]


def same_as_by_hand(model: Llava, name: str, budget: int | None, mode: str, most: int) -> Whole:
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
def test_a_method_does_what_it_does_by_hand(deep: Llava, name: str, budget: int | None, mode: str):
    """Of 16 patches in 5 layers, whole passes in which all is written out."""
    oracle = same_as_by_hand(deep, name, budget, mode, 4)
    assert len(oracle.visual) == (2 if name == "fastv" else 4)


@pytest.mark.parametrize("budget, mode, added", [
    (60, "gap", [4, 4 + 1, 4 + 1]), (60, "shifted", [4, 2 + 1, 2 + 1]),
    (41, "gap", [5, 3 + 1, 2 + 1]), (41, "shifted", [5, 2 + 1, 1 + 1])])
def test_tokens_that_sparsevlm_added_stay_or_go_at_the_next_cut(mini: Llava, budget: int,
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


PUBLISHED = {                # of 576 tokens: how many its code keeps at each cut, none added
    "sparsevlm": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "sparsevlm_plus": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28),
                       64: (66, 34, 20)},
}
MEANS = {"sparsevlm": {192: 206.5, 128: 145.4, 96: 114.1, 64: 82.2},
         "sparsevlm_plus": {192: 206.75, 128: 144.125, 96: 113.9375, 64: 81.8125}}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("budget", [192, 128, 96, 64])
def test_a_published_budget_is_the_published_list(name: str, budget: int):
    """SparseVLM counts what layers give out: 192.0, 128.6, 96.9, 64.8.  What they are fed is more.
    """
    cuts = plan(name, 576, budget, 32)
    assert cuts == list(zip((3, 7, 16), PUBLISHED[name][budget], strict=True))
    mean = mean_tokens(576, cuts, 32, name == "sparsevlm")
    assert mean == pytest.approx(MEANS[name][budget], abs=0.05)


def test_with_what_it_adds_sparsevlm_feeds_so_many():
    """The 192 of its paper: 300 and 9 clusters, then 200 and 4, then 110 and 4."""
    cuts = [(3, 300), (7, 200), (16, 110)]
    assert counts(576, cuts, True) == [(3, 309), (7, 204), (16, 113)]
    assert counts(576, cuts, False) == cuts
    assert counts(576, [(2, None)], False) == [(2, None)]


def test_pyramiddrop_halves_at_a_quarter_a_half_and_three_quarters():
    assert plan("pyramiddrop", 576, None, 32) == [(8, 288), (16, 144), (24, 72)]
    assert plan("pyramiddrop", 31, None, 4) == [(1, 15), (2, 7), (3, 3)]      # int(31 / 8)
    assert plan("pyramiddrop", 577, None, 40) == [(10, 288), (20, 144), (30, 72)]
    assert plan("pyramiddrop", 5, None, 4) == [(1, 2), (2, 1), (3, 1)]        # and never none


@pytest.mark.parametrize("layers, fastv, pyramiddrop, sparsevlm", [
    (32, [2], [8, 16, 24], [3, 7, 16]),
    (40, [2], [10, 20, 30], [4, 9, 20]),
    (28, [2], [7, 14, 21], [3, 6, 14]),
    (5, [1], [1, 2, 4], [1, 2, 3]),
    (4, [1], [1, 2, 3], [1, 2, 3]),
    (3, [1], [1, 2], [1, 2]),
    (2, [1], [1], [1])])
def test_layers_scale_with_the_depth_of_the_decoder(layers, fastv, pyramiddrop, sparsevlm):
    assert where("fastv", layers, None) == fastv
    assert where("pyramiddrop", layers, None) == pyramiddrop
    for name in SPARSE:
        assert where(name, layers, None) == sparsevlm


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
    at = where(name, layers, None)
    powers, factors = [1.0] * len(at), [1.0] * len(at)
    if name == "pyramiddrop":
        powers = [1.0, 2.0, 3.0][:len(at)]
    if name in SPARSE:
        nearest = min(PUBLISHED[name], key=lambda own: abs(own / 576 - budget / N))
        factors = [kept / 576 for kept in PUBLISHED[name][nearest]]
    sizes = sorted({((k + 0.5) / N / factor) ** (1 / power) for k in range(N)
                    for factor, power in zip(factors, powers, strict=False)})
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
                                                   f"which {where(name, layers, None)[0]} see "
                                                   f"all: keep from {lowest} to {N}"):
                plan(name, N, budget, layers)
            continue
        cuts = plan(name, N, budget, layers)
        plans = every_plan(name, N, layers, budget)
        means = [simulated_mean(N, other, layers, recycles) for other in plans]
        mean = mean_tokens(N, cuts, layers, recycles)
        assert mean == simulated_mean(N, cuts, layers, recycles)
        assert mean == max(own for own in means if own <= budget)
        assert cuts in plans
    assert plan(name, N, lowest, layers) and plan(name, N, N, layers)[0][1] == N


@pytest.mark.parametrize("name", METHODS)
def test_what_was_fed_is_what_was_planned(deep: Llava, mini: Llava, name: str):
    """A real run reports the mean over the inputs of all layers: at most what was asked for."""
    lowest = {"fastv": 37, "pyramiddrop": 37, "sparsevlm": 39, "sparsevlm_plus": 37}[name]
    for model, budgets in ((deep, (7, 9, 11, 16)), (mini, (lowest, 72, 108))):
        image = model.encode_image(ROOT / "image.jpg")
        N, layers = image.n_visual, model.config.text.num_hidden_layers
        for budget in budgets:
            result = model.ground(image, WORDS, name, budget, "gap", max_new_tokens=1)
            cuts = plan(name, N, budget, layers)
            assert result.visual_tokens == mean_tokens(N, cuts, layers, name == "sparsevlm")
            assert result.cuts == counts(N, cuts, name == "sparsevlm")
            assert budget - 1 < result.visual_tokens <= budget
    with pytest.raises(NanogapError, match=f"keep from {lowest} to 144"):
        mini.ground(ROOT / "image.jpg", WORDS, name, lowest - 1)


def test_a_share_of_the_tokens_is_the_mean_as_well(mini: Llava, shown: EncodedImage):
    """Half of 144 in the mean: 48 behind the first of four layers."""
    result = mini.ground(shown, WORDS, "fastv", "50%", "gap", max_new_tokens=1)
    assert result.visual_tokens == 72 and result.cuts == [(1, 48)]


def test_cuts_in_words_name_layers_and_numbers():
    assert cuts_in_words("sparsevlm", [(1, 71), (2, 47)], 4) == (
        "sparsevlm in 4 layers, counted from 0: visual tokens cut to 71 from layer 1 on, "
        "47 from layer 2 on")
    assert cuts_in_words("mine", plan("pyramiddrop", 8, None, 2), 2).endswith("cut to 4 from "
                                                                              "layer 1 on")


@pytest.fixture
def own_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test enters is forgotten behind it."""
    for name in ("lots", "finder", "shape"):
        monkeypatch.setitem(STRATEGIES, name, lambda *_: None)


def test_a_cut_that_draws_lots_draws_those_of_the_seed(own_strategies):
    @strategy(needs={"attention"})
    def lots(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
        return Kept(torch.randperm(len(seen.features), generator=generator)[:budget])

    drawn_with = []
    for seed in (0, 0, 1):
        cut, = cuts_of("lots", 16, 8, seed, layers=3, layer=1)
        drawn_with.append(cut.choose(seen(torch.zeros(2, 16))).keep.tolist())
    assert drawn_with[0] == drawn_with[1] != drawn_with[2] and len(drawn_with[0]) == 4


def test_a_strategy_of_ones_own_finds_its_budget_at_its_cut(model: Llava, own_strategies):
    """It is called with None, as before the decoder; nobody can say before how many it keeps."""
    @strategy(needs={"attention"}, finds_budget=True)
    def finder(seen: VisualTokens, budget: int | None, generator: torch.Generator) -> Kept:
        assert budget is None
        return Kept(torch.tensor([3, 1, 2]))

    result = model.ground(ROOT / "image.jpg", WORDS, "finder", None, "gap", max_new_tokens=1)
    assert result.keep.tolist() == [1, 2, 3] and result.cuts == [(1, 3)]
    assert plan("finder", 16, None, 3) == [(1, None)]
    assert cuts_in_words("finder", plan("finder", 16, None, 3), 3).endswith(
        "cut to what it finds from layer 1 on")


def test_a_strategy_at_a_cut_sees_hidden_states_in_one_row(model: Llava, own_strategies):
    shown_to = []

    @strategy(needs={"attention"})
    def shape(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
        shown_to.append((seen.rows, seen.columns, seen.features, seen.attention.shape, budget))
        return Kept(torch.arange(budget))

    model.ground(ROOT / "image.jpg", WORDS, "shape", 12, "gap", layer=2, max_new_tokens=1)
    x, layout = whole(model)
    hidden, _ = layers_by_hand(model, x, layout.position_ids, 0, 2)
    (rows, columns, features, heads, budget), = shown_to
    assert (rows, columns, heads, budget) == (1, 16, (4, 16), 4)
    assert torch.allclose(features, hidden[0, layout.P:layout.P + 16], atol=1e-4)


# ----- any number of cuts -------------------------------------------------------------------------


def test_without_a_cut_it_is_plain_prefill_bit_for_bit(model: Llava):
    x, layout = whole(model)
    cache = KVCache(model.config.text, x.shape[1] + 3, x)
    logits = model.language_model(x, layout.position_ids, cache, last=1)
    prompt = prefill(model.language_model, x, layout, [], room=3)
    assert torch.equal(prompt.logits, logits[0]) and prompt.cache.lengths == cache.lengths
    assert prompt.layout is layout and prompt.next_position == layout.next_position
    token = model.language_model.model.embed_tokens(torch.tensor([[7]]))
    plain = model.language_model(token, torch.tensor([layout.next_position]), cache)
    assert torch.equal(prompt.feed([7], [layout.next_position]), plain[0])
    rows = cache.lengths[0]
    assert torch.equal(prompt.cache.keys[..., :rows, :], cache.keys[..., :rows, :])
    assert torch.equal(prompt.cache.values[..., :rows, :], cache.values[..., :rows, :])


@pytest.mark.parametrize("mode", PRUNED)
def test_drafted_tokens_are_read_with_the_prompt_as_if_they_had_been_said(model: Llava, mode: str):
    """A chain of two and a choice of three: the logits behind each, as whole passes give them."""
    ids, keep = model.prompt(WORDS), Kept(torch.tensor([9, 2, 14]))
    P, A = model.around_image(ids)
    layout = lay_out(keep.keep, P, 16, A, mode)
    x = model.embed(ids, model.encode_image(ROOT / "image.jpg"), keep, layout.order)
    prompt = prefill(model.language_model, x, layout, drafted=Draft((7, 8), (20, 21, 22)))
    said = [[], [7], [7, 8], [7, 8, 20], [7, 8, 21], [7, 8, 22]]
    for logits, tokens in zip(prompt.logits, said, strict=True):
        behind = model.language_model.model.embed_tokens(torch.tensor(tokens).long())
        places = layout.next_position + torch.arange(len(tokens))
        whole_pass = model.language_model(torch.cat([x, behind[None]], 1),
                                          torch.cat([layout.position_ids, places]))
        assert torch.allclose(logits, whole_pass[0, -1], atol=1e-4)


@pytest.mark.parametrize("layers", [[1], [2], [1, 2]])
@pytest.mark.parametrize("mode", RASTER)
def test_cuts_that_keep_everything_are_no_cuts(model: Llava, layers: list[int], mode: str):
    """In any order of importance: the raster order is restored."""
    x, layout = whole(model, mode)
    plain = prefill(model.language_model, x, layout, room=4)
    shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    cuts = [Cut(layer, lambda seen: Kept(shuffle)) for layer in layers]
    cut = prefill(model.language_model, x, layout, cuts, room=4)
    assert torch.equal(cut.logits, plain.logits) and cut.visual_tokens() == 16
    assert torch.equal(cut.layout.position_ids, layout.position_ids)
    assert list(decode(cut, 4, {2})) == list(decode(plain, 4, {2}))


def test_what_keeps_everything_in_another_order_is_a_cut_where_the_order_counts(model: Llava):
    x, layout = whole(model, "permuted")
    plain = prefill(model.language_model, x, layout)
    shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    cut = prefill(model.language_model, x, layout, [Cut(1, lambda seen: Kept(shuffle))])
    assert not torch.allclose(cut.logits, plain.logits, atol=1e-3)
    assert torch.equal(cut.layout.keep, shuffle)


# places at each cut: of the 16; of these 7 (and of the two that were added, 7 and 8); of the rest
TWO = [(1, [9, 2, 14, 5, 0, 15, 7], 0), (3, [4, 0, 6], 0)]
THREE = [(1, [9, 2, 14, 5, 0, 15, 7], 2), (2, [8, 4, 0, 6, 7, 1], 1), (4, [5, 1, 6, 3], 0)]
NEIGHBOURS = [(2, [9, 2, 14, 5], 1), (3, [4, 3, 0], 1), (4, [3, 0], 2)]


@pytest.mark.parametrize("cuts", [TWO, THREE, NEIGHBOURS], ids=["two", "three", "neighbours"])
@pytest.mark.parametrize("mode", PRUNED)
def test_cuts_with_a_cache_say_what_whole_passes_say(deep: Llava, mode: str, cuts: list):
    """Whatever each keeps, of patches and of tokens added before, and whatever it adds."""
    def kept(places: list[int], made: int) -> Callable[[VisualTokens], Kept]:
        return lambda seen: Kept(torch.tensor(places), added=means(seen.features, made))

    def means(own: Tensor, made: int) -> Tensor:
        return own.mean(0).expand(made, -1) * torch.arange(1, made + 1)[:, None]

    def picked(places: list[int], made: int) -> Pick:
        return lambda own, before, behind, ids: (places, means(own, made))

    oracle = Whole(deep, mode, [(layer, picked(places, made)) for layer, places, made in cuts])
    ours = [Cut(layer, kept(places, made)) for layer, places, made in cuts]
    prompt = prefill(deep.language_model, *whole(deep, mode), ours, room=6)
    assert torch.allclose(prompt.logits[0], oracle.logits([]), atol=1e-4)
    assert [stage.layout.position_ids.tolist() for stage in prompt.stages] == oracle.ids
    assert prompt.layout.keep.tolist() == oracle.patches()
    sizes = [len(visual) for visual in oracle.visual]
    starts = [0, *(layer for layer, _, _ in cuts), 5]
    layers = [size for size, start, stop in zip(sizes, starts, starts[1:], strict=False)
              for _ in range(start, stop)]
    P, A = oracle.P, oracle.A
    assert prompt.cache.lengths == [P + size + A for size in layers]
    assert prompt.visual_tokens() == sum(layers) / 5
    tokens = list(decode(prompt, 6, deep.end_tokens))
    assert tokens == oracle.say(6)


def test_a_cut_with_features_of_its_own_feeds_these(deep: Llava):
    """In the order of keep: raster modes sort them with it."""
    x, layout = whole(deep, "gap")
    keep = torch.tensor([9, 2, 14])

    def logits(factors: list[float]) -> Tensor:
        def merged(seen: VisualTokens) -> Kept:
            return Kept(keep, seen.features[keep] * torch.tensor(factors)[:, None])
        return prefill(deep.language_model, x, layout, [Cut(2, merged)]).logits

    own = prefill(deep.language_model, x, layout, [Cut(2, lambda seen: Kept(keep))]).logits
    assert torch.equal(logits([1.0, 1.0, 1.0]), own)
    assert not torch.allclose(logits([2.0, 1.0, 1.0]), own, atol=1e-3)


def test_under_gap_all_ids_are_gathered_and_under_shifted_all_are_counted_again(deep: Llava):
    """At each of three cuts, the text too, and so is where the answer goes on."""
    chosen = [(1, [9, 2, 14, 5, 0, 15, 7]), (2, [4, 0, 6, 1, 5]), (4, [3, 0])]

    def read(mode: str) -> list[Layout]:
        cuts = [Cut(layer, lambda seen, places=places: Kept(torch.tensor(places)))
                for layer, places in chosen]
        prompt = prefill(deep.language_model, *whole(deep, mode), cuts)
        return [stage.layout for stage in prompt.stages]

    kept = [[*range(16)], [0, 2, 5, 7, 9, 14, 15], [0, 2, 9, 14, 15], [0, 14]]
    for layout, keep in zip(read("gap"), kept, strict=True):
        P, end = layout.P, layout.P + 16 + layout.A
        stays = [*range(P), *(P + patch for patch in keep), *range(P + 16, end)]
        assert layout.position_ids.tolist() == stays and layout.next_position == end
    for layout, keep in zip(read("shifted"), kept, strict=True):
        rows = layout.P + len(keep) + layout.A
        assert layout.keep.tolist() == keep
        assert layout.position_ids.tolist() == list(range(rows)) and layout.next_position == rows


def test_a_cut_looks_at_the_layer_before_it_or_behind_it(deep: Llava):
    """The last token's row of either, and the raters', corrected or not."""
    x, layout = whole(deep)
    P, last = layout.P, x.shape[1] - 1
    raters = raters_by_hand(x, P, 16)
    heard: list[Tensor] = []

    def choose(seen: VisualTokens) -> Kept:
        heard.append(seen.attention)
        return Kept(torch.arange(16))

    fed, before = layers_by_hand(deep, x, layout.position_ids, 0, 2)
    _, behind = layers_by_hand(deep, fed, layout.position_ids, 2, 3)
    ones = torch.tensor([[turned_ones(row - (P + i), 16, deep.config.text.rope_theta)
                          for i in range(16)] for row in raters])
    expected = [before[:, last, P:P + 16], behind[:, last, P:P + 16],
                before[:, raters, P:P + 16].mean(1), (before[:, raters, P:P + 16] / ones).mean(1)]
    for options in ({}, {"ahead": True}, {"raters": True}, {"raters": True, "corrected": True}):
        prefill(deep.language_model, x, layout, [Cut(2, choose, **options)])
    for own, other in zip(heard, expected, strict=True):
        assert torch.allclose(own, other, atol=1e-4, rtol=1e-3)


# ----- half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_as_many_and_stays_finite(deep_folder: Path, dtype: str):
    model = nanogap.load(deep_folder, device="cpu", dtype=dtype)
    x, layout = whole(model, "gap")
    assert x.dtype == getattr(torch, dtype)
    for name in METHODS:
        prompt = prefill(model.language_model, x, layout, cuts_of(name, 16, 9, 0, 5), room=2)
        assert prompt.logits.shape == (1, 640) and prompt.logits.isfinite().all()
        assert prompt.feed([7], [prompt.next_position]).isfinite().all()
        cuts = counts(16, plan(name, 16, 9, 5), name == "sparsevlm")
        assert [(stage.start, stage.layout.visual_tokens) for stage in prompt.stages[1:]] == cuts
        rows = layout.P + layout.A + 1
        ends = [0, *(layer for layer, _ in cuts), 5]
        sizes = [16, *(left for _, left in cuts)]
        assert prompt.cache.lengths == [
            rows + size for size, start, stop in zip(sizes, ends, ends[1:], strict=False)
            for _ in range(start, stop)]
        assert model.ground(ROOT / "image.jpg", WORDS, name, 9, "shifted").tokens


def test_only_pyramiddrop_needs_no_budget():
    view = View(seen(drawn(2, 16)), torch.arange(16))
    assert len(select("pyramiddrop", [view], None).keep) == 8
    for name in ("fastv", *SPARSE):
        with pytest.raises(NanogapError, match=f"{name} needs a budget"):
            plan(name, 16, None, 3)
