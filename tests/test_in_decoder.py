"""Pruning inside the decoder: what the last token looks at, what is cut, and whose IDs are left."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanogap import NanogapError
from nanogap.decode import decode
from nanogap.gap import MODES, Layout, lay_out
from nanogap.in_decoder import FASTV_LAYER, Cut, Prefilled, Stage, cuts_of, prefill
from nanogap.llama import KVCache, rope_angles, rotate
from nanogap.models.llava import Llava
from nanogap.prompt import Draft
from nanogap.prune import STRATEGIES, Kept, View, VisualTokens

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the man"
PRUNED = [mode for mode in MODES if mode != "full"]
RASTER = [mode for mode in PRUNED if MODES[mode][0] == "raster"]


def whole(model: Llava, mode: str = "full") -> tuple[Tensor, Layout]:
    """The prompt with all 16 patches: embeddings, and where they stand."""
    input_ids, everything = model.prompt(WORDS), Kept(torch.arange(16))
    P, A = model.around_image(input_ids)
    layout = lay_out(everything.keep, P, 16, A, mode)
    image = model.encode_image(ROOT / "image.jpg")
    return model.embed(input_ids, image, everything, layout.order), layout


def by_hand(model: Llava, x: Tensor, ids: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    """The first layers, attention written out: hidden states, and the last one's (H, T, T)."""
    return layers_by_hand(model, x, ids, 0, stop)


def layers_by_hand(model: Llava, x: Tensor, ids: Tensor, start: int,
                   stop: int) -> tuple[Tensor, Tensor]:
    """Layers from `start` up to `stop`, in the same way."""
    c = model.config.text
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
    return x, weights[0]


def test_what_stays_is_what_the_last_token_looks_at_most(model: Llava):
    x, layout = whole(model)
    _, weights = by_hand(model, x, layout.position_ids, FASTV_LAYER)
    looked_at = weights[:, -1, layout.P:layout.P + 16].mean(0)
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", 5, "permuted", max_new_tokens=1)
    assert result.keep.tolist() == looked_at.argsort(descending=True)[:5].tolist()


@pytest.mark.parametrize("mode", [*RASTER, "full"])
def test_cutting_nothing_is_no_pruning(model: Llava, mode: str):
    image = model.encode_image(ROOT / "image.jpg")
    full = model.ground(image, WORDS, mode="full", max_new_tokens=6)
    cut = model.ground(image, WORDS, "fastv", 16, mode, max_new_tokens=6)
    assert cut.tokens == full.tokens and cut.position_ids.tolist() == full.position_ids.tolist()
    assert cut.visual_tokens == 16 and cut.kv_bytes == full.kv_bytes


@pytest.mark.parametrize("mode", PRUNED)
def test_generation_with_a_cache_says_what_whole_passes_say(model: Llava, mode: str):
    """Everything fed again for each token: all rows below the cut, and from there the kept ones."""
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", 5, mode, max_new_tokens=6)
    x, layout = whole(model)
    P, ids = layout.P, layout.position_ids
    decoder, said = model.language_model.model, []
    for i in range(len(result.tokens)):
        early = decoder.run(x, ids, None, 0, FASTV_LAYER)
        stays = torch.cat([torch.arange(P), P + result.keep, torch.arange(P + 16, x.shape[1])])
        late_ids = torch.cat([result.position_ids, result.next_position + torch.arange(i)])
        late = decoder.run(early[:, stays], late_ids, None, FASTV_LAYER)
        said.append(int(model.language_model.lm_head(decoder.norm(late))[0, -1].argmax()))
        x = torch.cat([x, decoder.embed_tokens(torch.tensor([[said[-1]]]))], 1)
        ids = torch.arange(x.shape[1])
    assert said == result.tokens


def test_the_ids_after_the_cut_are_those_of_the_mode(model: Llava):
    P, A = model.around_image(model.prompt(WORDS))
    image = model.encode_image(ROOT / "image.jpg")
    gap = model.ground(image, WORDS, "fastv", 3, "gap", max_new_tokens=1)
    text = range(P + 16, P + 16 + A)
    assert gap.position_ids.tolist() == [*range(P), *(P + gap.keep).tolist(), *text]
    assert gap.next_position == P + 16 + A
    shifted = model.ground(image, WORDS, "fastv", 3, "shifted", max_new_tokens=1)
    assert shifted.position_ids.tolist() == list(range(P + 3 + A))
    assert shifted.next_position == P + 3 + A


def test_later_layers_hold_fewer_rows(model: Llava):
    """Three layers, cut before the third: 2 x (P + 16 + A) rows and 1 x (P + 4 + A)."""
    P, A = model.around_image(model.prompt(WORDS))
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", 4, "gap", max_new_tokens=1)
    assert result.kv_bytes == (2 * (P + 16 + A) + P + 4 + A) * 2 * 64 * 4     # k and v, C, bytes
    assert result.visual_tokens == (16 + 16 + 4) / 3


@pytest.mark.parametrize("layer", [1, 2])
def test_the_layer_of_the_cut_can_be_chosen(model: Llava, layer: int):
    """Papers call it K.  Cut before layer 1 of three, two layers hold the few rows."""
    P, A = model.around_image(model.prompt(WORDS))
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", 4, "shifted", layer=layer,
                          max_new_tokens=1)
    rows = layer * (P + 16 + A) + (3 - layer) * (P + 4 + A)
    assert result.kv_bytes == rows * 2 * 64 * 4
    assert result.visual_tokens == (16 * layer + 4 * (3 - layer)) / 3


