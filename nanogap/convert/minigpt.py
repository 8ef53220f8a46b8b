"""MiniGPT-v2 out of three pieces: Llama-2-7b-chat, EVA's tower, and what was trained.

In:  a folder and two pickles.  Out: a recipe, as of nanogap/convert/recipes.py.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanogap.checks.reading import read_saved
from nanogap.convert.pieces import Piece
from nanogap.convert.recipes import EMBEDDINGS, Recipe, config_of, tower_sizes
from nanogap.errors import NanogapError
from nanogap.models.saving import our_name

LLAMA_2 = ("`hf download meta-llama/Llama-2-7b-chat-hf --exclude '*.bin*' "
           "--local-dir weights/llama-2-7b-chat-hf` (13 GB)")
EVA = "the link to it in MiniGPT-4's minigpt4/models/eva_vit.py (2 GB)"
CHECKPOINT = "the link to it in MiniGPT-4's README"
EVA_NAMES = r"^(cls_token|pos_embed|patch_embed\.|blocks\.([12]?\d|3[0-8])\.)"     # 39 of 40 blocks
# two matrices of the LoRA of each; newer versions of peft have `default` in the name
LORA_NAMES = ((r"^llama_model\.base_model\.model\.(.+\.lora_[AB])(\.default)?\.weight$", r"\1"),)


def minigpt_v2(base: Path, vision: Path, checkpoint: Path) -> Recipe:
    """MiniGPT-v2: Llama-2-7b-chat-hf, LAVIS' eva_vit_g.pth, and a checkpoint of its training."""
    llama, eva = Piece(base, LLAMA_2), Piece(vision, EVA, EVA_NAMES)
    trained = Piece(checkpoint, CHECKPOINT)
    config = llama.config("llama")
    if config.get("max_position_embeddings") == 2048:
        raise NanogapError(f"{base / 'config.json'}: max_position_embeddings is 2048, which is "
                           f"LLaMA-1's or Vicuna's; MiniGPT-v2 stands on Llama-2: get {LLAMA_2}")
    if not any("lora_A" in name for name in trained):
        raise NanogapError(f"{checkpoint} holds no LoRA of the decoder; get the file by "
                           f"{CHECKPOINT}")
    # what a training says of its model; what it does not say is as in the published ones
    said = (read_saved(checkpoint).get("config") or {}).get("model", {})
    settings = {"image_size": 448, "lora_alpha": 16} | said
    sizes = tower_sizes(eva, "patch_embed.proj.weight", channels=88)
    sizes["image_size"] = settings["image_size"]
    rows, dtype = len(llama[EMBEDDINGS]), llama[EMBEDDINGS].dtype
    new = config_of("minigpt_v2", config, sizes, dtype, tokens=rows, rows=rows)
    return Recipe(new, (), (llama, eva, trained),
                  partial(minigpt_tensors, settings["lora_alpha"]))


def minigpt_tensors(alpha: float, llama: Piece, eva: Piece,
                    trained: Piece) -> Iterator[tuple[str, Tensor]]:
    """The three together, the LoRA merged; each tensor in the precision that it is published in.

    What was trained stands before what it began with.  What was frozen is in neither of the last
    two: `ln_vision` was, from its beginning, so it normalises and no more.
    """
    rest = {our_name(name, LORA_NAMES): tensor for name, tensor in trained.items()}
    for name, value in (("ln_vision.weight", 1.0), ("ln_vision.bias", 0.0)):
        yield name, rest.pop(name, torch.full(eva["cls_token"].shape[2:], value))
    for name, tensor in eva.items():
        yield f"visual_encoder.{name}", rest.pop(f"visual_encoder.{name}", tensor)
    for name, tensor in llama.items():
        halves = [name.replace("weight", half) for half in ("lora_A", "lora_B")]
        if rest.keys() >= set(halves):
            a, b = (rest.pop(half).float() for half in halves)                # (r, in), (out, r)
            # W + alpha / r * B A, added in float32
            tensor = (tensor + alpha / len(a) * (b @ a)).to(tensor.dtype)     # (out, in)
        yield f"llama_model.{name}", rest.pop(f"llama_model.{name}", tensor)
    yield from rest.items()
