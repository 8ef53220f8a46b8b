"""Several tokens to a pass: the words stay those of plain greedy decoding, whatever is drafted."""

import random
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

import nanogap
from nanogap.fast.decode import decode_drafted
from nanogap.gap import MODES, lay_out
from nanogap.ground import EncodedImage
from nanogap.methods.in_decoder import Prefilled, prefill
from nanogap.models.llava import Llava
from nanogap.prompt import TWO_DECIMALS, Draft, Form, draft, encode, format_box
from nanogap.prune import STRATEGIES, Kept, in_decoder
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mini() -> Llava:
    return nanogap.load(ROOT / "weights/mini", device="cpu")


# ----- what the format foretells ------------------------------------------------------------------


def test_of_a_box_everything_but_eight_digits_is_foretold():
    pieces = ["".join(map(tiny_tokenizer().id_to_token, allowed))
              for allowed in TWO_DECIMALS.foretell(tiny_tokenizer())]
    digits = ["0123456789"] * 2
    assert pieces == ["▁[", "0", ".", *digits, *[",", "▁", "0", ".", *digits] * 3, "]"]


@pytest.mark.parametrize("pieces", [r"\d\d|.", r"0\.\d\d|."])
def test_of_a_tokenizer_that_does_not_split_digits_nothing_is_foretold(pieces: str):
    """One token for "12", or for "0.12"."""
    texts = [format_box((share / 100,) * 4) for share in range(100)]
    vocabulary = sorted({piece for text in texts for piece in re.findall(pieces, text)})
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="["))
    tokenizer.pre_tokenizer = Split(Regex(pieces), "isolated")
    assert len(encode(tokenizer, texts[12])) in (12, 20)
    assert TWO_DECIMALS.foretell(tokenizer) == ()


FORM = [(7,), (8,), (1, 2, 3), (1, 2, 3), (9,), (7,), (1, 2, 3), (5,)]


def test_a_draft_reaches_to_the_next_choice_and_holds_all_of_it():
    assert draft(FORM, [], 10) == Draft(chain=(7, 8), choice=(1, 2, 3))
    assert draft(FORM, [7, 8, 1], 10) == Draft((), (1, 2, 3))            # a second digit comes next
    assert draft(FORM, [7, 8, 1, 2], 10) == Draft((9, 7), (1, 2, 3))
    assert draft(FORM, [7, 8, 1, 2, 9, 7, 3], 10) == Draft((5,))
    assert draft(FORM, [7, 8, 1, 2, 9, 7, 3, 5], 10) == Draft()          # nothing is behind the end


def test_a_draft_takes_no_more_places_than_it_may():
    drafts = [draft(FORM, [7, 8, 1, 2], most) for most in range(4)]
    assert drafts == [Draft(), Draft((9,)), Draft((9, 7)), Draft((9, 7), (1, 2, 3))]


def test_nothing_is_drafted_once_the_answer_is_no_box():
    assert draft(FORM, [7, 5, 1], 10) == draft(FORM, [7, 8, 4], 10) == Draft()


def test_the_tokens_of_a_choice_stand_at_one_place():
    assert Draft((7, 8), (1, 2, 3)).places(40) == [40, 41, 42, 42, 42]
    assert Draft((), (1, 2, 3)).places(40) == [40, 40, 40] and Draft((7,)).places(40) == [40]


# ----- the words stay the same --------------------------------------------------------------------


def say(model: Llava, image: EncodedImage, form: Form, most: int) -> tuple[list[int], int]:
    """Tokens, and passes of the decoder, for an answer of which this form is foretold."""
    input_ids, kept = model.prompt("the man"), Kept(torch.tensor([9, 2, 14]))
    P, A = model.around_image(input_ids)
    layout = lay_out(kept.keep, P, 16, A, "gap")
    x = model.embed(input_ids, image, kept, layout.order)
    room = most + max(map(len, form), default=0)
    prompt = prefill(model.language_model, x, layout, drafted=draft(form, [], most - 1), room=room)
    said, passes = [], []
    for token in decode_drafted(prompt, most, model.end_tokens, form):
        said.append(token)
        passes.append(prompt.passes)
    last_pass = passes.count(passes[-1])
    # the last token has no row, and a chosen one before it has none yet
    without_row = 1 + (last_pass > 1 and len(form[len(said) - 2]) > 1)
    rows = len(layout.position_ids) + len(said) - without_row
    assert prompt.cache.lengths == [rows] * len(prompt.cache.lengths)
    return said, prompt.passes


