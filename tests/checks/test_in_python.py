"""What a program may do between loading a model and asking it: the right answer, or one line.

In:  a tiny model with CLIP's text tower, arguments of every type, and settings of torch's.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import nanogap
from nanogap import NanogapError
from nanogap.models import MODELS, VLM
from nanogap.prune import STRATEGIES
from tests.tiny import tiny_model

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
IN_ORDER: dict[str, tuple] = {       # argument -> what of these it takes
    "image": (), "expression": ("\0", "no such thing"), "prune": (), "keep": (), "mode": (),
    "seed": (1, -1, 0), "layer": (None, 1), "max_new_tokens": (1,)}


@pytest.mark.parametrize("argument", IN_ORDER)
def test_each_argument_of_another_type_is_one_line(argument: str, model: VLM):
    """The error shows no array whole."""
    good = {"image": PICTURE, "expression": "x", "prune": "fastv", "keep": 12, "mode": "gap",
            "seed": 0, "layer": None, "max_new_tokens": 1}
    takes = IN_ORDER[argument]
    for other in OTHERS:
        if any(type(other) is type(one) and other == one for one in takes):
            model.ground(**(good | {argument: other}))
        else:
            refused(lambda other=other: model.ground(**(good | {argument: other})))


@pytest.mark.parametrize("argument", ["image", "expressions", "prune", "mode", "seed",
                                      "max_new_tokens"])
def test_so_is_each_argument_of_many_questions(argument: str, model: VLM):
    good = {"image": PICTURE, "expressions": ["x", "y"], "prune": "random", "keep": 4,
            "mode": "gap", "seed": 0, "layer": None, "max_new_tokens": 1}
    takes = IN_ORDER.get(argument, ([], (), {}, set()))
    for other in [*OTHERS, [None], ["x", 5], [""], [[]]]:
        if not any(type(other) is type(one) and other == one for one in takes):
            refused(lambda other=other: model.ground_all(**(good | {argument: other})))


@pytest.mark.parametrize("load", [
    lambda other: nanogap.load(other), lambda other: nanogap.load(SHIPPED, clip=other),
    lambda other: nanogap.load(SHIPPED, device=other),
    lambda other: nanogap.load(SHIPPED, dtype=other)], ids=["folder", "clip", "device", "dtype"])
def test_what_names_no_checkpoint_device_or_dtype_is_one_line(load: Callable):
    for other in [*OTHERS, "x" * 5000, "\ud800"]:
        if other is not None and other is not SHIPPED:
            refused(lambda other=other: load(other))


@pytest.mark.parametrize("ask", [
    lambda model, other: model.prompt(other), lambda model, other: model.prepare_image(other),
    lambda model, other: nanogap.image.open_image(other)], ids=["prompt", "prepare", "open"])
def test_the_other_doors_ask_for_types_as_well(ask: Callable, model: VLM):
    for other in OTHERS:
        if not isinstance(other, str):
            refused(lambda other=other: ask(model, other))


# ----- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_converted_answers_with_every_strategy(dtype: torch.dtype, shipped: VLM):
    """The text guide goes with it, to float64 and back as well."""
    model = deepcopy(shipped)
    for method in (lambda: model.to(dtype),
                   {torch.float16: model.half, torch.bfloat16: model.bfloat16,
                    torch.float64: model.double}[dtype]):
        method()
        assert model.dtype == model.text_guide.clip.text_projection.weight.dtype == dtype
        for name in STRATEGIES:
            model.ground(PICTURE, "the red car", name, 100, max_new_tokens=2)
        model.float()
    assert (model.ground(PICTURE, "the red car", "trim", 40, max_new_tokens=9).tokens ==
            shipped.ground(PICTURE, "the red car", "trim", 40, max_new_tokens=9).tokens) or (
                dtype != torch.float64)


@pytest.fixture
def fresh_torch() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


@pytest.mark.parametrize("change", [
    lambda: torch.set_default_dtype(torch.bfloat16),
    lambda: torch.set_default_dtype(torch.float16),
    lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_device("meta")],
    ids=["bfloat16", "float16", "float64", "meta"])
def test_torchs_defaults_change_nothing(change: Callable, shipped: VLM, fresh_torch):
    """They are those of the program around it, and stay so."""
    pixels = shipped.prepare_image(PICTURE)
    asked = [(name, 100) for name in STRATEGIES]
    said = [shipped.ground(PICTURE, "the red car", *one, max_new_tokens=3).tokens for one in asked]
    change()
    before = torch.get_default_dtype(), torch.get_default_device()
    model = nanogap.load(SHIPPED, "cpu")
    assert torch.equal(model.prepare_image(PICTURE), pixels)
    assert said == [model.ground(PICTURE, "the red car", *one, max_new_tokens=3).tokens
                    for one in asked]
    refused(lambda: model.ground(PICTURE, "x", "random", 4, "no mode"))
    assert (torch.get_default_dtype(), torch.get_default_device()) == before


# ----- a look at other weights --------------------------------------------------------------------


def weight(model: VLM) -> Tensor:
    return model.language_model.model.layers[1].self_attn.q_proj.weight


def trained(model: VLM) -> None:
    optimizer = torch.optim.SGD([weight(model).requires_grad_()], lr=0.1)
    weight(model).grad = torch.ones_like(weight(model))
    optimizer.step()
    weight(model).requires_grad_(False)


def other_tower(model: VLM) -> None:
    for parameter in model.vision_tower.parameters():
        parameter.mul_(1.5)


CHANGES: dict[str, Callable[[VLM], object]] = {
    "in place": lambda model: weight(model).add_(0.1),
    "of one number": lambda model: weight(model)[0, 0].fill_(3.0),
    "through .data": lambda model: weight(model).data.add_(0.1),
    "a new tensor": lambda model: setattr(weight(model), "data", weight(model) * 1.1),
    "a step of training": trained, "the vision tower": other_tower,
    "loaded": lambda model: model.load_state_dict(
        {name: value * 1.1 for name, value in model.state_dict().items()}),
    "assigned": lambda model: model.load_state_dict(
        {name: value * 1.1 for name, value in model.state_dict().items()}, assign=True),
    "half": lambda model: model.half()}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("how", CHANGES)
def test_a_look_of_weights_that_have_changed_is_refused(how: str, share: bool, model: VLM):
    model = deepcopy(model)
    image = model.encode_image(PICTURE, share=share)
    first = model.ground(image, "x", "random", 4, max_new_tokens=3)
    assert model.ground(image, "x", "random", 4, max_new_tokens=3).tokens == first.tokens
    with torch.no_grad():
        CHANGES[how](model)
    assert "call model.encode_image on the picture again" in refused(
        lambda: model.ground(image, "x", "random", 4, max_new_tokens=3))
    model.ground(model.encode_image(PICTURE), "x", "random", 4, max_new_tokens=3)


def test_patches_that_were_compared_with_words_by_another_text_tower_are_refused(shipped: VLM):
    model = deepcopy(shipped)
    image = model.encode_image(PICTURE)
    model.ground(image, "x", "text_similarity", 4, max_new_tokens=3)
    with torch.no_grad():
        model.text_guide.clip.visual_projection.weight.neg_()
    assert "before the weights changed" in refused(
        lambda: model.ground(image, "x", "text_similarity", 4, max_new_tokens=3))


def test_a_look_of_another_model_is_refused_and_that_of_a_copy_is_not(model: VLM, shipped: VLM):
    image = shipped.encode_image(PICTURE)
    assert "was encoded by another model" in refused(
        lambda: model.ground(image, "x", "random", 4, max_new_tokens=3))
    again = deepcopy(shipped)
    assert (again.ground(image, "x", "random", 40, max_new_tokens=3).tokens ==
            shipped.ground(image, "x", "random", 40, max_new_tokens=3).tokens)


def test_a_model_without_a_tokenizer_says_so(model: VLM):
    for take in (lambda model: setattr(model, "tokenizer", None),
                 lambda model: delattr(model, "tokenizer")):
        bare = deepcopy(model)
        take(bare)
        assert refused(lambda bare=bare: bare.ground(PICTURE, "x", "random", 4)) == (
            "the model has no tokenizer, so it can read no question: load it with nanogap.load, "
            "or set model.tokenizer")


# ----- every family -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_all_of_this_holds_for_every_family(family: str, fresh_torch):
    """Converted, under other defaults, with changed weights, and seen by another."""
    model = tiny_model(family)
    asked = {"prune": "cls_attention", "keep": 5, "max_new_tokens": 3}
    said = model.ground(PICTURE, "x", **asked).tokens
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        assert model.ground(PICTURE, "x", **asked).tokens == said
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    assert model.ground(PICTURE, "x", **asked).tokens == said
    torch.set_default_device("cpu")
    image = model.encode_image(PICTURE, share=True)
    assert model.ground(image, "x", **asked).tokens == said
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        converted = deepcopy(model).to(dtype)
        converted.ground(PICTURE, "x", **asked)
        refused(lambda converted=converted: converted.ground(image, "x", **asked))
    with torch.no_grad():
        weight(model).add_(0.1)
    refused(lambda: model.ground(image, "x", **asked))
    model.tokenizer = None
    refused(lambda: model.ground(PICTURE, "x", **asked))
