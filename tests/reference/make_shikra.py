"""What parts of transformers, put together, make of a tiny Shikra: writes shikra.json here.

run:  pip install transformers==5.23.0 && python -m tests.reference.make_shikra

They are CLIP's vision model and a LLaMA, with one linear layer between them.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanogap.llava import LlavaConfig
from nanogap.models.shikra import Shikra
from tests import tiny
from tests.reference.make_reference import (
    NEW_TOKENS,
    POSITIONS,
    PRUNED,
    Answer,
    answer_of_parts,
    part,
    pixel_values,
    rounded,
    summary,
    write_outputs,
)

OUTPUTS = Path(__file__).with_name("shikra.json")
PATCH, START, END = 560, 561, 562
PROMPT = [1, 319, 400, 77, START, PATCH, END, 36, 500, 9, 301, 88]           # P = 5, A = 6
# order and position IDs of 16 patches: P and A are those of LLaVA's prompt, so these are as well
MODES = {"full": (list(range(16)), list(range(27)))} | PRUNED


def tiny_config() -> LlavaConfig:
    """4 x 4 patches; 3 layers see and 3 read."""
    return replace(tiny.tiny_config(rms_norm_eps=1e-6), image_token=PATCH)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """All tensors of a tiny one, by our names."""
    with torch.device("meta"):
        model = Shikra(tiny_config())
    return {name: tiny.draw(name, value.shape, seed)
            for name, value in model.state_dict().items()}


def their_features(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Patch features (16, C): the last layer but one, without CLS."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    tower = CLIPVisionModel(CLIPVisionConfig(
        **asdict(tiny_config().vision), hidden_act="quick_gelu",
        attn_implementation="eager")).eval()
    inner = getattr(tower, "vision_model", tower)         # in some versions it is one in another
    inner.load_state_dict(part(state, "vision_tower."), strict=True)
    tower.requires_grad_(False)
    return tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]


def their_answer(state: dict[str, Tensor], pixels: Tensor, order: Sequence[int],
                 ids: Sequence[int]) -> Answer:
    """What is said of the prompt with the patches `order` at these IDs."""
    visual = nn.functional.linear(their_features(state, pixels)[list(order)],
                                  state["multi_modal_projector.weight"],
                                  state["multi_modal_projector.bias"])
    return answer_of_parts(part(state, "language_model."), tiny_config().text, PROMPT, PATCH,
                           visual, ids, NEW_TOKENS)


def positions(mode: str) -> list[int]:
    """Of which tokens logits are stored."""
    return POSITIONS if mode == "full" else [5, 14]


def main() -> None:
    pixels, state = pixel_values(), tensors()
    answers = {"features": rounded(their_features(state, pixels)[[0, 7, 15], :6])}
    for mode, (order, ids) in MODES.items():
        answers[mode] = summary(their_answer(state, pixels, order, ids), positions(mode))
    write_outputs(OUTPUTS, {"shikra": answers})


if __name__ == "__main__":
    main()
