"""From an image and an expression to a box, on a tiny random model with 4 x 4 patches."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanogap import NanogapError
from nanogap.gap import MODES, lay_out
from nanogap.ground import EncodedImage, box_in
from nanogap.models.llava import Llava
from nanogap.prune import FIELDS, STRATEGIES, Kept, needs_of

KEEP = torch.tensor([9, 2, 14, 5])
PRUNED = [mode for mode in MODES if mode != "full"]


def sizes(model: Llava) -> tuple[int, int, int]:
    """P, N and A."""
    P, A = model.around_image(model.prompt("the man"))
    return P, 16, A


@pytest.mark.parametrize("mode", MODES)
def test_generation_with_a_cache_says_what_whole_passes_say(model, picture, mode: str):
    """Greedy decoding that feeds everything again at each step, and counts on from the prompt."""
    result = model.ground(picture, "the man", "cls_attention", 5, mode, max_new_tokens=6)
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
    full = model.ground(picture, "the man", mode="full", max_new_tokens=4)
    assert full.keep.tolist() == list(range(16))
    assert full.position_ids.tolist() == list(range(P + 16 + A))
    assert full.next_position == P + 16 + A
    gap = model.ground(picture, "the man", "random", 3, "gap", seed=1, max_new_tokens=4)
    text = range(P + 16, P + 16 + A)
    assert gap.position_ids.tolist() == [*range(P), *(P + gap.keep).tolist(), *text]
    assert gap.next_position == full.next_position
    assert gap.keep.tolist() == sorted(gap.keep.tolist())
    shifted = model.ground(picture, "the man", "random", 3, "shifted", seed=1, max_new_tokens=4)
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
    result = model.ground(picture, "the man", "mine", 2, "gap", max_new_tokens=2)
    P, _ = model.around_image(model.prompt("the man"))
    assert result.visual_tokens == 4 and result.keep.tolist() == [1, 4]
    assert result.position_ids[P:P + 4].tolist() == [P + 1, P + 4, P + 15, P + 15]


def test_a_result_and_an_encoded_image_can_be_used_where_gradients_flow(model, picture):
    image = model.encode_image(picture)
    result = model.ground(image, "the man", "random", 4, "gap")
    weights = torch.ones(len(image.features), requires_grad=True)
    (weights[result.keep, None] * image.features[result.keep]).sum().backward()
    assert weights.grad.count_nonzero() == 4
    assert not result.keep.is_inference() and not result.position_ids.is_inference()


def test_the_image_is_encoded_once_for_any_number_of_questions(model, picture):
    calls = []
    hook = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    image = model.encode_image(picture)
    for mode in MODES:
        model.ground(image, "the man", "random", 4, mode, max_new_tokens=2)
    hook.remove()
    assert len(calls) == 1


# ----- what strategies look at --------------------------------------------------------------------


def fields_made(model: Llava, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of fields as the tower makes them from here on."""
    made: list[str] = []
    tower_makes = model.vision_tower.fields

    def counted(before, after, needs):
        found = tower_makes(before, after, needs)
        made.extend(found)
        return found

    monkeypatch.setattr(model.vision_tower, "fields", counted)
    return made


def test_only_what_is_needed_is_computed_and_only_once(model, picture, monkeypatch):
    made = fields_made(model, monkeypatch)
    image = model.encode_image(picture)
    assert made == [] and image.views[0].seen.fields == {}
    model.ground(image, "the man", "random", 4, max_new_tokens=1)
    model.ground(image, "the man", mode="full", max_new_tokens=1)
    model.ground(image, "the man", keep=torch.tensor([3]), max_new_tokens=1)
    model.ground(image, "the man", "fastv", 8, max_new_tokens=1)
    assert made == [] and image.views[0].seen.fields == {}
    for _ in range(2):
        model.ground(image, "the man", "visionzip", 4, max_new_tokens=1)
        assert sorted(made) == ["cls", "cls_attention", "keys"]
        assert image.views[0].seen.fields.keys() == {"cls", "cls_attention", "keys"}
    model.ground(image, "the man", "vispruner", 4, max_new_tokens=1)
    assert len(made) == 3                                               # cls_attention was there
    model.ground(image, "the man", "divprune", 4, max_new_tokens=1)
    assert len(made) == 3                                               # no work of the tower's
    assert image.views[0].seen.fields.keys() == {"cls", "cls_attention", "keys", "projected"}


def test_mode_full_does_not_wait_for_what_only_strategies_look_at(model, picture, monkeypatch):
    made = fields_made(model, monkeypatch)
    whole = model.ground(picture, "the man", mode="full", max_new_tokens=4)
    assert made == []
    model.ground(picture, "the man", "cls_attention", 4, "gap", max_new_tokens=4)
    assert made == ["cls_attention"]
    image = model.encode_image(picture)
    assert model.ground(image, "the man", mode="full", max_new_tokens=4).tokens == whole.tokens


