"""On a device that is not the CPU, without having one; and which kernel reads a prompt."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import nanogap
from nanogap import llama
from nanogap.fast.graph import GraphedDecoder
from nanogap.gap import MODES
from nanogap.models import MODELS, VLM
from nanogap.prune import STRATEGIES, finds_budget, needs_of
from tests.pretend import Pretended, pretended
from tests.tiny import tiny_model

MINI = Path(__file__).resolve().parents[2] / "weights" / "mini"
THINGS = ["the man", "a red car on the left"]
MATH, FLASH, CUDNN = (int(getattr(SDPBackend, name))
                      for name in ("MATH", "FLASH_ATTENTION", "CUDNN_ATTENTION"))
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


def asked(model: VLM, picture: object) -> list[list[int]]:
    """What a model says with each strategy that needs no other weights.

    In turns: in all modes, with drafts and without.
    """
    names = [name for name in STRATEGIES if "text" not in needs_of(name)]
    budgets = [(name, "50%") for name in names]
    budgets += [(name, None) for name in names if finds_budget(name)]
    modes = [*MODES, "gap", "gap"]
    return [model.ground(picture, "the man", name, keep, modes[i % len(modes)], max_new_tokens=3,
                         drafts=i % 2 == 0).tokens for i, (name, keep) in enumerate(budgets)]


@pytest.mark.parametrize("family", MODELS)
def test_each_model_says_there_what_it_says_on_the_cpu(family: str, picture):
    """Every strategy and every mode: what is forgotten on the CPU is an error."""
    model = tiny_model(family)
    here = asked(model, picture)
    assert asked(moved(model), picture) == here


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
        assert {result.keep.device.type for result in results} == {"cpu"}
        pixels = model.prepare_image(picture).cpu()
        logits = model(model.prompt("it"), pixels, own, size=picture.size)
        return [result.tokens for result in results] + [logits.argmax(-1).tolist()]

    here = said()
    moved(model)
    assert said() == here
    for result in model.ground_all(picture, THINGS, max_new_tokens=2):
        assert result.keep.device.type == result.position_ids.device.type == "cpu"


def test_strategies_that_read_the_question_take_clips_text_tower_there():
    model = nanogap.load(MINI, "cpu", "float32")
    picture = MINI.parents[2] / "image.jpg"

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
        return right(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args))

    model = moved(tiny_model("llava"))
    monkeypatch.setattr(llama, forgets, on_the_cpu)
    with pytest.raises(RuntimeError, match="on pretend and on the CPU"):
        model.ground(picture, "the man", max_new_tokens=3)


# ----- which kernel reads a prompt ----------------------------------------------------------------


def attention_of(model: VLM, picture: object, monkeypatch: pytest.MonkeyPatch,
                 **more: object) -> tuple[list[tuple], list[int]]:
    """The calls in their order: queries, rows, the mask's shape, whether causal; and the kernels.
    """
    calls, kernels = [], []
    attend = F.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
              is_causal: bool = False, **rest: object) -> Tensor:
        mask = None if attn_mask is None else tuple(attn_mask.shape)
        calls.append((q.shape[2], k.shape[2], mask, is_causal))
        kernels.append(torch._fused_sdp_choice(q, k, v, attn_mask, is_causal=is_causal, **rest))
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **rest)

    image = model.encode_image(picture)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", noted)
        model.ground(image, "the man", "random", 9, max_new_tokens=25, **more)
    return calls, kernels


def test_a_prompt_is_read_by_the_causal_kernel_and_takes_no_mask(model, picture, monkeypatch):
    """Three layers; in the last one only the last token looks."""
    T = len(model.prompt("the man")) - 1 + 9
    calls, _ = attention_of(model, picture, monkeypatch, drafts=False)
    assert calls[:3] == [(T, T, None, True)] * 2 + [(1, T, None, False)]
    assert {mask for _, _, mask, _ in calls} == {None}


def test_only_ten_digits_take_a_mask_beside_a_prompt(model, picture, monkeypatch):
    """Drafted are "[0.", a chain, causal as the prompt is, and ten digits side by side."""
    T = len(model.prompt("the man")) - 1 + 9 + 3
    layer = [(10, T + 10, (10, T + 10), False), (T, T, None, True)]
    last = [(1 + 3 + 10, T + 10, (1 + 3 + 10, T + 10), False)]
    assert attention_of(model, picture, monkeypatch)[0][:5] == 2 * layer + last


@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_flash_kernel_reads_the_prompt(device: str, drafts: bool, picture, monkeypatch):
    """In bfloat16.  On CUDA the masked rows have a kernel of their own, and none is written out."""
    model = tiny_model("llava").to(device, torch.bfloat16)
    calls, kernels = attention_of(model, picture, monkeypatch, drafts=drafts)
    read = [kernel for call, kernel in zip(calls, kernels, strict=True) if call[3]]
    assert len(read) == 2 and set(read) <= {FLASH, CUDNN}
    assert MATH not in kernels
