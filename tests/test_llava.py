"""From an image and an expression to a box, on a tiny random model with 4 x 4 patches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanogap import NanogapError
from nanogap.ground import in_pixels
from nanogap.gap import MODES
from nanogap.llama import LlamaForCausalLM, rope_angles, rotate
from nanogap.prune import STRATEGIES, Kept


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    generator = torch.Generator().manual_seed(4)
    levels = torch.randint(0, 256, (60 * 40 * 3,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (60, 40), bytes(levels.tolist()))


KEEP = torch.tensor([9, 2, 14, 5])


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


def test_the_four_modes_differ_as_the_table_says(model, picture):
    """gap and shifted: same order, other IDs; shifted and permuted: same IDs, other order."""
    ids, pixels = model.prompt("the man"), model.prepare_image(picture)
    gap, shifted, permuted = (model(ids, pixels, KEEP, mode) for mode in ("gap", "shifted", "permuted"))
    assert not torch.allclose(gap[-1], shifted[-1], atol=1e-3)
    assert not torch.allclose(permuted[-1], shifted[-1], atol=1e-3)
    assert torch.equal(gap, model(ids, pixels, KEEP.sort().values, "gap"))
    P = model.around_image(ids)[0]
    assert torch.allclose(gap[:P], shifted[:P], atol=1e-5)              # before the image nothing has changed


def test_gap_equals_the_unpruned_sequence_with_the_dropped_tokens_masked_out(model, picture):
    """An independent definition: run all tokens at their IDs, and let nobody look at the dropped ones."""
    ids, pixels = model.prompt("the man"), model.prepare_image(picture)
    P, A = model.around_image(ids)
    keep = KEEP.sort().values
    stays = torch.cat([torch.arange(P), P + keep, P + 16 + torch.arange(A)])
    features = model.vision_tower(pixels).features[0]
    x = model.splice(ids, model.multi_modal_projector(features))
    seen = torch.zeros(x.shape[1], dtype=torch.bool)
    seen[stays] = True
    mask = torch.ones(x.shape[1], x.shape[1]).tril().bool() & (seen | torch.eye(x.shape[1]).bool())
    logits = run_with_mask(model.language_model, x, torch.arange(x.shape[1]), mask)
    assert torch.allclose(logits[0, stays], model(ids, pixels, KEEP, "gap"), atol=2e-4)


def run_with_mask(decoder: LlamaForCausalLM, x: torch.Tensor, position_ids: torch.Tensor,
                  mask: torch.Tensor) -> torch.Tensor:
    """The decoder with attention written out and a mask of one's own."""
    cos, sin = rope_angles(position_ids, decoder.model.config.head_dim, decoder.model.config.rope_theta)
    for layer in decoder.model.layers:
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (project(h).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
                   for project in (a.q_proj, a.k_proj, a.v_proj))
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(2, 3) / a.head_dim ** 0.5
        y = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        x = x + a.o_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return decoder.lm_head(decoder.model.norm(x))


@pytest.mark.parametrize("mode", MODES)
def test_generation_with_a_cache_says_what_whole_passes_say(model, picture, mode: str):
    """Greedy decoding by feeding everything again at each step, with the IDs counted on from the prompt's."""
    result = model.ground(picture, "the man", "cls_attention", 5, mode, max_new_tokens=6)
    ids, look = model.prompt("the man"), model.look(picture)
    fed = model.sequence(ids, look.seen.features, Kept(result.keep), mode)
    x, position_ids, said = fed.embeddings, fed.position_ids, []
    for i in range(len(result.tokens)):
        said.append(int(model.language_model(x, position_ids)[0, -1].argmax()))
        x = torch.cat([x, model.language_model.model.embed_tokens(torch.tensor([[said[-1]]]))], 1)
        position_ids = torch.cat([position_ids, torch.tensor([result.next_position + i])])
    assert said == result.tokens


def test_the_result_holds_every_number(model, picture):
    ids = model.prompt("the man")
    P, A = model.around_image(ids)
    full = model.ground(picture, "the man", mode="full", max_new_tokens=4)
    assert full.keep.tolist() == list(range(16))
    assert full.position_ids.tolist() == list(range(P + 16 + A)) and full.next_position == P + 16 + A
    gap = model.ground(picture, "the man", "random", 3, "gap", seed=1, max_new_tokens=4)
    assert gap.position_ids.tolist() == [*range(P), *(P + gap.keep).tolist(), *range(P + 16, P + 16 + A)]
    assert gap.next_position == full.next_position
    assert gap.keep.tolist() == sorted(gap.keep.tolist())
    shifted = model.ground(picture, "the man", "random", 3, "shifted", seed=1, max_new_tokens=4)
    assert shifted.position_ids.tolist() == list(range(P + 3 + A)) and shifted.next_position == P + 3 + A
    assert set(gap.timings) == {"vision_ms", "prefill_ms", "decode_ms", "new_tokens", "passes"}
    assert gap.timings["new_tokens"] == len(gap.tokens) and gap.timings["passes"] == len(gap.tokens) - 1
    rows = len(gap.position_ids) + gap.timings["passes"]                # the last token is never fed
    assert gap.kv_bytes == rows * 2 * 3 * 64 * 4                        # k and v, layers, channels, bytes


