"""Pruning inside the decoder: what the last token looks at, what is cut, and which IDs the rest gets."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanogap import NanogapError
from nanogap import in_decoder as fastv
from nanogap.gap import MODES
from nanogap.llama import rope_angles, rotate
from nanogap.models.llava import Llava
from nanogap.prune import Kept

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the man"


def whole(model: Llava) -> tuple[Tensor, Tensor]:
    """The prompt with all 16 patches: embeddings and position IDs."""
    look = model.look(ROOT / "image.jpg")
    fed = model.sequence(model.prompt(WORDS), look.seen.features, Kept(torch.arange(16)), "full")
    return fed.embeddings, fed.position_ids


def by_hand(model: Llava, x: Tensor, ids: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    """Layers up to `stop`, attention written out: hidden states, and the last layer's weights (H, T, T)."""
    c = model.config.text
    cos, sin = rope_angles(ids, c.head_dim, c.rope_theta)
    for layer in model.language_model.model.layers[:stop]:
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (project(h).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
                   for project in (a.q_proj, a.k_proj, a.v_proj))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(2, 3) / c.head_dim ** 0.5
        weights = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + a.o_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x, weights[0]


def test_what_stays_is_what_the_last_token_looks_at_most(model: Llava):
    x, ids = whole(model)
    P, _ = model.around_image(model.prompt(WORDS))
    _, weights = by_hand(model, x, ids, fastv.CUT)
    looked_at = weights[:, -1, P:P + 16].mean(0)
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", 5, "permuted", max_new_tokens=1)
    assert result.keep.tolist() == looked_at.argsort(descending=True)[:5].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_cutting_nothing_is_no_pruning(model: Llava, mode: str):
    look = model.look(ROOT / "image.jpg")
    full = model.ground(look, WORDS, mode="full", max_new_tokens=6)
    cut = model.ground(look, WORDS, "fastv", 16, mode if mode != "permuted" else "gap", max_new_tokens=6)
    assert cut.tokens == full.tokens and cut.position_ids.tolist() == full.position_ids.tolist()


@pytest.mark.parametrize("mode", ["shifted", "permuted", "gap"])
def test_generation_with_a_cache_says_what_whole_passes_say(model: Llava, mode: str):
    """Everything fed again for each token: all rows below the cut, and from there the kept ones."""
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", 5, mode, max_new_tokens=6)
    x, ids = whole(model)
    P, _ = model.around_image(model.prompt(WORDS))
    decoder, said = model.language_model.model, []
    for i in range(len(result.tokens)):
        early = decoder.run(x, ids, None, 0, fastv.CUT)
        stays = torch.cat([torch.arange(P), P + result.keep, torch.arange(P + 16, x.shape[1])])
        late_ids = torch.cat([result.position_ids, result.next_position + torch.arange(i)])
        late = decoder.run(early[:, stays], late_ids, None, fastv.CUT)
        said.append(int(model.language_model.lm_head(decoder.norm(late))[0, -1].argmax()))
        x = torch.cat([x, decoder.embed_tokens(torch.tensor([[said[-1]]]))], 1)
        ids = torch.arange(x.shape[1])
    assert said == result.tokens


def test_the_ids_after_the_cut_are_those_of_the_mode(model: Llava):
    P, A = model.around_image(model.prompt(WORDS))
    look = model.look(ROOT / "image.jpg")
    gap = model.ground(look, WORDS, "fastv", 3, "gap", max_new_tokens=1)
    assert gap.position_ids.tolist() == [*range(P), *(P + gap.keep).tolist(), *range(P + 16, P + 16 + A)]
    assert gap.next_position == P + 16 + A
    shifted = model.ground(look, WORDS, "fastv", 3, "shifted", max_new_tokens=1)
    assert shifted.position_ids.tolist() == list(range(P + 3 + A)) and shifted.next_position == P + 3 + A


def test_later_layers_hold_fewer_rows(model: Llava):
    """Three layers, cut before the third: 2 x (P + 16 + A) rows and 1 x (P + 4 + A)."""
    P, A = model.around_image(model.prompt(WORDS))
    result = model.ground(ROOT / "image.jpg", WORDS, "fastv", 4, "gap", max_new_tokens=1)
    assert result.kv_bytes == (2 * (P + 16 + A) + P + 4 + A) * 2 * 64 * 4     # k and v, channels, bytes
    assert result.visual_tokens == (16 + 16 + 4) / 3


@pytest.mark.parametrize("cut", [1, 2])
def test_the_layer_of_the_cut_can_be_chosen(model: Llava, cut: int):
    """Papers call it K.  Cut before layer 1 of three, two layers hold the few rows."""
    P, A = model.around_image(model.prompt(WORDS))
    model.fastv_layer = cut
    try:
        result = model.ground(ROOT / "image.jpg", WORDS, "fastv", 4, "shifted", max_new_tokens=1)
    finally:
        model.fastv_layer = fastv.CUT
    rows = cut * (P + 16 + A) + (3 - cut) * (P + 4 + A)
    assert result.kv_bytes == rows * 2 * 64 * 4 and result.visual_tokens == (16 * cut + 4 * (3 - cut)) / 3


@pytest.mark.parametrize("cut", [0, 3])
def test_a_cut_needs_a_layer_before_it_and_one_behind(model: Llava, cut: int):
    model.fastv_layer = cut
    try:
        with pytest.raises(NanogapError, match=f"fastv cannot cut before layer {cut} of 3: "
                                               "choose one from 1 to 2"):
            model.ground(ROOT / "image.jpg", WORDS, "fastv", 4)
    finally:
        model.fastv_layer = fastv.CUT


def test_the_mean_number_of_tokens_is_the_one_that_papers_give():
    """FastV on LLaVA-1.5, K = 2: 288 and 144 of 576 tokens kept are 306 and 171 over 32 layers."""
    assert fastv.mean_tokens(32, 576, 288) == 306
    assert fastv.mean_tokens(32, 576, 144) == 171
