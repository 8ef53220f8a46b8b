"""Packed weights: the same words, from a second copy of each matrix, used while it is true."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nanogap
import run
from nanogap import NanogapError
from nanogap.fast.packed import PackedLinear, pack
from nanogap.train.scenes import scene

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
MINI = WEIGHTS / "mini"
DRAWN = scene("packed", 0)
EXPRESSIONS = [expression for expression, _ in DRAWN.expressions]

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


@pytest.fixture
def linear() -> PackedLinear:
    """A layer (3 -> 5) that packs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5)).requires_grad_(False)
    pack(model)
    return model[0]


X = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]])


@torch.no_grad()
def test_it_is_the_same_product(linear):
    assert type(linear) is PackedLinear
    torch.testing.assert_close(linear(X), F.linear(X, linear.weight, linear.bias))


@torch.no_grad()
def test_the_product_is_that_of_the_packed_copy(linear):
    other = nn.Linear(3, 5)
    linear(X)                                                                 # it packs now
    linear.packed = torch.ops.mkldnn._reorder_linear_weight(other.weight)
    torch.testing.assert_close(linear(X), F.linear(X, other.weight, linear.bias))


@torch.no_grad()
@pytest.mark.parametrize("change", [
    lambda linear: linear.weight.mul_(2),                                     # in place
    lambda linear: setattr(linear, "weight", nn.Parameter(-linear.weight)),   # another one
    lambda linear: linear.bfloat16(),                                         # converted
    lambda linear: linear.double(),                                           # to what no CPU packs
])
def test_changed_weights_count_at_once(linear, change):
    linear(X)
    change(linear)
    x = X.to(linear.weight.dtype)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))
    assert (linear.packed is None) == (x.dtype == torch.float64)              # packed again


@torch.no_grad()
def test_a_weight_in_the_memory_of_an_earlier_one_is_not_taken_for_it():
    """One matrix after the other, each freed before the next is made."""
    torch.manual_seed(0)
    linear = PackedLinear(nn.Linear(64, 64).requires_grad_(False))
    x = torch.eye(64)
    for _ in range(20):
        linear.weight = None
        linear.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))


def test_gradients_go_through_the_plain_matrix(linear):
    with torch.no_grad():
        linear(X)
    linear.requires_grad_(True)
    linear(X).sum().backward()
    torch.testing.assert_close(linear.weight.grad, X.sum(0).expand(5, 3))


@torch.no_grad()
def test_copies_and_files_hold_the_plain_matrix_alone(linear):
    before = linear(X)
    twin = copy.deepcopy(linear)
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert other.packed is None
        torch.testing.assert_close(other(X), before)
    assert linear.packed is not None and list(linear.state_dict()) == ["weight", "bias"]


@torch.no_grad()
def test_a_matrix_that_is_never_multiplied_by_is_not_packed(linear):
    """As that of EVA's queries, keys and values, which are given a bias in the product."""
    assert linear.packed is None and linear(X).shape == (2, 5) and linear.packed is not None


# ----- a whole model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mini", "mini-next", "mini-shikra", "mini-minigpt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_model_says_the_same_words(name, dtype):
    if dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("a CPU without bfloat16")
    plain, packed = (nanogap.load(WEIGHTS / name, "cpu", dtype, packed=packed)
                     for packed in (False, True))
    assert {type(m) for m in packed.modules() if isinstance(m, nn.Linear)} == {PackedLinear}
    for mode in ("full", "gap"):
        said = [[result.text for result in model.ground_all(DRAWN.image, EXPRESSIONS, mode=mode)]
                for model in (plain, packed)]
        assert said[0] == said[1]


def test_the_command_says_the_same(tmp_path, capsys):
    DRAWN.image.save(tmp_path / "scene.png")
    said = []
    for flags in ([], ["--pack"]):
        assert run.main([str(tmp_path / "scene.png"), EXPRESSIONS[0], "--weights", str(MINI),
                         "--out", str(tmp_path / "answer.png"), "--device", "cpu", *flags]) == 0
        table = capsys.readouterr().out
        said.append([line.split("[")[1:] for line in table.split("\n") if "[" in line])
    assert said[0] == said[1] != []


def test_what_cannot_be_packed_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(NanogapError, match="torch.float32 on meta cannot be packed here: leave"):
        pack(model)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(NanogapError, match="weights in torch.float64 on cpu cannot be packed here"):
        pack(model)
    assert type(model[0]) is nn.Linear                                        # nor half of it