def test_a_result_and_a_look_can_be_used_where_gradients_flow(model, picture):
    look = model.look(picture)
    result = model.ground(look, "the man", "random", 4, "gap")
    weights = torch.ones(len(look.seen.features), requires_grad=True)
    (weights[result.keep, None] * look.seen.features[result.keep]).sum().backward()
    assert weights.grad.count_nonzero() == 4
    assert not result.keep.is_inference() and not result.position_ids.is_inference()


def test_the_image_is_encoded_once_for_any_number_of_questions(model, picture):
    calls = []
    hook = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    look = model.look(picture)
    for mode in MODES:
        model.ground(look, "the man", "random", 4, mode, max_new_tokens=2)
    hook.remove()
    assert len(calls) == 1


def test_mode_full_does_not_wait_for_what_only_strategies_look_at(model, picture):
    asked = []
    hook = model.vision_tower.register_forward_hook(lambda _, __, out: asked.append(out.keys is not None))
    whole = model.ground(picture, "the man", mode="full", max_new_tokens=4)
    model.ground(picture, "the man", "random", 4, "gap", max_new_tokens=4)
    hook.remove()
    assert asked == [False, True]
    look = model.look(picture, for_pruning=False)
    assert model.ground(look, "the man", mode="full", max_new_tokens=4).tokens == whole.tokens
    with pytest.raises(ValueError, match="take it with for_pruning=True"):
        model.ground(look, "the man", "random", 4, "gap")


def test_generation_stops_at_the_end_token(model, picture):
    """Whatever the model says third is declared the end: it is said, and nothing after it."""
    said = model.ground(picture, "the man", mode="full", max_new_tokens=6).tokens
    stop = said.index(said[2])
    config, model.config = model.config, replace(model.config, eos_token=said[2])
    try:
        assert model.ground(picture, "the man", mode="full", max_new_tokens=6).tokens == said[:stop + 1]
    finally:
        model.config = config


def test_tokens_are_reported_as_they_come(model, picture):
    heard: list[int] = []
    result = model.ground(picture, "the man", mode="full", max_new_tokens=5, on_token=heard.append)
    assert heard == result.tokens


def test_an_image_can_be_a_path(model, picture, tmp_path: Path):
    picture.save(tmp_path / "a.png")
    assert model.ground(tmp_path / "a.png", "the man", mode="full").tokens == \
        model.ground(picture, "the man", mode="full").tokens


def test_a_box_is_mapped_to_pixels_of_the_image_and_a_box_in_the_padding_is_none():
    """60 x 40 is padded by 10 above and below: the square is 60 x 60."""
    assert in_pixels((0.5, 0.5, 1.0, 1.0), 60, 40) == (30.0, 20.0, 60.0, 40.0)
    assert in_pixels((0.0, 0.0, 1.0, 0.1), 60, 40) is None
    assert in_pixels(None, 60, 40) is None


def test_a_strategy_that_was_edited_is_not_answered_from_the_old_ones_prefix(model, picture, monkeypatch):
    """The same name, another choice: a shared look must notice what is fed, not what it is called."""
    look, fresh = model.look(picture, share=True), model.look(picture)
    for keep in ([0, 1, 2, 3], [9, 12, 14, 15]):
        monkeypatch.setitem(STRATEGIES, "mine", lambda *_, keep=keep: Kept(torch.tensor(keep)))
        said = [model.ground(a, "the man", "mine", 4, "gap", max_new_tokens=6) for a in (look, fresh)]
        assert said[0].keep.tolist() == keep and said[0].tokens == said[1].tokens


@pytest.mark.parametrize("ids, message", [
    ([1, 5, 6], "the prompt must hold one image token, not 0"),
    ([1, 560, 560, 6], "the prompt must hold one image token, not 2"),
])
def test_a_prompt_without_exactly_one_image_is_refused(model, picture, ids: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        model(torch.tensor(ids), model.prepare_image(picture))


def test_an_expression_beyond_the_models_positions_is_refused(model, picture):
    with pytest.raises(NanogapError,
                       match="the expression is too long: .* positions and has 512; shorten it"):
        model.ground(picture, "man " * 600, mode="full")


@pytest.mark.parametrize("options, message", [
    ({"mode": "gapped"}, "unknown mode 'gapped': choose from full, shifted, permuted, gap"),
    ({"prune": "best", "keep": 3}, "unknown strategy 'best': choose from "),
    ({"prune": "random", "keep": 17}, "cannot keep 17 of 16 visual tokens"),
    ({"prune": "random"}, "random needs a budget"),
    ({"prune": "random", "keep": "50%"}, "keep is '50%' here: give a whole number from 1 to 16"),
])
def test_a_mistake_in_an_option_is_answered_with_the_choices(model, picture, options: dict, message: str):
    with pytest.raises(NanogapError, match=message):
        model.ground(picture, "the man", **options)
