"""Thousands of odd words and budgets, each answered by a value or by one line.

In:  words and indices; draws are seeded, so a failure comes again.
Out: no traceback, no second of computing, no gigabyte.  What was found this way has its own test.
"""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import nanogap
from nanogap import NanogapError
from nanogap.gap import MODES
from nanogap.models import VLM as Llava
from nanogap.prompt import TWO_DECIMALS, parse_box

PICTURE = Image.new("RGB", (40, 30), "orange")


def answered(ask: Callable, given: object) -> str:
    """"value", or "error" for the project's own on one line; all else fails and says on what."""
    start, kind = time.process_time(), "value"
    try:
        ask()
    except NanogapError as error:
        kind = "error"
        assert "\n" not in str(error) and len(str(error)) < 700, repr(given)[:2000]
    except Exception as error:
        raise AssertionError(f"{error!r:.200} came of {given!r:.2000}") from error
    assert time.process_time() - start < 3, f"slow: {given!r:.2000}"
    return kind


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
        assert answered(partial(parse_box, text), text) == "value"
        x1, y1, x2, y2 = parse_box(text) or (0, 0, 1, 1)
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, text


@pytest.mark.parametrize("text", [
    "[" * 30_000, "[0" * 30_000, "[" + "0" * 30_000, "[0." + "0" * 30_000, "[" + " " * 30_000,
    "[0.1, 0.2, 0.3," + " 0" * 30_000])
def test_a_long_answer_without_a_box_is_read_once_and_not_again_from_every_place(text: str):
    assert answered(lambda: parse_box(text), text) == "value" and parse_box(text) is None


@pytest.fixture(scope="module")
def model(whole: Path) -> Llava:
    return nanogap.load(whole, "cpu")


def test_any_expression_gives_a_prompt_with_one_image_token_or_one_line(model: Llava):
    draw = random.Random("prompt")
    pieces = ["the man", " ", "\n", "\0", "<image>", "<s>", "</s>", "<unk>", "{}", "{0}", "%s", "▁",
              "<0x0A>", "\ud800", "\u202e", "人", "👩‍👩‍👧", "e\u0301", "ASSISTANT:", "x" * 5000]
    for _ in range(300):
        words = "".join(draw.choices(pieces, k=draw.randrange(5)))
        if answered(partial(model.prompt, words), words) == "value":
            assert model.prompt(words).tolist().count(model.config.image_token) == 1
        else:
            assert not words.strip() or "\ud800" in words


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "full"])
@pytest.mark.parametrize("keep", [
    None, 0, -1, 17, 2 ** 63, True, 1.5, float("nan"), {},
    "", "0", "17", "0%", "101%", "half", "1.5", "-4", "auto",
    torch.tensor([16]), torch.tensor([-1]), torch.tensor([1, 1]), torch.tensor([[1]]),
    torch.tensor(3)], ids=str)
def test_a_budget_or_indices_that_cannot_be_fed_are_one_line(
        keep: object, mode: str, model: Llava):
    assert answered(partial(model.ground, PICTURE, "x", "random", keep, mode), keep) == "error"