@pytest.mark.parametrize("layer", [-1, 0, 3])
def test_a_cut_needs_a_layer_before_it_and_one_behind(model: Llava, layer: int):
    with pytest.raises(NanogapError, match=f"fastv cannot cut before layer {layer} of 3: "
                                           "choose one from 1 to 2"):
        model.ground(ROOT / "image.jpg", WORDS, "fastv", 4, layer=layer)


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
    cuts = [Cut(layer, lambda attention: Kept(shuffle)) for layer in layers]
    cut = prefill(model.language_model, x, layout, cuts, room=4)
    assert torch.equal(cut.logits, plain.logits) and cut.visual_tokens() == 16
    assert torch.equal(cut.layout.position_ids, layout.position_ids)
    assert list(decode(cut, 4, 2)) == list(decode(plain, 4, 2))


def test_what_keeps_everything_in_another_order_is_a_cut_where_the_order_counts(model: Llava):
    x, layout = whole(model, "permuted")
    plain = prefill(model.language_model, x, layout)
    shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    cut = prefill(model.language_model, x, layout, [Cut(1, lambda attention: Kept(shuffle))])
    assert not torch.allclose(cut.logits, plain.logits, atol=1e-3)
    assert torch.equal(cut.layout.keep, shuffle)


FIRST = [9, 2, 14, 5, 0, 15, 7]      # of the 16
SECOND = [4, 0, 6]                   # of these 7, as they stand after the first cut


@pytest.mark.parametrize("mode", PRUNED)
def test_two_cuts_with_a_cache_say_what_whole_passes_say(model: Llava, mode: str):
    """Everything fed again for each token: all rows, then those of 7 patches, then of 3."""
    x, layout = whole(model, mode)
    looked_at = []

    def choose(kept: list[int], attention: Tensor) -> Kept:
        looked_at.append(attention)
        return Kept(torch.tensor(kept))

    cuts = [Cut(1, lambda attention: choose(FIRST, attention)),
            Cut(2, lambda attention: choose(SECOND, attention))]
    prompt = prefill(model.language_model, x, layout, cuts, room=6)
    T, P, A = x.shape[1], layout.P, layout.A
    assert prompt.cache.lengths == [T, T - 9, T - 13]
    assert prompt.visual_tokens() == (16 + 7 + 3) / 3
    tokens = list(decode(prompt, 6, 2))

    raster = MODES[mode][0] == "raster"
    first = sorted(FIRST) if raster else FIRST
    second = [first[i] for i in (sorted(SECOND) if raster else SECOND)]
    assert prompt.layout.keep.tolist() == second
    places = torch.tensor([first.index(patch) for patch in second])
    layouts = [lay_out(torch.tensor(kept), P, 16, A, mode) for kept in (range(16), first, second)]
    decoder, said = model.language_model.model, []
    for i in range(len(tokens)):
        ids = [torch.cat([at.position_ids, at.next_position + torch.arange(i)]) for at in layouts]
        new = torch.arange(A + i)
        all_rows, weights = layers_by_hand(model, x, ids[0], 0, 1)
        stays = torch.cat([torch.arange(P), P + torch.tensor(first), P + 16 + new])
        fewer, later_weights = layers_by_hand(model, all_rows[:, stays], ids[1], 1, 2)
        stays = torch.cat([torch.arange(P), P + places, P + 7 + new])
        fewest, _ = layers_by_hand(model, fewer[:, stays], ids[2], 2, 3)
        if i == 0:                              # what each cut was shown: the last token's row
            assert torch.allclose(looked_at[0], weights[:, -1, P:P + 16], atol=1e-5)
            assert torch.allclose(looked_at[1], later_weights[:, -1, P:P + 7], atol=1e-5)
        said.append(int(model.language_model.lm_head(decoder.norm(fewest))[0, -1].argmax()))
        x = torch.cat([x, decoder.embed_tokens(torch.tensor([[said[-1]]]))], 1)
    assert said == tokens


def test_a_cut_that_draws_lots_draws_those_of_the_seed(monkeypatch: pytest.MonkeyPatch):
    def lots(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
        return Kept(torch.randperm(len(seen.features), generator=generator)[:budget])

    monkeypatch.setitem(STRATEGIES, "lots", lots)
    view = View(VisualTokens(torch.zeros(16, 1), 4, 4), torch.arange(16))
    drawn = []
    for seed in (0, 0, 1):
        cut, = cuts_of("lots", [view], 5, seed, layer=1, layers=3)
        drawn.append(cut.choose(torch.zeros(2, 16)).keep.tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_views_of_a_picture_share_the_budget_of_a_cut():
    """Two rectangles of 6 and 2 tokens, mixed up: each sees the attention to its own."""
    views = [View(VisualTokens(torch.zeros(6, 1), 2, 3), torch.tensor([7, 1, 2, 3, 4, 5])),
             View(VisualTokens(torch.zeros(2, 1), 1, 2), torch.tensor([0, 6]))]
    cut, = cuts_of("fastv", views, 4, seed=0, layer=1, layers=3)
    attention = torch.tensor([[9.0, 1, 5, 2, 3, 0, 8, 4]]).expand(2, 8)
    assert cut.layer == 1 and cut.choose(attention).keep.tolist() == [2, 7, 4, 0]
