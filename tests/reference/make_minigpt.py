"""What parts of transformers, put together, make of a tiny MiniGPT-v2: writes minigpt.json here.

run:  pip install transformers==5.23.0 && python -m tests.reference.make_minigpt

BLIP-2's vision model is EVA's tower, and the decoder is a LLaMA.  Between them stand a LayerNorm,
four neighbours to one token, and a Linear, which are written out here.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nanogap.models.minigpt import MiniGPT, MiniGPTConfig
from nanogap.models.saving import our_name
from tests import tiny
from tests.reference.make_reference import (
    Answer,
    answer_of_parts,
    noise,
    part,
    rounded,
    summary,
    write_outputs,
)

OUTPUTS = Path(__file__).with_name("minigpt.json")

TABLES = {"8 x 8 positions": 8, "4 x 4 positions": 4}    # name: patches to a side of the table
IMAGE = 640                                              # behind the last embedding
PROMPT = [1, 1, 319, 400, IMAGE, 35, 36, 500, 9]         # P = 4, A = 4
POSITIONS = [3, 4, 19, 23]       # of 4 + 16 + 4 tokens: text, first and last visual, last word
NEW_TOKENS = 8
pixel_values = partial(noise, 112)                       # (1, 3, 112, 112)

# For each mode the order in which tokens are fed, and the position IDs, by hand: unpruned, the text
# before the image has 0 to 3, its tokens 4 to 19 and the text after it 20 to 23
MODES = {
    "full": (list(range(16)), list(range(24))),
    "gap": ([2, 5, 9, 14], [0, 1, 2, 3, 6, 9, 13, 18, 20, 21, 22, 23]),
    "shifted": ([2, 5, 9, 14], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
    "permuted": ([9, 2, 14, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
}


def tiny_config() -> MiniGPTConfig:
    """112 x 112 pixels are 8 x 8 patches and 8 x 2 tokens; 3 blocks see, 3 layers read."""
    like = tiny.tiny_config()
    vision = replace(like.vision, image_size=112, layer_norm_eps=1e-6)
    return MiniGPTConfig(like.text, vision, IMAGE)


def tensors(table: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """All tensors under their published names, the position table of table x table patches."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MiniGPT(tiny_config()).state_dict().items()}
    shapes["vision_tower.pos_embed"] = (1, 1 + table ** 2, 32)
    drawn = {}
    for name, shape in shapes.items():
        flat = shape[-1:] if name.endswith("cls_token") else shape
        flat = shape[1:] if name.endswith("pos_embed") else flat
        value = tiny.draw(name.replace("pos_embed", "embedding.weight"), flat, seed).view(shape)
        drawn[our_name(name, MiniGPT.on_disk)] = value
    drawn["ln_vision.weight"] = tiny.draw("norm.weight", (32,), seed)
    return drawn


THEIR_NAMES = (
    (r"^visual_encoder\.", ""), (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"), (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."), (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."))


def their_tower(state: dict[str, Tensor]) -> nn.Module:
    """BLIP-2's vision model; its keys have a bias, which is zero."""
    from transformers import Blip2VisionConfig, Blip2VisionModel
    table = state["visual_encoder.pos_embed"].shape[1] - 1
    config = Blip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=14 * round(table ** 0.5), patch_size=14, layer_norm_eps=1e-6)
    theirs = {our_name(name, THEIR_NAMES): value
              for name, value in part(state, "visual_encoder.").items()}
    for i in range(3):
        q = theirs.pop(f"encoder.layers.{i}.self_attn.q_bias")
        v = theirs.pop(f"encoder.layers.{i}.self_attn.v_bias")
        theirs[f"encoder.layers.{i}.self_attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    theirs |= {"post_layernorm.weight": torch.ones(32), "post_layernorm.bias": torch.zeros(32)}
    tower = Blip2VisionModel(config).eval()
    tower.load_state_dict(theirs, strict=True)
    return tower.requires_grad_(False)


def their_hidden(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """What the last block returns, (1 + 64, C), CLS first."""
    out = their_tower(state)(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    return out.hidden_states[-1][0]


def their_visual(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Visual tokens (16, C') as the decoder is fed them."""
    normed = nn.functional.layer_norm(their_hidden(state, pixels), (32,), state["ln_vision.weight"],
                                      state["ln_vision.bias"], 1e-5)
    return nn.functional.linear(normed[1:].reshape(16, 4 * 32), state["llama_proj.weight"],
                                state["llama_proj.bias"])


def their_answer(state: dict[str, Tensor], pixels: Tensor, order: Sequence[int],
                 ids: Sequence[int]) -> Answer:
    """What is said of the prompt with the visual tokens `order` at these IDs."""
    visual = their_visual(state, pixels)[list(order)]
    return answer_of_parts(part(state, "llama_model."), tiny_config().text, PROMPT, IMAGE,
                           visual, ids, NEW_TOKENS)


def positions(mode: str) -> list[int]:
    """Of which tokens logits are stored."""
    return POSITIONS if mode == "full" else [4, 11]


def main() -> None:
    pixels, outputs = pixel_values(), {}
    for name, table in TABLES.items():
        state = tensors(table)
        hidden = their_hidden(state, pixels)
        outputs[name] = {"hidden": rounded(hidden[[0, 1, 30, 64], :6]),
                         "sum": rounded(hidden.double().abs().sum())}
        for mode, (order, ids) in MODES.items():
            outputs[name][mode] = summary(their_answer(state, pixels, order, ids), positions(mode))
    write_outputs(OUTPUTS, outputs)


if __name__ == "__main__":
    main()
