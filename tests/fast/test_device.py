"""On a device that is not the CPU, without having one; and which kernel reads a prompt."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from nanogap import llama
from nanogap.fast import lanes
from nanogap.fast.graph import GraphedDecoder
from nanogap.gap import MODES
from nanogap.models import MODELS, VLM
from nanogap.prune import STRATEGIES, needs_of
from tests.pretend import pretended
from tests.tiny import tiny_model

THINGS = ["the man", "a red car on the left"]
MATH, FLASH, CUDNN = (int(getattr(SDPBackend, name))
                      for name in ("MATH", "FLASH_ATTENTION", "CUDNN_ATTENTION"))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("family", MODELS)
def test_each_model_says_there_what_it_says_on_the_cpu(family: str, picture):
    """Every strategy, every mode, many questions: what is forgotten on the CPU is an error."""
    model = tiny_model(family)
    names = [name for name in STRATEGIES if not needs_of(name) & {"text", "question"}]
    modes = [*MODES, "gap", "gap"]

    def said() -> list:
        own = torch.tensor([3, 1], device=model.device)
        results = [model.ground(picture, "the man", name, "50%", modes[i % len(modes)],
                                max_new_tokens=3, drafts=i % 2 == 0)
                   for i, name in enumerate(names)]
        results += model.ground_all(picture, THINGS, "random", 8, max_new_tokens=3)
        results += model.ground_all(picture, THINGS, keep=own, drafts=False, max_new_tokens=3)
        assert {result.keep.device.type for result in results} == {"cpu"}
        pixels = model.prepare_image(picture).cpu()
        logits = model(model.prompt("it"), pixels, own, size=picture.size)
        return [result.tokens for result in results] + [logits.argmax(-1).tolist()]

    here = said()
    model.to(pretended())
    assert said() == here
    model.next_pass = GraphedDecoder(model.language_model.model)
    assert said() == here


@pytest.mark.parametrize("module, forgets", [(llama, "rope_angles"), (lanes, "mask_of")])
def test_a_forgotten_move_is_an_error(module, forgets: str, picture, monkeypatch):
    """Position IDs' angles, or a mask, that stay on the CPU."""
    right = getattr(module, forgets)

    def on_the_cpu(*args: object) -> object:
        return right(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args))

    model = tiny_model("llava").to(pretended())
    monkeypatch.setattr(module, forgets, on_the_cpu)
    with pytest.raises(RuntimeError, match="on pretend and on the CPU"):
        model.ground(picture, "the man", max_new_tokens=3)


# ----- which kernel reads a prompt ----------------------------------------------------------------


def attention_of(model: VLM, picture: object, monkeypatch: pytest.MonkeyPatch,
                 drafts: bool) -> tuple[list[tuple], list[int]]:
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
        model.ground(image, "the man", "random", 9, max_new_tokens=25, drafts=drafts)
    return calls, kernels


def test_only_what_is_drafted_takes_a_mask_behind_a_prompt(model, picture, monkeypatch):
    """Three layers; in the last one only the prompt's last token looks, and what is drafted behind
    it: "[0.", and ten digits side by side.
    """
    T = len(model.prompt("the man")) - 1 + 9
    calls, _ = attention_of(model, picture, monkeypatch, drafts=False)
    prompt, last = (T - 1, T - 1, None, True), (1, T, None, False)
    assert calls[:5] == [prompt, last, prompt, last, last]
    assert {mask for _, _, mask, _ in calls} == {None}
    M = 1 + 3 + 10
    drafted = (M, T - 1 + M, (M, T - 1 + M), False)
    calls, _ = attention_of(model, picture, monkeypatch, drafts=True)
    assert calls[:5] == [prompt, drafted, prompt, drafted, drafted]


@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_flash_kernel_reads_the_prompt(device: str, drafts: bool, picture, monkeypatch):
    """In bfloat16.  On CUDA the masked rows have a kernel of their own, and none is written out."""
    model = tiny_model("llava").to(device, torch.bfloat16)
    calls, kernels = attention_of(model, picture, monkeypatch, drafts=drafts)
    read = [kernel for call, kernel in zip(calls, kernels, strict=True) if call[3]]
    assert len(read) == 2 and set(read) <= {FLASH, CUDNN}
    assert MATH not in kernels
