"""Packed weights: one copy in memory, faster on a CPU, and plain for whoever looks at them."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nanogap
from nanogap.fast.packed import LARGE, PackedLinear, QuickLinear, can_pack, pack

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16)
          if can_pack(torch.ones(1, dtype=dtype))]
pytestmark = pytest.mark.skipif(not DTYPES, reason="torch packs nothing on this processor")


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A large matrix with a bias, and a small one."""
    torch.manual_seed(0)
    side = int((LARGE / 2) ** 0.5) + 64
    return nn.Sequential(nn.Linear(side, side), nn.Linear(side, 8)).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 30])
def test_large_matrices_alone_are_packed_and_products_stay(dtype: torch.dtype, rows: int):
    """The plain form of what is packed is given back."""
    plain = layers(dtype)
    packed = pack(deepcopy(plain))
    assert type(packed[0]) is PackedLinear and type(packed[1]) is QuickLinear
    assert packed[0].__dict__["_parameters"]["weight"] is None
    x = torch.randn(rows, plain[0].in_features).to(dtype)
    close = 1e-4 if dtype == torch.float32 else 0.1
    assert torch.allclose(packed(x).float(), plain(x).float(), atol=close)


LOOKS: dict[str, Callable[[nn.Module], Tensor]] = {
    "weight": lambda m: m[0].weight,
    "state_dict": lambda m: m.state_dict()["0.weight"],
    "parameters": lambda m: next(m.parameters()),
    "to": lambda m: m.to(torch.float64)[0].weight.float(),
    "copy": lambda m: deepcopy(m)[0].weight,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whoever_looks_at_a_weight_gets_it_plain_bit_for_bit(look: str, dtype: torch.dtype):
    found = LOOKS[look](pack(layers(dtype)))
    assert torch.equal(found.to(dtype), layers(dtype)[0].weight)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: m[0].weight.mul_(2),
    "through data": lambda m: m[0].weight.data.mul_(2),
    "another": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight * 2, False)),
    "loaded": lambda m: m.load_state_dict({k: v * (2 if k == "0.weight" else 1)
                                           for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_packed_is_never_stale(change: str, inference: bool):
    model = layers()
    x = torch.randn(3, model[0].in_features)
    expected = F.linear(x, 2 * model[0].weight, model[0].bias)
    pack(model)
    with torch.inference_mode(inference):
        model[0](x)
        CHANGES[change](model)
        assert torch.allclose(model[0](x), expected, atol=1e-3)


def test_half_precision_and_training_go_on_with_plain_matrices():
    model = pack(layers())
    assert model.half()[0].weight.dtype == torch.float16
    model = pack(layers()).requires_grad_(True)
    model(torch.randn(2, model[0].in_features)).sum().backward()
    assert model[0].weight.grad is not None and type(model[0]) is QuickLinear


def test_matrices_that_are_shared_stay_as_they_are():
    model = layers()
    model[1].weight = model[0].weight
    assert type(pack(model)[0]) is QuickLinear and model[1].weight is model[0].weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_says_the_same_words(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """The mini's matrices are small: here all of them are packed."""
    plain = nanogap.load("mini", "cpu", dtype, pack=False)
    monkeypatch.setattr("nanogap.fast.packed.LARGE", 0)
    packed = nanogap.load("mini", "cpu", dtype)
    assert any(type(module) is PackedLinear for module in packed.modules())
    for mode in ("full", "shifted", "gap"):
        said = [model.ground(ROOT / "image.jpg", "the man on the left", "random", mode=mode).text
                for model in (plain, packed)]
        assert said[0] == said[1]
