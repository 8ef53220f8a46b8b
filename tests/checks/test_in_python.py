"""What a program may do with a model that `nanogap.load` gave it."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image

import nanogap
from nanogap.prune import STRATEGIES

MINI = Path(__file__).resolve().parents[2] / "weights" / "mini"
PICTURE = Image.radial_gradient("L").resize((90, 60))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_converted_answers_with_every_strategy(dtype: torch.dtype):
    """The text guide goes with it, to float64 and back as well."""
    model = nanogap.load(MINI, "cpu")
    before = deepcopy(model)
    model.to(dtype)
    assert model.dtype == model.text_guide.text_projection.weight.dtype == dtype
    for name in STRATEGIES:
        model.ground(PICTURE, "the red car", name, 100, max_new_tokens=2)
    if dtype == torch.float64:
        model.float()
        answers = [one.ground(PICTURE, "the red car", "trim", 40, max_new_tokens=9).tokens
                   for one in (before, model)]
        assert answers[0] == answers[1]
