"""Several tokens to a pass: the words stay those of plain greedy decoding, whatever is drafted."""

import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

import nanogap
from nanogap.gap import MODES
from nanogap.decode import Draft, decode, draft, template
from nanogap.models.llava import Llava
from nanogap.prompt import encode, format_box
from nanogap.prune import STRATEGIES
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def mini() -> Llava:
    return nanogap.load(ROOT / "weights/mini", device="cpu")


# ----- what the format foretells ------------------------------------------------------------------


def test_of_a_box_everything_but_eight_digits_is_foretold():
    pieces = ["".join(map(tiny_tokenizer().id_to_token, allowed)) for allowed in template(tiny_tokenizer())]
    digits = ["0123456789"] * 2
    assert pieces == ["▁[", "0", ".", *digits, *[",", "▁", "0", ".", *digits] * 3, "]"]


@pytest.mark.parametrize("pieces", [r"\d\d|.", r"0\.\d\d|."])
def test_a_tokenizer_that_does_not_split_digits_has_no_template(pieces: str):
    """One token for "12", or for "0.12"."""
    texts = [format_box((share / 100,) * 4) for share in range(100)]
    vocabulary = sorted({piece for text in texts for piece in re.findall(pieces, text)})
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="["))
    tokenizer.pre_tokenizer = Split(Regex(pieces), "isolated")
    assert len(encode(tokenizer, texts[12])) in (12, 20) and template(tokenizer) == ()


SHAPE = [(7,), (8,), (1, 2, 3), (1, 2, 3), (9,), (7,), (1, 2, 3), (5,)]


def test_a_draft_reaches_to_the_next_choice_and_holds_all_of_it():
    assert draft(SHAPE, [], 10) == Draft(chain=(7, 8), choice=(1, 2, 3))
    assert draft(SHAPE, [7, 8, 1], 10) == Draft((), (1, 2, 3))                # a second digit comes next
    assert draft(SHAPE, [7, 8, 1, 2], 10) == Draft((9, 7), (1, 2, 3))
    assert draft(SHAPE, [7, 8, 1, 2, 9, 7, 3], 10) == Draft((5,))
    assert draft(SHAPE, [7, 8, 1, 2, 9, 7, 3, 5], 10) == Draft()              # nothing is behind the end


def test_a_draft_takes_no_more_places_than_it_may():
    drafts = [draft(SHAPE, [7, 8, 1, 2], most) for most in range(4)]
    assert drafts == [Draft(), Draft((9,)), Draft((9, 7)), Draft((9, 7), (1, 2, 3))]


def test_nothing_is_drafted_once_the_answer_is_no_box():
    assert draft(SHAPE, [7, 5, 1], 10) == draft(SHAPE, [7, 8, 4], 10) == Draft()


def test_the_tokens_of_a_choice_stand_at_one_place():
    assert Draft((7, 8), (1, 2, 3)).places(40) == [40, 41, 42, 42, 42]
    assert Draft((), (1, 2, 3)).places(40) == [40, 40, 40] and Draft((7,)).places(40) == [40]


# ----- the words stay the same --------------------------------------------------------------------


def say(model: Llava, look: nanogap.models.llava.Look, shape: list[tuple[int, ...]],
        most: int) -> tuple[list[int], int]:
    """Tokens, and passes of the decoder, for an answer of which this shape is foretold."""
    fed = model.sequence(model.prompt("the man"), look.seen.features,
                         nanogap.prune.Kept(torch.tensor([9, 2, 14])), "gap")
    drafted = draft(shape, [], most - 1)
    behind = model.language_model.model.embed_tokens(torch.tensor(drafted.tokens).long())
    ids = torch.cat([fed.position_ids, fed.next_position + torch.tensor(drafted.places(0)).long()])
    logits, cache = model.prefill(torch.cat([fed.embeddings, behind[None]], 1), ids, most + 5,
                                  1 + len(drafted.tokens), siblings=drafted.siblings)
    passes = list(decode(model.language_model, logits, cache, fed.next_position, most,
                         model.config.eos_token, shape, drafted))
    said = [token for new in passes for token in new]
    without_row = 1 + (len(passes[-1]) > 1 and len(shape[len(said) - 2]) > 1)   # a chosen one has none yet
    assert cache.lengths == [len(fed.position_ids) + len(said) - without_row] * len(cache.lengths)
    return said, len(passes) - 1