def test_any_form_right_or_wrong_leaves_the_words_as_they_are(model: Llava):
    """Forms made of the true answer: with choices that hold it or not, and with wrong tokens."""
    image, rng = model.encode_image(ROOT / "image.jpg"), random.Random(0)
    plain, passes = say(model, image, [], 20)
    assert passes == 19

    def allowed(token: int, right: float) -> tuple[int, ...]:
        others = rng.choices(plain, k=rng.choice([0, 0, 3, 5]))    # some are said elsewhere
        return tuple({*others, token if rng.random() < right else rng.choice(plain)})

    fewest = 20
    for _ in range(100):
        right = max(rng.random(), rng.random())
        form = [allowed(token, right) for token in plain[:rng.randrange(21)]]
        said, passes = say(model, image, form, 20)
        assert said == plain and passes <= 19
        fewest = min(fewest, passes)
    assert fewest < 8                                             # and some drafts were believed
    whole_chain = [(token,) for token in plain[:19]]
    assert say(model, image, whole_chain, 20) == (plain, 0)       # all read with the prompt


@pytest.fixture(scope="module")
def shown(mini: Llava) -> EncodedImage:
    return mini.encode_image(ROOT / "image.jpg")


MODES_TOO = ("random", "prumerge", "sparsevlm")   # that are asked in all: one of them adds a token,
                                                  # and one cuts in the decoder and adds some there


def asked(names: Iterable[str]) -> list[tuple[str, str]]:
    """Strategies in mode gap, and a few of them in every mode."""
    return [(name, mode) for name in names for mode in MODES
            if mode == "gap" or name in MODES_TOO]


