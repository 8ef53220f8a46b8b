"""Thousands of odd words, each answered by a value or by one line; draws are seeded."""

import random
import time
from pathlib import Path

import pytest

import nanogap
from nanogap import NanogapError
from nanogap.prompt import TWO_DECIMALS, parse_box


def test_any_answer_holds_a_box_within_the_square_or_none():
    draw = random.Random("box")
    pieces = ["[", "]", ", ", ",", " ", ".", "-", "0", "1", "9" * 400, "0.", ".5", "1e999", "nan",
              "٣", "½", "\0", "\ud800", "<0x0A>", "0" * 5000, "[0.1, 0.2, 0.3, 0.4]", "\n"]
    for _ in range(3000):
        corners = tuple(draw.choice([0, 0.5, 1, 1.01, 1e9, draw.random()]) for _ in range(4))
        words = "".join(draw.choices(pieces, k=draw.randrange(40)))
        text = draw.choice([TWO_DECIMALS.say(corners), words])
        for _ in range(draw.choice([0, 1, 3])):
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(pieces) + text[at + draw.choice([0, 1]):]
        x1, y1, x2, y2 = parse_box(text) or (0, 0, 1, 1)
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, text


@pytest.mark.parametrize("text", [
    "[" * 30_000, "[0" * 30_000, "[" + "0" * 30_000, "[0." + "0" * 30_000, "[" + " " * 30_000,
    "[0.1, 0.2, 0.3," + " 0" * 30_000])
def test_a_long_answer_without_a_box_is_read_once_and_not_again_from_every_place(text: str):
    begun = time.process_time()
    assert parse_box(text) is None
    assert time.process_time() - begun < 3


def test_any_expression_gives_a_prompt_with_one_image_token_or_one_line(whole: Path):
    model, draw = nanogap.load(whole, "cpu"), random.Random("prompt")
    pieces = ["the man", " ", "\n", "\0", "<image>", "<s>", "</s>", "<unk>", "{}", "{0}", "%s", "▁",
              "<0x0A>", "\ud800", "\u202e", "人", "👩‍👩‍👧", "e\u0301", "ASSISTANT:", "x" * 5000]
    for _ in range(300):
        words = "".join(draw.choices(pieces, k=draw.randrange(5)))
        try:
            assert model.prompt(words).tolist().count(model.config.image_token) == 1
        except NanogapError as error:
            assert "\n" not in str(error) and (not words.strip() or "\ud800" in words)
