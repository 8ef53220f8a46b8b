"""Several tokens to a pass: the words stay those of plain greedy decoding, whatever is drafted."""

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor

import nanogap
from nanogap.errors import NanogapError
from nanogap.fast.decode import draft, foretell
from nanogap.fast.decoder import Part, attend, run
from nanogap.gap import MODES
from nanogap.ground import ground
from nanogap.llava import EncodedImage
from nanogap.models import VLM
from nanogap.prompt import TWO_DECIMALS, encode
from nanogap.prune import STRATEGIES
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_one_query_in_half_precision_is_attended_to_in_float32():
    """So only what it finds is rounded."""
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = attend(q[:, :, :1].float(), k.float(), v.float(), None)
    assert torch.equal(attend(q[:, :, :1], k, v, None), exact.bfloat16())


# ----- what the format foretells ------------------------------------------------------------------


def test_of_a_box_everything_but_eight_digits_is_foretold():
    pieces = ["".join(map(tiny_tokenizer().id_to_token, allowed))
              for allowed in foretell(TWO_DECIMALS, tiny_tokenizer())]
    digits = ["0123456789"] * 2
    assert pieces == ["▁[", "0", ".", *digits, *[",", "▁", "0", ".", *digits] * 3, "]"]


@pytest.mark.parametrize("pieces", [r"\d\d|.", r"0\.\d\d|."])
def test_of_a_tokenizer_that_does_not_split_digits_nothing_is_foretold(pieces: str):
    """One token for "12", or for "0.12"."""
    texts = [TWO_DECIMALS.say((share / 100,) * 4) for share in range(100)]
    vocabulary = sorted({piece for text in texts for piece in re.findall(pieces, text)})
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="["))
    tokenizer.pre_tokenizer = Split(Regex(pieces), "isolated")
    assert len(encode(tokenizer, texts[12])) in (12, 20)
    assert foretell(TWO_DECIMALS, tokenizer) == ()


FORM = [(7,), (8,), (1, 2, 3), (1, 2, 3), (9,), (7,), (1, 2, 3), (5,)]


@pytest.mark.parametrize("said, most, expected", [
    ([], 10, FORM[:3]),
    ([7, 8, 1], 10, FORM[3:4]),                               # a second digit comes next
    ([7, 8, 1, 2, 9, 7, 3], 10, FORM[7:]),
    ([7, 8, 1, 2, 9, 7, 3, 5], 10, []),                       # nothing is behind the end
    # a number may have a digit fewer or more than the form
    ([7, 8, 1, 9], 10, FORM[5:7]),
    ([7, 8, 1, 2, 3], 10, FORM[4:7]),
    # a draft takes no more places than it may
    ([7, 8, 1, 2], 0, []), ([7, 8, 1, 2], 2, FORM[4:6]), ([7, 8, 1, 2], 3, FORM[4:7]),
    # nothing is drafted once the answer is no box
    ([7, 5, 1], 10, []), ([7, 8, 4], 10, [])])
def test_a_draft_reaches_to_the_next_choice_and_holds_all_of_it(said: list, most: int,
                                                               expected: list):
    """Or without it, where choices are not drafted."""
    assert list(draft(FORM, said, most, choices=True)) == expected
    alone = [allowed for allowed in expected if len(allowed) == 1]
    assert list(draft(FORM, said, most, choices=False)) == alone


# ----- the words stay the same --------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(mini: VLM) -> EncodedImage:
    return mini.encode_image(ROOT / "image.jpg")


IN_ALL_MODES = ("random", "prumerge", "fastv")   # one adds a token, one cuts in the decoder


@pytest.mark.parametrize("prune, mode", [
    (prune, mode) for prune in STRATEGIES for mode in MODES
    if mode == "gap" or prune in IN_ALL_MODES])
def test_drafting_says_what_the_lesson_says_in_every_mode_and_strategy(
        mini: VLM, shown: EncodedImage, prune: str, mode: str):
    for keep in ("35%", "60%"):
        question = (shown, "the man on the left", prune, keep, mode)
        drafted = mini.ground(*question)
        plain = mini.ground(*question, drafts=False)
        assert drafted.tokens == plain.tokens and drafted.kv_bytes == plain.kv_bytes
        assert drafted.box == plain.box and drafted.text == plain.text
        assert plain.timings["passes"] == len(plain.tokens) - 1
        if not nanogap.methods.in_decoder.prunes_there(prune):
            assert ground(mini, *question).tokens == drafted.tokens


def test_drafts_never_say_more_than_was_asked_for(mini: VLM, shown: EncodedImage):
    """And the cache has room for them, wherever the answer is cut off."""
    whole = mini.ground(shown, "the man on the left", mode="full").tokens
    for most in (*range(1, 26), 32):
        said = mini.ground(shown, "the man on the left", mode="full", max_new_tokens=most)
        assert said.tokens == whole[:most] and said.cut_off == (most < 25)


def test_numbers_that_are_not_finite_are_no_answer(model: VLM, picture, monkeypatch):
    monkeypatch.setattr(model.language_model, "logits", lambda hidden: hidden * torch.nan)
    with pytest.raises(NanogapError, match="numbers that are not finite"):
        model.ground(picture, "the man")


def test_a_picture_can_be_described(mini: VLM):
    result = mini.describe(ROOT / "image.jpg", "random", 72)
    assert result.text and result.position_ids[-1] == result.next_position - 1


# ----- where new tokens stand ---------------------------------------------------------------------


@pytest.fixture
def fed(mini: VLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """What every pass behind the prompt is given from here on: rows before it, position IDs."""
    passes: list[tuple[int, list[int]]] = []

    def heard(x: Tensor, position_ids: Tensor, part: Part) -> Tensor:
        passes.append((part.cache.lengths[0], position_ids.tolist()))
        return run(mini.language_model.model, x, position_ids, [part], part.size)

    monkeypatch.setattr(mini, "next_pass", heard)
    return passes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prune", ["random", "prumerge"])
def test_token_t_is_fed_at_next_position_plus_t(mini: VLM, shown: EncodedImage, fed: list,
                                                mode: str, prune: str):
    """Whatever the length of the cache, which under GAP is another number."""
    result = mini.ground(shown, "the man on the left", prune, 36, mode, drafts=False)
    P, A = mini.around_image(mini.prompt("the man on the left"))
    K = 144 if mode == "full" else 36 + (prune == "prumerge")
    rows, first = P + K + A, P + (K if MODES[mode][2] == "compact" else 144) + A
    assert result.next_position == first
    assert fed == [(rows + t, [first + t]) for t in range(len(result.tokens) - 1)]
    assert (first == rows) == (mode == "full" or MODES[mode][2] == "compact")


@pytest.mark.parametrize("mode", MODES)
def test_drafted_tokens_are_fed_at_their_own_places_in_four_passes(
        mini: VLM, shown: EncodedImage, fed: list, mode: str):
    """One place behind the other, and all alternatives at the last; rows stay dense."""
    result = mini.ground(shown, "the man on the left", "random", 36, mode)
    for row, position_ids in fed:
        start, alternatives = row - len(result.position_ids), position_ids.count(position_ids[-1])
        chain = len(position_ids) - alternatives + 1
        places = [*range(start, start + chain), *[start + chain - 1] * (alternatives - 1)]
        assert position_ids == [result.next_position + place for place in places]
    assert len(fed) == result.timings["passes"] == 4
    assert result.timings["new_tokens"] == len(result.tokens) == 25