def budget(prune: str, keep: int) -> dict[str, int]:
    """So many tokens in every layer; or behind the second of four layers, 144 before it."""
    if prune == "fastv":
        return {"keep": (144 + keep) // 2, "layer": 2}
    return {"keep": max(keep, 45) if in_decoder(prune) else keep}


@pytest.mark.parametrize("prune, mode", asked(STRATEGIES))
def test_drafting_says_the_same_in_every_mode_and_strategy(mini: Llava, shown: EncodedImage,
                                                           prune: str, mode: str):
    for keep in (12, 36):
        question = (shown, "the man on the left", prune)
        options = {"mode": mode, **budget(prune, keep)}
        drafted = mini.ground(*question, **options)
        plain = mini.ground(*question, **options, drafts=False)
        assert drafted.tokens == plain.tokens and drafted.kv_bytes == plain.kv_bytes
        assert drafted.box == plain.box and drafted.text == plain.text
        assert plain.timings["passes"] == len(plain.tokens) - 1


def test_a_box_takes_four_passes_where_one_token_each_takes_24(mini: Llava, shown: EncodedImage):
    for prune, passes in (("random", 4), ("fastv", 5)):    # FastV drafts nothing behind the prompt
        drafted = mini.ground(shown, "the man on the left", prune, **budget(prune, 72))
        assert drafted.timings["new_tokens"] == 25 and drafted.timings["passes"] == passes
    plain = mini.ground(shown, "the man on the left", mode="full", drafts=False)
    assert plain.timings["passes"] == 24


@pytest.mark.parametrize("most", [*range(1, 26), 32])
@pytest.mark.parametrize("options", [{"mode": "full"}, {"prune": "fastv", "keep": 108, "layer": 2}],
                         ids=["full", "fastv"])
def test_drafts_never_say_more_than_was_asked_for(mini: Llava, shown: EncodedImage, most: int,
                                                  options: dict):
    """And the cache has room for them, wherever the answer is cut off."""
    whole = mini.ground(shown, "the man on the left", **options).tokens
    said = mini.ground(shown, "the man on the left", **options, max_new_tokens=most).tokens
    assert said == whole[:most]


# ----- where new tokens stand ---------------------------------------------------------------------


Fed = list[tuple[list[int], list[int], int]]     # tokens, position IDs, alternatives of a pass


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> Fed:
    """What every pass behind the prompt is given from here on."""
    passes: Fed = []
    feed = Prefilled.feed

    def heard(self, tokens, position_ids, alternatives=1):
        passes.append((list(tokens), list(position_ids), alternatives))
        return feed(self, tokens, position_ids, alternatives)

    monkeypatch.setattr(Prefilled, "feed", heard)
    return passes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prune", ["random", "prumerge", "fastv"])
def test_token_t_is_fed_at_next_position_plus_t(mini: Llava, shown: EncodedImage, fed: Fed,
                                                mode: str, prune: str):
    """Whatever the length of the cache, which under GAP is another number."""
    result = mini.ground(shown, "the man on the left", prune, mode=mode, drafts=False,
                         **budget(prune, 36))
    P, A = mini.around_image(mini.prompt("the man on the left"))
    compact = MODES[mode][2] == "compact"
    K = 144 if mode == "full" else 36 + (prune == "prumerge")
    assert result.next_position == P + (K if compact else 144) + A
    first = P + 144 + A if prune == "fastv" else result.next_position
    assert fed == [([token], [first + t], 1) for t, token in enumerate(result.tokens[:-1])]
    rows = P + K + A
    assert (first == rows) == (mode == "full" or compact and prune != "fastv")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prune", ["random", "fastv"])
def test_drafted_tokens_are_fed_at_their_own_places_too(mini: Llava, shown: EncodedImage, fed: Fed,
                                                        mode: str, prune: str):
    """One place behind the other, and all alternatives at the last."""
    result = mini.ground(shown, "the man on the left", prune, mode=mode, **budget(prune, 36))
    P, A = mini.around_image(mini.prompt("the man on the left"))
    first = P + 144 + A if prune == "fastv" else result.next_position
    starts = []
    for tokens, position_ids, alternatives in fed:
        places = [position - first for position in position_ids]
        chain = places[:len(places) - alternatives + 1]
        assert chain == list(range(chain[0], chain[0] + len(chain)))
        assert places[len(chain) - 1:] == [chain[-1]] * alternatives
        assert tokens[0] == result.tokens[chain[0]]            # the first of them was said before
        starts.append(chain[0])
    assert starts and starts == sorted(set(starts))


# ----- what questions share -----------------------------------------------------------------------


@pytest.mark.parametrize("prune", STRATEGIES)
def test_questions_that_share_an_image_get_the_answers_that_they_get_alone(
        mini: Llava, shown: EncodedImage, prune: str):
    shared = mini.encode_image(ROOT / "image.jpg", share=True)
    for _, mode in asked([prune]):
        for expression in ("the man on the left", "the biggest man", "the man on the right"):
            question = (expression, prune)
            options = {"mode": mode, **budget(prune, 36)}
            one = mini.ground(shown, *question, **options)
            other = mini.ground(shared, *question, **options)
            assert one.tokens == other.tokens and torch.equal(one.position_ids, other.position_ids)


def test_the_image_is_read_once_for_all_questions_about_it(mini: Llava):
    """Rows that the decoder is fed: [system, image] once, then the words of each question."""
    image, rows = mini.encode_image(ROOT / "image.jpg", share=True), []
    hook = mini.language_model.model.layers[0].register_forward_hook(
        lambda layer, given, out: rows.append(given[0].shape[1]))
    for expression in ("the man", "the woman"):
        mini.ground(image, expression, "random", 36, "gap", max_new_tokens=1)
    hook.remove()
    P, A = mini.around_image(mini.prompt("the man"))
    _, other = mini.around_image(mini.prompt("the woman"))
    assert rows == [P + 36, A, other]


def test_a_picture_can_be_described(mini: Llava):
    result = mini.describe(ROOT / "image.jpg", "random", 72)
    assert result.text and result.position_ids[-1] == result.next_position - 1