def test_what_is_asked_for_beforehand_is_there(model, picture, monkeypatch):
    made = fields_made(model, monkeypatch)
    image = model.encode_image(picture, needs={"cls", "projected"})
    assert image.views[0].seen.fields.keys() == {"cls", "projected"} and made == ["cls"]
    assert torch.equal(image.views[0].seen.projected, model.project(image.features))


@pytest.mark.parametrize("needs", [set(), {"cls"}, {"cls_attention", "last_keys"}])
def test_a_strategy_sees_what_it_needs_and_nothing_else(model, picture, monkeypatch, needs: set):
    """Others asked for more before: a field that is not in needs is not there by chance."""
    image, seen_by = model.encode_image(picture, set(FIELDS) - {"aligned", "text", "attention"}), []

    def mine(seen, budget, generator):
        seen_by.append(seen)
        return Kept(torch.arange(budget))

    mine.needs = frozenset(needs)
    monkeypatch.setitem(STRATEGIES, "mine", mine)
    assert needs_of("mine") == needs
    model.ground(image, "the man", "mine", 4, max_new_tokens=1)
    assert seen_by[0].fields.keys() == needs
    with pytest.raises(NanogapError, match="`keys` is not there: add it to needs"):
        _ = seen_by[0].keys


# ----- indices of one's own -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", PRUNED)
def test_indices_of_ones_own_are_fed_as_they_are(model, picture, mode: str):
    result = model.ground(picture, "the man", keep=KEEP, mode=mode, max_new_tokens=1)
    ids = model.prompt("the man")
    P, A = model.around_image(ids)
    layout = lay_out(KEEP, P, 16, A, mode)
    assert torch.equal(result.keep, layout.keep)
    assert torch.equal(result.position_ids, layout.position_ids)
    assert result.next_position == layout.next_position
    logits = model(ids, model.prepare_image(picture), KEEP, mode)
    assert result.tokens == [int(logits[-1].argmax())]


def test_indices_of_ones_own_say_what_a_strategy_says_that_chose_them(model, picture):
    for mode in PRUNED:
        chosen = model.ground(picture, "the man", "random", 5, "permuted", 3, max_new_tokens=1).keep
        theirs = model.ground(picture, "the man", "random", 5, mode, 3, max_new_tokens=6)
        ours = model.ground(picture, "the man", keep=chosen, mode=mode, max_new_tokens=6)
        assert ours.tokens == theirs.tokens
        assert torch.equal(ours.position_ids, theirs.position_ids)


def test_the_order_of_ones_own_indices_counts_in_ranked_modes_alone(model, picture):
    ids, pixels = model.prompt("the man"), model.prepare_image(picture)
    for mode in PRUNED:
        one, other = (model.ground(picture, "the man", keep=keep, mode=mode, max_new_tokens=6)
                      for keep in (KEEP, KEEP.flip(0)))
        same = torch.equal(one.keep, other.keep)
        assert same == (mode not in ("permuted", "ranked, original"))
        assert (one.tokens == other.tokens) or not same
        logits = model(ids, pixels, KEEP, mode), model(ids, pixels, KEEP.flip(0), mode)
        assert torch.equal(*logits) == same


@pytest.mark.parametrize("keep, message", [
    (torch.tensor([3, 16]), "keep must be a list of raster indices from 0 to 15"),
    (torch.tensor([-1]), "keep must be a list of raster indices from 0 to 15"),
    (torch.tensor([0.5]), "keep must be a list of raster indices from 0 to 15"),
    (torch.tensor([[3, 4]]), "keep must be a list of raster indices from 0 to 15"),
    (torch.tensor([3, 4, 3]), "keep names a patch twice"),
    ([3, 4], r"keep is \[3, 4\] here"),
])
def test_indices_that_there_are_not_are_refused(model, picture, keep: object, message: str):
    with pytest.raises(NanogapError, match=message):
        model.ground(picture, "the man", keep=keep)


# ----- options ------------------------------------------------------------------------------------


def test_a_picture_and_an_expression_are_enough(model, picture, tmp_path: Path):
    """Half of the patches, those that CLS attends to, under GAP."""
    picture.save(tmp_path / "a.png")
    result = model.ground(tmp_path / "a.png", "the man")
    spelled = model.ground(picture, "the man", prune="cls_attention", keep=8, mode="gap", seed=0)
    assert result.visual_tokens == 8 and torch.equal(result.keep, spelled.keep)
    assert result.tokens == spelled.tokens and result.next_position == spelled.next_position