def test_any_template_right_or_wrong_leaves_the_words_as_they_are(model: Llava):
    """Templates made of the true answer: with choices that hold it or not, and with wrong tokens."""
    look, rng = model.look(ROOT / "image.jpg"), random.Random(0)
    plain, passes = say(model, look, [], 20)
    assert passes == 19

    def allowed(token: int, right: float) -> tuple[int, ...]:
        others = rng.choices(plain, k=rng.choice([0, 0, 3, 5]))    # some of which it will say elsewhere
        return tuple({*others, token if rng.random() < right else rng.choice(plain)})

    fewest = 20
    for _ in range(100):
        right = max(rng.random(), rng.random())
        said, passes = say(model, look, [allowed(token, right) for token in plain[:rng.randrange(21)]], 20)
        assert said == plain and passes <= 19
        fewest = min(fewest, passes)
    assert fewest < 8                                             # and some drafts were believed
    assert say(model, look, [(token,) for token in plain[:19]], 20) == (plain, 0)   # all read with the prompt


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prune", ["random", "fastv"])
def test_drafting_says_the_same_in_every_mode(mini: Llava, mode: str, prune: str):
    look = mini.look(ROOT / "image.jpg")
    drafted = mini.ground(look, "the man on the left", prune, 36, mode)
    plain = mini.ground(look, "the man on the left", prune, 36, mode, drafts=False)
    assert drafted.tokens == plain.tokens and drafted.kv_bytes == plain.kv_bytes
    assert plain.timings["passes"] == len(plain.tokens) - 1


def test_a_box_takes_four_passes_where_one_token_each_takes_24(mini: Llava):
    look = mini.look(ROOT / "image.jpg")
    for prune, passes in (("random", 4), ("fastv", 5)):            # FastV drafts nothing behind the prompt
        drafted = mini.ground(look, "the man on the left", prune, 72, "gap")
        assert drafted.timings["new_tokens"] == 25 and drafted.timings["passes"] == passes
    assert mini.ground(look, "the man on the left", mode="full", drafts=False).timings["passes"] == 24


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 25])
def test_drafts_never_say_more_than_was_asked_for(mini: Llava, most: int):
    look = mini.look(ROOT / "image.jpg")
    whole = mini.ground(look, "the man on the left", mode="full").tokens
    assert mini.ground(look, "the man on the left", mode="full", max_new_tokens=most).tokens == whole[:most]


# ----- what questions share -----------------------------------------------------------------------


@pytest.mark.parametrize("prune", STRATEGIES)
def test_questions_that_share_an_image_get_the_answers_that_they_get_alone(mini: Llava, prune: str):
    alone, shared = mini.look(ROOT / "image.jpg"), mini.look(ROOT / "image.jpg", share=True)
    for mode in MODES:
        for expression in ("the man on the left", "the biggest man", "the man on the right"):
            one = mini.ground(alone, expression, prune, 36, mode)
            other = mini.ground(shared, expression, prune, 36, mode)
            assert one.tokens == other.tokens and torch.equal(one.position_ids, other.position_ids)


def test_the_image_is_read_once_for_all_questions_about_it(mini: Llava):
    """Rows that the decoder is fed: [system, image] once, then the words of each question."""
    look, fed = mini.look(ROOT / "image.jpg", share=True), []
    hook = mini.language_model.model.layers[0].register_forward_hook(
        lambda layer, given, out: fed.append(given[0].shape[1]))
    for expression in ("the man", "the woman"):
        mini.ground(look, expression, "random", 36, "gap", max_new_tokens=1)
    hook.remove()
    P, A = mini.around_image(mini.prompt("the man"))
    _, other = mini.around_image(mini.prompt("the woman"))
    assert fed == [P + 36, A, other]


def test_a_picture_can_be_described(mini: Llava):
    result = mini.describe(ROOT / "image.jpg", "random", 72)
    assert result.text and result.position_ids[-1] == result.next_position - 1
