"""The prompt that LLaVA was trained with, and the boxes that models say."""

import time

import pytest

from nanogap import NanogapError
from nanogap.llava import VICUNA
from nanogap.prompt import TWO_DECIMALS, encode, parse_box
from tests.tiny import IMAGE_TOKEN, tiny_tokenizer


def pieces(expression: str) -> list[str]:
    ids = VICUNA.encode(tiny_tokenizer(), VICUNA.question(expression), bos=1,
                        image_token=IMAGE_TOKEN)
    return [tiny_tokenizer().id_to_token(i) for i in ids]


def test_the_prompt_is_the_vicuna_template_with_the_rec_question():
    assert VICUNA.before == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: ")
    assert VICUNA.after.format(VICUNA.question("the man on the left")) == (
        "\nPlease provide the bounding box coordinate of the region this sentence describes: "
        "the man on the left. ASSISTANT:")


def test_one_image_token_stands_between_two_lone_spaces():
    """The text before ends in a space, that after is encoded on its own: "▁" on both sides."""
    said = pieces("the man on the left")
    at = said.index("<image>")
    assert said[0] == "<s>" and said[at - 2: at + 4] == [":", "▁", "<image>", "▁", "\n", "Please"]
    assert said[-4:] == ["▁left", ".", "▁ASSISTANT", ":"]


def test_spaces_around_an_expression_are_left_out():
    assert VICUNA.question("  the man\n") == VICUNA.question("the man")


@pytest.mark.parametrize("expression", [
    "</s>", "<s> the man", "the <image> on the left", "<unk><pad>",
    "猫", "человек слева", "🙂 on the left", "x" * 20_000])
def test_any_text_is_encoded_and_can_be_read_back_and_no_token_in_it_is_special(
        expression: str, monkeypatch):
    """As weights.read_tokenizer has it."""
    tokenizer, special = tiny_tokenizer(), ("<s>", "</s>", "<unk>", "<pad>", "<image>")
    monkeypatch.setattr(tokenizer, "encode_special_tokens", True)
    assert [p for p in pieces(expression) if p in special] == ["<s>", "<image>"]
    assert tokenizer.decode(encode(tokenizer, expression)) == expression


EMPTY = "the expression is empty; name a thing"


@pytest.mark.parametrize("expression, message", [
    ("", EMPTY), (" ", EMPTY), ("\n\t", EMPTY),
    (3, "an expression is a text, and this is of type int"),
    ("the \udcff man", "the expression is not valid Unicode")])
def test_what_names_nothing_or_is_no_text_is_rejected(expression: str, message: str):
    with pytest.raises(NanogapError, match=message):
        pieces(expression)


@pytest.mark.parametrize("text, box", [
    ("[0.12, 0.34, 0.56, 0.78]", (0.12, 0.34, 0.56, 0.78)),
    ("[0.12,0.34,0.56,0.78].", (0.12, 0.34, 0.56, 0.78)),
    ("The region is [ 0.1, 0.2, 0.3, 0.4 ], on the left.", (0.1, 0.2, 0.3, 0.4)),
    ("[0, 0, 1, 1]", (0.0, 0.0, 1.0, 1.0)),
    ("[.5, .25, 1., 1.00]", (0.5, 0.25, 1.0, 1.0)),
    ("[0.1, 0.2, 0.3, 0.4] [0.5, 0.6, 0.7, 0.8]", (0.1, 0.2, 0.3, 0.4)),
    ("[1] a man: [0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
])
def test_a_box_is_read_from_what_models_really_say(text: str, box: tuple[float, ...]):
    assert parse_box(text) == box


@pytest.mark.parametrize("text", [
    "", "no box", "[0.12, 0.34, 0.56", "[0.12, 0.34, 0.56]", "[0.1, 0.2, 0.3, 0.4, 0.5]",
    "0.1, 0.2, 0.3, 0.4",
    "[0.5, 0.2, 0.3, 0.4]", "[0.1, 0.4, 0.3, 0.4]", "[0.1, 0.2, 0.3, 1.4]", "[0.1, 0.2, 1.3, 0.4]",
    "[-0.1, 0.2, 0.3, 0.4]",
    f"[0.1, 0.2, 0.3, {'9' * 400}]", "[0.1, inf, 0.3, 0.4]", "[0.1, 0.2, 0.3, 1e9]",
    "[12, 34, 56, 78]", "[0.1 0.2 0.3 0.4]",
    "[٠.١, 0.2, 0.3, 0.4]", "[0.1.2, 0.2, 0.3, 0.4]", "[,,,]",
])
def test_what_is_no_box_in_the_square_is_rejected(text: str):
    assert parse_box(text) is None


@pytest.mark.parametrize("text", [
    "[" * 30_000, "[0" * 30_000, "[" + "0" * 30_000, "[" + " " * 30_000,
    "[0.1, 0.2, 0.3," + " 0" * 30_000])
def test_a_long_answer_without_a_box_is_read_once_and_not_again_from_every_place(text: str):
    begun = time.process_time()
    assert parse_box(text) is None
    assert time.process_time() - begun < 3


def test_a_box_is_written_with_two_decimals():
    assert TWO_DECIMALS.say((0.125, 0.3, 0.999, 1.0)) == "[0.12, 0.30, 1.00, 1.00]"