def test_the_signature_spells_out_every_option(model):
    assert list(inspect.signature(model.ground).parameters) == [
        "image", "expression", "prune", "keep", "mode", "seed", "layer", "max_new_tokens", "drafts",
        "on_token", "question"]
    for method in (model.ground, model.describe):
        for option in inspect.signature(method).parameters.values():
            assert option.kind in (option.POSITIONAL_OR_KEYWORD, option.KEYWORD_ONLY)
            assert option.annotation is not option.empty
            assert option.name in ("image", "expression") or option.default is not option.empty


@pytest.mark.parametrize("typo", ["max_tokens", "budget", "Mode"])
def test_a_typo_in_an_option_is_named(model, picture, typo: str):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{typo}'"):
        model.ground(picture, "the man", **{typo: 3})
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{typo}'"):
        model.describe(picture, **{typo: 3})


def test_the_seed_is_that_of_the_lots(model, picture):
    kept = [model.ground(picture, "the man", "random", 4, "permuted", seed, max_new_tokens=1).keep
            for seed in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_a_question_may_be_asked_in_place_of_the_models_own(model, picture):
    fed = []
    hook = model.language_model.model.layers[0].register_forward_hook(
        lambda layer, given, out: fed.append(given[0].shape[1]))
    model.ground(picture, "the man", mode="full", max_new_tokens=1, question="what is it")
    hook.remove()
    assert fed == [len(model.encode_question("what is it")) - 1 + 16]


# ----- the answer ---------------------------------------------------------------------------------


def test_generation_stops_at_the_end_token(model, picture):
    """Whatever the model says third is declared the end: it is said, and nothing after it."""
    said = model.ground(picture, "the man", mode="full", max_new_tokens=6).tokens
    stop = said.index(said[2])
    config, model.config = model.config, replace(model.config, eos_token=said[2])
    try:
        result = model.ground(picture, "the man", mode="full", max_new_tokens=6)
        assert result.tokens == said[:stop + 1]
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


def test_a_box_is_mapped_to_pixels_of_the_image_and_a_box_in_the_padding_is_none(model, picture):
    """60 x 40 is padded by 10 above and below: the square is 60 x 60."""
    image = model.encode_image(picture)
    assert (image.width, image.height) == (60, 40)
    assert box_in("[0.5, 0.5, 1.0, 1.0]", model, image) == (30.0, 20.0, 60.0, 40.0)
    assert box_in("[0.0, 0.0, 1.0, 0.1]", model, image) is None
    assert box_in("there is none", model, image) is None


def test_the_box_of_a_result_is_in_pixels_of_the_picture(model, picture, monkeypatch):
    """Whatever the model says: its words become the box that they name, out of the square."""
    monkeypatch.setattr(model, "tokenizer", Says("[0.25, 0.5, 0.75, 0.75]", model.tokenizer))
    result = model.ground(picture, "the man", mode="full", drafts=False, max_new_tokens=1)
    assert result.text == "[0.25, 0.5, 0.75, 0.75]" and result.box == (15.0, 20.0, 45.0, 35.0)


class Says:
    """A tokenizer that decodes everything to one answer."""

    def __init__(self, answer: str, tokenizer: object) -> None:
        self.answer, self.tokenizer = answer, tokenizer

    def decode(self, tokens: list[int]) -> str:
        return self.answer

    def encode(self, *text: object, **options: object) -> object:
        return self.tokenizer.encode(*text, **options)


def test_padding_by_hand_on_a_wide_picture(model):
    """160 x 80 on 4 x 4 patches of 40 x 40 pixels: rows 0 and 3 show nothing of it, 1 and 2 all."""
    image = model.encode_image(Image.new("RGB", (160, 80), "red"))
    assert image.at[0].tolist() == [0, -40, 40, 0] and image.at[6].tolist() == [80, 0, 120, 40]
    full = model.ground(image, "the man", mode="full", max_new_tokens=1)
    assert full.padding == 0.5
    for keep, share in (([0, 3, 12, 15], 1.0), ([5, 6, 10], 0.0), ([0, 5, 6, 10], 0.25)):
        result = model.ground(image, "the man", keep=torch.tensor(keep), max_new_tokens=1)
        assert result.padding == share
    tall = model.encode_image(Image.new("RGB", (80, 160), "red"))
    result = model.ground(tall, "the man", keep=torch.tensor([0, 1, 4, 5]), max_new_tokens=1)
    assert result.padding == 0.5
    square = model.encode_image(Image.new("RGB", (80, 80), "red"))
    assert model.ground(square, "the man", mode="full", max_new_tokens=1).padding == 0


def test_a_patch_that_shows_a_strip_of_the_picture_is_no_padding(model):
    """60 x 40: 15 pixels a patch and 10 of padding, so each row shows some of the picture."""
    for size, first in (((60, 40), [0, -10, 15, 5]), ((40, 60), [-10, 0, 5, 15])):
        image = model.encode_image(Image.new("RGB", size, "red"))
        assert image.at[0].tolist() == first
        assert model.ground(image, "the man", mode="full", max_new_tokens=1).padding == 0


def test_padding_is_counted_among_what_the_last_layers_see(model):
    """FastV is fed all patches, half of them padding; what counts is what it keeps of them."""
    image = model.encode_image(Image.new("RGB", (160, 80), "red"))
    kept = [model.ground(image, "the man", "fastv", keep, layer=1, max_new_tokens=1)
            for keep in (6, 9, 10)]
    assert [len(result.keep) for result in kept] == [1, 5, 7]
    for result in kept:
        in_padding = sum(patch // 4 in (0, 3) for patch in result.keep.tolist())
        assert result.padding == pytest.approx(in_padding / len(result.keep))
        assert result.padding != 0.5                                    # an odd number has no half


def test_where_no_patch_is_kept_there_is_no_padding(model):
    """As where SparseVLM keeps only tokens that it added at an earlier cut: a number, not a NaN."""
    image = model.encode_image(Image.new("RGB", (160, 80), "red"))
    assert image.padding(torch.tensor([]).long()) == 0
    assert image.padding(torch.tensor([0, 5])) == 0.5


# ----- what questions share -----------------------------------------------------------------------


def both(model: Llava, picture: Image.Image) -> tuple[EncodedImage, EncodedImage]:
    return model.encode_image(picture, share=True), model.encode_image(picture)


def test_a_strategy_that_was_edited_is_not_answered_from_the_old_ones_prefix(model, picture,
                                                                             monkeypatch):
    """The same name, another choice: what is fed counts, not what it is called."""
    shared, fresh = both(model, picture)
    for keep in ([0, 1, 2, 3], [9, 12, 14, 15]):
        monkeypatch.setitem(STRATEGIES, "mine", lambda *_, keep=keep: Kept(torch.tensor(keep)))
        said = [model.ground(image, "the man", "mine", 4, "gap", max_new_tokens=6)
                for image in (shared, fresh)]
        assert said[0].keep.tolist() == keep and said[0].tokens == said[1].tokens


def test_a_strategy_that_changed_its_features_is_not_answered_from_the_old_prefix(model, picture,
                                                                                  monkeypatch):
    """The same patches at the same IDs, merged in another way."""
    shared, fresh = both(model, picture)
    words_said = []
    for gain in (1.0, -2.0):
        monkeypatch.setitem(STRATEGIES, "mine", lambda seen, *_, gain=gain: Kept(
            torch.arange(4), gain * seen.features[:4]))
        said = [model.ground(image, "the man", "mine", 4, "gap", max_new_tokens=6).tokens
                for image in (shared, fresh)]
        assert said[0] == said[1]
        words_said.append(said[0])
    assert words_said[0] != words_said[1]


def test_another_mode_is_not_answered_from_the_old_ones_prefix(model, picture):
    """The same patches in the same order at other IDs, and back again."""
    shared, fresh = both(model, picture)
    for mode in ("gap", "shifted", "permuted", "ranked, original", "gap"):
        said = [model.ground(image, "the man", keep=KEEP, mode=mode, max_new_tokens=6).tokens
                for image in (shared, fresh)]
        assert said[0] == said[1]


# ----- mistakes -----------------------------------------------------------------------------------


def test_an_expression_beyond_the_models_positions_is_refused(model, picture):
    with pytest.raises(NanogapError,
                       match="the expression is too long: .* positions and has 512; shorten it"):
        model.ground(picture, "man " * 600, mode="full")


@pytest.mark.parametrize("options, message", [
    ({"mode": "gapped"}, "unknown mode 'gapped': choose from full; shifted; permuted; gap; "),
    ({"prune": "best", "keep": 3}, "unknown strategy 'best': choose from "),
    ({"prune": "random", "keep": 17}, "cannot keep 17 of 16 visual tokens"),
    ({"prune": "random", "keep": None}, "random needs a budget"),
    ({"prune": "random", "keep": "auto"}, "random needs a budget"),
    ({"prune": "random", "keep": "half"}, "keep is 'half' here: give a number of visual tokens"),
    ({"prune": "random", "keep": "0%"}, "cannot keep 0% of 16 visual tokens"),
    ({"prune": "random", "keep": 2.5}, "keep is 2.5 here: give a whole number from 1 to 16"),
])
def test_a_mistake_in_an_option_is_answered_with_the_choices(model, picture, options: dict,
                                                            message: str):
    with pytest.raises(NanogapError, match=message):
        model.ground(picture, "the man", **options)
