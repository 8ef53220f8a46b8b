"""The sequence that LLaVA is fed, and its logits, on a tiny random model with 4 x 4 patches."""

import pytest
import torch

from nanogap.gap import MODES, lay_out
from nanogap.llama import LlamaForCausalLM, rope_angles, rotate
from nanogap.prune import STRATEGIES, Kept

KEEP = torch.tensor([9, 2, 14, 5])
PRUNED = [mode for mode in MODES if mode != "full"]


def test_one_image_token_becomes_k_visual_tokens(model, picture):
    ids, pixels = model.prompt("the man"), model.prepare_image(picture)
    T = len(ids)
    assert pixels.shape == (1, 3, 56, 56)
    assert model(ids, pixels).shape == (T - 1 + 16, 640)
    assert model(ids, pixels, KEEP, "gap").shape == (T - 1 + 4, 640)
    assert model(ids, pixels).dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_keeping_everything_is_no_pruning_bit_for_bit(model, picture, mode: str):
    ids, pixels = model.prompt("the man"), model.prepare_image(picture)
    assert torch.equal(model(ids, pixels, torch.arange(16), mode), model(ids, pixels))


def test_the_modes_differ_as_the_table_says(model, picture):
    """gap and shifted: same order, other IDs; shifted and permuted: same IDs, other order."""
    ids, pixels = model.prompt("the man"), model.prepare_image(picture)
    logits = {mode: model(ids, pixels, KEEP, mode) for mode in PRUNED}
    gap, shifted, permuted = logits["gap"], logits["shifted"], logits["permuted"]
    assert not torch.allclose(gap[-1], shifted[-1], atol=1e-3)
    assert not torch.allclose(permuted[-1], shifted[-1], atol=1e-3)
    assert torch.equal(gap, model(ids, pixels, KEEP.sort().values, "gap"))
    P = model.around_image(ids)[0]
    assert torch.allclose(gap[:P], shifted[:P], atol=1e-5)              # nothing has changed there
    for mode, found in logits.items():
        others = [logits[other] for other in logits if other != mode]
        assert not any(torch.allclose(found[-1], other[-1], atol=1e-3) for other in others)


def test_gap_equals_the_unpruned_sequence_with_the_dropped_tokens_masked_out(model, picture):
    """An independent definition: all tokens at their IDs, and nobody looks at the dropped ones."""
    ids, pixels = model.prompt("the man"), model.prepare_image(picture)
    P, A = model.around_image(ids)
    keep = KEEP.sort().values
    stays = torch.cat([torch.arange(P), P + keep, P + 16 + torch.arange(A)])
    image = model.encode_pixels(pixels, 60, 40)
    x = model.embed(ids, image, Kept(torch.arange(16)), torch.arange(16))
    seen = torch.zeros(x.shape[1], dtype=torch.bool)
    seen[stays] = True
    mask = torch.ones(x.shape[1], x.shape[1]).tril().bool() & (seen | torch.eye(x.shape[1]).bool())
    logits = run_with_mask(model.language_model, x, torch.arange(x.shape[1]), mask)
    assert torch.allclose(logits[0, stays], model(ids, pixels, KEEP, "gap"), atol=2e-4)


def run_with_mask(decoder: LlamaForCausalLM, x: torch.Tensor, position_ids: torch.Tensor,
                  mask: torch.Tensor) -> torch.Tensor:
    """The decoder with attention written out and a mask of one's own."""
    config = decoder.model.config
    cos, sin = rope_angles(position_ids, config.head_dim, config.rope_theta)
    for layer in decoder.model.layers:
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (project(h).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
                   for project in (a.q_proj, a.k_proj, a.v_proj))
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(2, 3) / a.head_dim ** 0.5
        y = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        x = x + a.o_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return decoder.lm_head(decoder.model.norm(x))


def test_the_forward_pass_takes_the_size_of_the_picture(model, picture, monkeypatch):
    """LLaVA sees squares, so its logits do not depend on it; the vision side is told anyway."""
    ids, pixels, told = model.prompt("the man"), model.prepare_image(picture), []
    encode = model.encode_pixels

    def heard(pixel_values, width, height):
        told.append((width, height))
        return encode(pixel_values, width, height)

    monkeypatch.setattr(model, "encode_pixels", heard)
    logits = model(ids, pixels, KEEP, "gap", size=(60, 40))
    assert torch.equal(logits, model(ids, pixels, KEEP, "gap"))
    assert told == [(60, 40), (56, 56)]


def test_what_was_made_of_kept_patches_goes_where_they_go(model, picture, monkeypatch):
    """Features of one's own are given in the order of keep: raster modes sort them with it."""
    ids, image = model.prompt("the man"), model.encode_image(picture)
    P, A = model.around_image(ids)
    for mode in PRUNED:
        order = lay_out(KEEP, P, 16, A, mode).order
        own = model.embed(ids, image, Kept(KEEP, image.features[KEEP]), order)
        assert torch.equal(own, model.embed(ids, image, Kept(KEEP), order))
    monkeypatch.setitem(STRATEGIES, "mine", lambda seen, *_: Kept(KEEP, seen.features[KEEP]))
    for mode in PRUNED:
        mine = model.ground(image, "the man", "mine", 4, mode, max_new_tokens=6)
        plain = model.ground(image, "the man", keep=KEEP, mode=mode, max_new_tokens=6)
        assert mine.tokens == plain.tokens


@pytest.mark.parametrize("ids, message", [
    ([1, 5, 6], "the prompt must hold one image token, not 0"),
    ([1, 560, 560, 6], "the prompt must hold one image token, not 2"),
])
def test_a_prompt_without_exactly_one_image_is_refused(model, picture, ids: list[int],
                                                       message: str):
    with pytest.raises(ValueError, match=message):
        model(torch.tensor(ids), model.prepare_image(picture))
