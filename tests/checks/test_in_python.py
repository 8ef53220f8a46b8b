"""What a program may do with `nanogap.load` and its model: the right answer, or one line.

In:  arguments of every type, and a model with CLIP's text tower in other precisions.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image

import nanogap
from nanogap import NanogapError
from nanogap.models import VLM
from nanogap.prune import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]
PICTURE = Image.radial_gradient("L").resize((90, 60))
SHIPPED = ROOT / "weights" / "mini"


@pytest.fixture(scope="module")
def shipped() -> VLM:
    """It has a text tower beside it."""
    return nanogap.load(SHIPPED, "cpu")


def refused(ask: Callable[[], object]) -> str:
    """The one line that it ends in."""
    with pytest.raises(NanogapError) as caught:
        ask()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


# ----- arguments of every type --------------------------------------------------------------------


class Nothing:
    """Of no type that anybody asks for."""


OTHERS = [None, 1, True, 1.5, float("nan"), 1j, b"x", bytearray(9), [], {}, (), set(), [1, 2],
          torch.tensor(1), torch.zeros(3), torch.zeros(3, 8, 8), object(), Nothing(), len, "\0",
          "", "no such thing", 10 ** 400, -10 ** 400, 2 ** 63, -1, 0, Path("no such path"), SHIPPED]


@pytest.mark.parametrize("load", [
    lambda other: nanogap.load(other), lambda other: nanogap.load(SHIPPED, clip=other),
    lambda other: nanogap.load(SHIPPED, device=other),
    lambda other: nanogap.load(SHIPPED, dtype=other)], ids=["folder", "clip", "device", "dtype"])
def test_what_names_no_checkpoint_device_or_dtype_is_one_line(load: Callable):
    for other in [*OTHERS, "x" * 5000, "\ud800"]:
        if other is not None and other is not SHIPPED:
            refused(lambda other=other: load(other))


# ----- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_converted_answers_with_every_strategy(dtype: torch.dtype, shipped: VLM):
    """The text guide goes with it, to float64 and back as well."""
    model = deepcopy(shipped)
    for method in (lambda: model.to(dtype),
                   {torch.float16: model.half, torch.bfloat16: model.bfloat16,
                    torch.float64: model.double}[dtype]):
        method()
        assert model.dtype == model.text_guide.text_projection.weight.dtype == dtype
        for name in STRATEGIES:
            model.ground(PICTURE, "the red car", name, 100, max_new_tokens=2)
        model.float()
    assert (model.ground(PICTURE, "the red car", "trim", 40, max_new_tokens=9).tokens ==
            shipped.ground(PICTURE, "the red car", "trim", 40, max_new_tokens=9).tokens) or (
                dtype != torch.float64)
