"""On a device that is not the CPU, without having one; and which kernel reads a prompt."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import nanogap
from nanogap import llama
from nanogap.bench.graph import GraphedDecoder
from nanogap.gap import MODES
from nanogap.models import MODELS, VLM
from nanogap.models.llava import Llava
from nanogap.prune import STRATEGIES, finds_budget, needs_of
from tests.pretend import Pretended, pretended
from tests.tiny import tiny_model

MINI = Path(__file__).resolve().parent.parent / "weights" / "mini"
THINGS = ["the man", "a red car on the left"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


# ----- the device ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [
    lambda there, here: there + here,
    lambda there, here: torch.cat([there, here]),
    lambda there, here: there @ here,
    lambda there, here: F.linear(here, there),
    lambda there, here: there[:, here[0].long()],
    lambda there, here: here[there[0].long()],
    lambda there, here: there.masked_fill(here > 0, 0),
    lambda there, here: here.add_(there),
])
def test_the_pretended_device_refuses_what_mixes(mix: Callable):
    here = torch.zeros(2, 2)
    there = here.to(pretended())
    with pytest.raises(RuntimeError, match="on pretend and on the CPU"):
        mix(there, here)
    assert mix(here, here.clone()).shape == mix(there, there.clone()).cpu().shape


def test_on_the_pretended_device_sums_are_those_of_the_cpu():
    device = pretended()
    x = torch.arange(6, device=device).view(2, 3).float()
    assert isinstance(x, Pretended) and x.device == device
    x[:, 1] = torch.full((2,), 9.0, device=device)
    assert (x * torch.tensor(2.0)).tolist() == [[0, 18, 4], [6, 18, 10]]   # a number may come along
    assert torch.tensor([1, 2], device=device).cpu().tolist() == [1, 2]
    assert float(x.sum()) == 28 and bool((x > 0).any())


# ----- a question on it ---------------------------------------------------------------------------


def moved(model: VLM) -> VLM:
    """The model on the pretended device."""
    return model.to(pretended())


def asked(model: VLM, picture: object, drafts: bool) -> list[list[int]]:
    """What a model says with each strategy that needs no other weights, in all modes in turns."""
    names = [name for name in STRATEGIES if "text" not in needs_of(name)]
    budgets = [(name, "50%") for name in names]
    budgets += [(name, None) for name in names if finds_budget(name)]
    modes = [*MODES, "gap", "gap"]
    return [model.ground(picture, "the man", name, keep, modes[i % len(modes)], max_new_tokens=3,
                         drafts=drafts).tokens for i, (name, keep) in enumerate(budgets)]


@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_each_model_says_there_what_it_says_on_the_cpu(family: str, drafts: bool, picture):
    """Every strategy and every mode: what is forgotten on the CPU is an error."""
    model = tiny_model(family)
    here = asked(model, picture, drafts)
    assert asked(moved(model), picture, drafts) == here


@pytest.mark.parametrize("family", MODELS)
def test_many_questions_and_shared_images_are_answered_there(family: str, picture):
    model = tiny_model(family)

    def said() -> list:
        image = model.encode_image(picture, share=True)
        own = torch.tensor([3, 1], device=model.device)
        results = [*model.ground_all(image, THINGS, "vispruner", 8, max_new_tokens=3),
                   *model.ground_all(image, THINGS, keep=own, drafts=False, max_new_tokens=3),
                   *(model.ground(image, thing, mode="full", max_new_tokens=3)
                     for thing in THINGS)]
        logits = model(model.prompt("it"), model.prepare_image(picture), own, size=picture.size)
        return [result.tokens for result in results] + [logits.argmax(-1).tolist()]

    here = said()
    moved(model)
    assert said() == here
    for result in model.ground_all(picture, THINGS, max_new_tokens=2):
        assert result.keep.device.type == result.position_ids.device.type == "cpu"


def test_strategies_that_read_the_question_take_clips_text_tower_there():
    model = nanogap.load(MINI, "cpu", "float32")
    picture = MINI.parent.parent / "image.jpg"

    def said() -> list[list[int]]:
        return [model.ground(picture, "the man", name, 9, max_new_tokens=2).tokens
                for name in STRATEGIES if "text" in needs_of(name)]

    here = said()
    moved(model)
    assert len(here) > 1 and said() == here


def test_a_static_cache_and_its_mask_are_there(picture):
    model = moved(tiny_model("llava"))
    plain = model.ground(picture, "the man", max_new_tokens=3).tokens
    model.decoder = GraphedDecoder(model.language_model)
    assert model.ground(picture, "the man", max_new_tokens=3).tokens == plain


@pytest.mark.parametrize("forgets", ["rope_angles", "mask_of"])
def test_a_forgotten_move_is_an_error(forgets: str, picture, monkeypatch):
    """Position IDs' angles, or a mask, that stay on the CPU."""
    right = getattr(llama, forgets)

    def on_the_cpu(*args: object) -> object:
        made = right(*(arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args))
        return made

    model = moved(tiny_model("llava"))
    monkeypatch.setattr(llama, forgets, on_the_cpu)
    with pytest.raises(RuntimeError, match="on pretend and on the CPU"):
        model.ground(picture, "the man", max_new_tokens=3)


