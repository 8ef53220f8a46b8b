"""From an image and an expression to a box, on a tiny random model with 4 x 4 patches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanogap import NanogapError
from nanogap.gap import MODES, lay_out
from nanogap.ground import Answer, ground
from nanogap.models import VLM
from nanogap.prune import STRATEGIES, Kept, needs_of

KEEP = torch.tensor([9, 2, 14, 5])
PRUNED = [mode for mode in MODES if mode != "full"]


def sizes(model: VLM) -> tuple[int, int, int]:
    """P, N and A."""
    P, A = model.around_image(model.prompt("the man"))
    return P, 16, A


@pytest.mark.parametrize("mode", MODES)
def test_generation_with_a_cache_says_what_whole_passes_say(model, picture, mode: str):
    """Greedy decoding that feeds everything again at each step, and counts on from the prompt."""
    result = ground(model, picture, "the man", "cls_attention", 5, mode, max_new_tokens=6)
    ids, image = model.prompt("the man"), model.encode_image(picture)
    layout = lay_out(result.keep, *sizes(model), mode)
    x, position_ids = model.embed(ids, image, Kept(result.keep), layout.order), layout.position_ids
    said: list[int] = []
    for i in range(len(result.tokens)):
        said.append(int(model.language_model(x, position_ids)[0, -1].argmax()))
        x = torch.cat([x, model.language_model.model.embed_tokens(torch.tensor([[said[-1]]]))], 1)
        position_ids = torch.cat([position_ids, torch.tensor([layout.next_position + i])])
    assert said == result.tokens


def test_the_result_holds_every_number(model, picture):
    ids = model.prompt("the man")
    P, A = model.around_image(ids)
    full = ground(model, picture, "the man", mode="full", max_new_tokens=4)
    assert full.keep.tolist() == list(range(16))
    assert full.position_ids.tolist() == list(range(P + 16 + A))
    assert full.next_position == P + 16 + A
    gap = ground(model, picture, "the man", "random", 3, "gap", seed=1, max_new_tokens=4)
    text = range(P + 16, P + 16 + A)
    assert gap.position_ids.tolist() == [*range(P), *(P + gap.keep).tolist(), *text]
    assert gap.next_position == full.next_position
    assert gap.keep.tolist() == sorted(gap.keep.tolist())
    shifted = ground(model, picture, "the man", "random", 3, "shifted", seed=1, max_new_tokens=4)
    assert shifted.position_ids.tolist() == list(range(P + 3 + A))
    assert shifted.next_position == P + 3 + A
    assert set(gap.timings) == {"vision_ms", "prefill_ms", "decode_ms", "new_tokens", "passes"}
    assert gap.timings["new_tokens"] == len(gap.tokens)
    assert gap.timings["passes"] == len(gap.tokens) - 1
    rows = len(gap.position_ids) + gap.timings["passes"]               # the last token is never fed
    assert gap.kv_bytes == rows * 2 * 3 * 64 * 4                       # k and v, layers, C, bytes
    assert full.visual_tokens == 16 and gap.visual_tokens == 3


def test_visual_tokens_count_those_that_a_method_adds(model, picture, monkeypatch):
    def with_two_more(seen, budget, generator):
        return Kept(torch.tensor([4, 1]), added=seen.features[:2])

    monkeypatch.setitem(STRATEGIES, "mine", with_two_more)
    result = ground(model, picture, "the man", "mine", 2, "gap", max_new_tokens=2)
    P, _ = model.around_image(model.prompt("the man"))
    assert result.visual_tokens == 4 and result.keep.tolist() == [1, 4]
    assert result.position_ids[P:P + 4].tolist() == [P + 1, P + 4, P + 15, P + 15]


def test_a_result_and_an_encoded_image_can_be_used_where_gradients_flow(model, picture):
    image = model.encode_image(picture)
    result = ground(model, image, "the man", "random", 4, "gap")
    weights = torch.ones(len(image.features), requires_grad=True)
    (weights[result.keep, None] * image.features[result.keep]).sum().backward()
    assert weights.grad.count_nonzero() == 4
    assert not result.keep.is_inference() and not result.position_ids.is_inference()


def test_the_image_is_encoded_once_for_any_number_of_questions(model, picture):
    calls = []
    hook = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    image = model.encode_image(picture)
    for mode in MODES:
        ground(model, image, "the man", "random", 4, mode, max_new_tokens=2)
    hook.remove()
    assert len(calls) == 1


def test_a_strategy_sees_what_it_needs_and_nothing_else(model, picture, monkeypatch):
    """Another one asked for more before: what is kept of that is not shown by chance."""
    image, seen_by = model.encode_image(picture), []
    ground(model, image, "the man", "visionzip", 4, max_new_tokens=1)
    assert image.fields.keys() == {"cls", "cls_attention", "keys"}

    def mine(seen, budget, generator):
        seen_by.append(seen)
        return Kept(torch.arange(budget))

    mine.needs = frozenset({"cls", "projected"})
    monkeypatch.setitem(STRATEGIES, "mine", mine)
    assert needs_of("mine") == {"cls", "projected"}
    ground(model, image, "the man", "mine", 4, max_new_tokens=1)
    assert seen_by[0].fields.keys() == {"cls", "projected"}
    assert torch.equal(seen_by[0].projected, model.project(image.features))
    with pytest.raises(AttributeError, match="`keys` is not there"):
        _ = seen_by[0].keys


def test_decoding_is_one_argument(model, picture):
    """Another way to decode is given the embeddings and their layout, and may say anything."""
    heard = []

    def silent(model, x, layout, max_new_tokens):
        heard.append((x.shape[1], len(layout.position_ids), max_new_tokens))
        return Answer([model.config.eos_token], 0.0, 0, 0)

    result = ground(model, picture, "the man", keep=KEEP, max_new_tokens=7, decode=silent)
    T = sum(sizes(model)) - 16 + 4
    assert heard == [(T, T, 7)] and result.tokens == [2] and result.box is None


# ----- indices of one's own -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", PRUNED)
def test_indices_of_ones_own_are_fed_as_they_are(model, picture, mode: str):
    result = ground(model, picture, "the man", keep=KEEP, mode=mode, max_new_tokens=1)
    ids = model.prompt("the man")
    P, A = model.around_image(ids)
    layout = lay_out(KEEP, P, 16, A, mode)
    assert torch.equal(result.keep, layout.kept)
    assert torch.equal(result.position_ids, layout.position_ids)
    assert result.next_position == layout.next_position
    logits = model(ids, model.prepare_image(picture), KEEP, mode)
    assert result.tokens == [int(logits[-1].argmax())]


def test_the_order_of_ones_own_indices_counts_in_ranked_modes_alone(model, picture):
    ids, pixels = model.prompt("the man"), model.prepare_image(picture)
    for mode in PRUNED:
        one, other = (ground(model, picture, "the man", keep=keep, mode=mode, max_new_tokens=6)
                      for keep in (KEEP, KEEP.flip(0)))
        same = torch.equal(one.keep, other.keep)
        assert same == (mode not in ("permuted", "ranked, original"))
        assert (one.tokens == other.tokens) or not same
        logits = model(ids, pixels, KEEP, mode), model(ids, pixels, KEEP.flip(0), mode)
        assert torch.equal(*logits) == same


# ----- options ------------------------------------------------------------------------------------


def test_a_picture_and_an_expression_are_enough(model, picture, tmp_path: Path):
    """Half of the patches, those that CLS attends to, under GAP."""
    picture.save(tmp_path / "a.png")
    result = ground(model, tmp_path / "a.png", "the man")
    spelled = ground(model, picture, "the man", prune="cls_attention", keep=8, mode="gap", seed=0)
    assert result.visual_tokens == 8 and torch.equal(result.keep, spelled.keep)
    assert result.tokens == spelled.tokens and result.next_position == spelled.next_position


def test_the_seed_is_that_of_the_lots(model, picture):
    kept = [ground(model, picture, "the man", "random", 4, "permuted", seed, max_new_tokens=1).keep
            for seed in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_a_question_may_be_asked_in_place_of_the_models_own(model, picture):
    fed = []
    hook = model.language_model.model.layers[0].register_forward_hook(
        lambda layer, given, out: fed.append(given[0].shape[1]))
    ground(model, picture, "the man", mode="full", max_new_tokens=1, question="what is it")
    hook.remove()
    assert fed == [len(model.encode_question("what is it")) - 1 + 16]


# ----- the answer ---------------------------------------------------------------------------------


def test_generation_stops_at_the_end_token(model, picture):
    """Whatever the model says third is declared the end: it is said, and nothing after it."""
    said = ground(model, picture, "the man", mode="full", max_new_tokens=6).tokens
    stop = said.index(said[2])
    config, model.config = model.config, replace(model.config, eos_token=said[2])
    try:
        result = ground(model, picture, "the man", mode="full", max_new_tokens=6)
        assert result.tokens == said[:stop + 1]
    finally:
        model.config = config


def test_a_box_is_mapped_to_pixels_of_the_image_and_a_box_in_the_padding_is_none(model, picture):
    """60 x 40 is padded by 10 above and below: the square is 60 x 60."""
    image = model.encode_image(picture)
    assert (image.width, image.height) == (60, 40)
    assert model.box_in("[0.5, 0.5, 1.0, 1.0]", 60, 40) == (30.0, 20.0, 60.0, 40.0)
    assert model.box_in("[0.0, 0.0, 1.0, 0.1]", 60, 40) is None
    assert model.box_in("there is none", 60, 40) is None


def test_the_box_of_a_result_is_in_pixels_of_the_picture(model, picture, monkeypatch):
    """Whatever the model says: its words become the box that they name, out of the square."""
    monkeypatch.setattr(model, "tokenizer", Says("[0.25, 0.5, 0.75, 0.75]", model.tokenizer))
    result = ground(model, picture, "the man", mode="full", max_new_tokens=1)
    assert result.text == "[0.25, 0.5, 0.75, 0.75]" and result.box == (15.0, 20.0, 45.0, 35.0)


class Says:
    """A tokenizer that decodes everything to one answer."""

    def __init__(self, answer: str, tokenizer: object) -> None:
        self.answer, self.tokenizer = answer, tokenizer

    def decode(self, tokens: list[int]) -> str:
        return self.answer

    def encode(self, *text: object, **options: object) -> object:
        return self.tokenizer.encode(*text, **options)


# ----- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ({"mode": "gapped"}, "unknown mode 'gapped': choose from full; shifted; permuted; gap; "),
    ({"prune": "best", "keep": 3}, "unknown strategy 'best': choose from "),
    ({"prune": "random", "keep": 17}, "random cannot keep 17 of 16 visual tokens: give a whole"),
    ({"prune": "random", "keep": None}, "random cannot keep None of 16 visual tokens"),
    ({"prune": "random", "keep": "auto"}, "random cannot keep auto of 16 visual tokens"),
    ({"prune": "prumerge", "keep": "half"}, "prumerge cannot keep half of 16 .* or auto"),
    ({"prune": "random", "keep": "0%"}, "cannot keep 0% of 16 visual tokens"),
    ({"prune": "random", "keep": 2.5}, "cannot keep 2.5 of 16 visual tokens"),
    ({"keep": torch.tensor([3, 16])}, "keep must name raster indices from 0 to 15, each once"),
    ({"keep": torch.tensor([0.5])}, "keep must name raster indices from 0 to 15, each once"),
    ({"keep": [3, 4, 3]}, "keep must name raster indices from 0 to 15, each once"),
])
def test_a_mistake_in_an_option_is_answered_with_the_choices(model, picture, options: dict,
                                                            message: str):
    with pytest.raises(NanogapError, match=message):
        ground(model, picture, "the man", **options)


@pytest.mark.parametrize("keep, budget", [
    (5, 5), ("5", 5), ("100%", 16), ("1%", 1), ("9.8%", 2), ("50%", 8)])
def test_a_budget_is_a_number_or_a_share_never_rounded_to_none(model, picture, keep: object,
                                                               budget: int):
    assert len(ground(model, picture, "the man", "random", keep, max_new_tokens=1).keep) == budget


def test_numbers_that_are_not_finite_are_blamed_on_the_weights(model, picture):
    head = model.language_model.lm_head.weight
    kept = head[7, 3].item()
    head[7, 3] = float("nan")
    try:
        with pytest.raises(NanogapError, match="not finite .*: its weights hold such, or overflow"):
            ground(model, picture, "the man")
    finally:
        head[7, 3] = kept
