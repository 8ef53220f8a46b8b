"""Shikra and MiniGPT-v2 against transformers' parts: CLIP's or EVA's tower, and a LLaMA.

From stored numbers everywhere, and live where it is installed; the same tolerance as for LLaVA-1.5:
see test_reference.py.
"""

import json
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import nanogap
from nanogap.models import MODELS, VLM
from tests.models.test_reference import (
    Answer,
    assert_same,
    assert_same_answer,
    assert_stored,
    live,
    our_answer,
)
from tests.reference import make_minigpt, make_shikra
from tests.tiny import tokenizer_of, write_tensors

CASES = {   # as they are stored: MiniGPT-v2 with a position table of its size, and a smaller one
    "shikra": ("shikra", make_shikra, {}),
    "8 x 8 positions": ("minigpt_v2", make_minigpt, {"table": 8}),
    "4 x 4 positions": ("minigpt_v2", make_minigpt, {"table": 4}),
}
MODES = ["full", "gap", "shifted", "permuted"]


class Case(NamedTuple):
    model: VLM
    reference: ModuleType          # its numbers, and what its parts in transformers say
    state: dict[str, Tensor]       # under the names of `reference`
    stored: dict


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One of them, read from a checkpoint as `nanogap.convert` leaves it."""
    family, reference, table = CASES[request.param]
    folder, state = tmp_path_factory.mktemp(family), reference.tensors(**table)
    with torch.device("meta"):
        MODELS[family](reference.tiny_config()).write_config(folder, "float32")
    tokenizer_of(family).save(str(folder / "tokenizer.json"))
    write_tensors(folder / "model.safetensors", state)
    stored = json.loads(reference.OUTPUTS.read_text())[request.param]
    return Case(nanogap.load(folder, "cpu"), reference, state, stored)


def answer_in(case: Case, mode: str) -> Answer:
    """Logits (T, V) of the prompt in a mode, and the greedy words after it."""
    ask = case.reference
    keep = None if mode == "full" else ask.MODES["permuted"][0]               # in order of rank
    return our_answer(case.model, ask.PROMPT, ask.pixel_values(), keep, mode, ask.NEW_TOKENS,
                      ask.MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_logits_and_words_are_those_that_transformers_gave(case: Case, mode: str):
    assert_stored(answer_in(case, mode), case.reference.positions(mode), case.stored[mode])


@live
@pytest.mark.parametrize("mode", MODES)
def test_each_model_is_its_parts_put_together(case: Case, mode: str):
    """The original's forward pass: visual tokens in the place of the image."""
    ask = case.reference
    theirs = ask.their_answer(case.state, ask.pixel_values(), *ask.MODES[mode])
    assert_same_answer(answer_in(case, mode), theirs)


@live
@pytest.mark.parametrize("case", ["8 x 8 positions", "4 x 4 positions"], indirect=True)
def test_evas_tower_is_blip_2s_vision_model(case: Case):
    """EVA's keys have no bias: there, the middle third of one that is zero."""
    pixels = make_minigpt.pixel_values()
    hidden = case.model.vision_tower(pixels)[1][0]                            # (1 + 64, C)
    assert_same(hidden, make_minigpt.their_hidden(case.state, pixels))