# ----- which kernel reads a prompt ----------------------------------------------------------------


def attention_of(model: Llava, picture: object, monkeypatch: pytest.MonkeyPatch,
                 **more: object) -> list[tuple]:
    """The calls in their order: queries, rows, the mask's shape, whether causal."""
    calls = []
    attend = F.scaled_dot_product_attention

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              attn_mask: torch.Tensor | None = None, is_causal: bool = False, **rest: object):
        mask = None if attn_mask is None else tuple(attn_mask.shape)
        calls.append((q.shape[2], k.shape[2], mask, is_causal))
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **rest)

    image = model.encode_image(picture)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", noted)
        model.ground(image, "the man", "random", 9, max_new_tokens=25, **more)
    return calls


def test_a_prompt_is_read_by_the_causal_kernel_and_takes_no_mask(model, picture, monkeypatch):
    """Three layers; in the last one only the last token looks."""
    T = len(model.prompt("the man")) - 1 + 9
    calls = attention_of(model, picture, monkeypatch, drafts=False)
    assert calls[:3] == [(T, T, None, True)] * 2 + [(1, T, None, False)]
    assert {mask for _, _, mask, _ in calls} == {None}


def test_only_ten_digits_take_a_mask_beside_a_prompt(model, picture, monkeypatch):
    """Drafted are "[0.", a chain, causal as the prompt is, and ten digits side by side."""
    T = len(model.prompt("the man")) - 1 + 9 + 3
    layer = [(10, T + 10, (10, T + 10), False), (T, T, None, True)]
    last = [(1 + 3 + 10, T + 10, (1 + 3 + 10, T + 10), False)]
    assert attention_of(model, picture, monkeypatch)[:5] == 2 * layer + last


@pytest.mark.parametrize("device, kernels", [
    ("cpu", {"flash_attention_for_cpu"}),
    pytest.param("cuda", {"flash_attention", "cudnn_attention"}, marks=needs_gpu)])
def test_a_flash_kernel_reads_the_prompt(device: str, kernels: set[str], picture):
    """In bfloat16, with drafts and without; the ten digits may be read by any kernel but "math"."""
    model = tiny_model("llava").to(device, torch.bfloat16)
    image = model.encode_image(picture)
    for drafts in (False, True):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.ground(image, "the man", "random", 9, drafts=drafts, max_new_tokens=25)
        ran = [event.name.removeprefix("aten::_scaled_dot_product_")
               for event in profile.events()
               if event.name.startswith("aten::_scaled_dot_product_")]
        assert set(ran[1:4:2] if drafts else ran[:3]) <= kernels and "attention_math" not in ran
