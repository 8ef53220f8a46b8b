"""MiniGPT-v2 out of three pieces: Llama-2-7b-chat, EVA's tower, and what was trained.

In:  a folder and two pickles.  Out: a recipe, as of nanogap/convert/recipes.py.
"""

import re
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanogap.checks.pickles import read_saved
from nanogap.convert import recipes
from nanogap.convert.pieces import Part, Piece, parts_of
from nanogap.errors import NanogapError

LLAMA_2 = ("`hf download meta-llama/Llama-2-7b-chat-hf --exclude '*.bin*' "
           "--local-dir weights/llama-2-7b-chat-hf` (13 GB)")
EVA = "the link to it in MiniGPT-4's minigpt4/models/eva_vit.py (2 GB)"
CHECKPOINT = "the link to it in MiniGPT-4's README"
LORA = r"^llama_model\.base_model\.model\.(.+)\.lora_[AB](\.default)?\.weight$"
EVA_NAMES = r"^(cls_token|pos_embed|patch_embed\.|blocks\.([12]?\d|3[0-8])\.)"     # 39 of 40 blocks


def minigpt_v2(base: Path, vision: Path, checkpoint: Path) -> recipes.Recipe:
    """MiniGPT-v2: Llama-2-7b-chat-hf, LAVIS' eva_vit_g.pth, and a checkpoint of its training.

    What was frozen in training is in neither of the last two: `ln_vision` was, from its beginning,
    so it normalises and no more.  All tensors keep the precision that they are published in.
    """
    llama, eva, trained = Piece(base, LLAMA_2), Piece(vision, EVA), Piece(checkpoint, CHECKPOINT)
    config = llama.config("llama")
    if config.get("max_position_embeddings") == 2048:
        raise NanogapError(f"{base / 'config.json'}: max_position_embeddings is 2048, which is "
                           f"LLaMA-1's or Vicuna's; MiniGPT-v2 stands on Llama-2: get {LLAMA_2}")
    embeddings = llama.empty(recipes.EMBEDDINGS)
    settings = training_settings(checkpoint)
    sizes = eva_sizes(eva, settings["image_size"])
    parts = {
        "ln_vision.weight": Part(partial(torch.ones, sizes["hidden_size"])),
        "ln_vision.bias": Part(partial(torch.zeros, sizes["hidden_size"])),
        **parts_of(eva, ((r"^", "visual_encoder."),), wanted=EVA_NAMES),
        **parts_of(llama, ((r"^", "llama_model."),)),
        **parts_of(trained, (), wanted=f"^(?!{LORA})"),
        **with_lora(llama, trained, settings["lora_alpha"])}
    rows = len(embeddings)
    tokenizer = recipes.read_tokenizer(llama, (), rows)
    new = {"model_type": "minigpt_v2", "torch_dtype": str(embeddings.dtype),
           "image_token_index": rows, "vision_config": sizes,
           "text_config": recipes.decoder_config(config, "llama", rows)}
    return recipes.Recipe(new, tokenizer, parts, llama.path)


def training_settings(checkpoint: Path) -> dict:
    """What a training says of its model; what it does not say is as in the published ones."""
    found = read_saved(checkpoint).get("config") or {}
    if isinstance(found, Namespace):
        found = vars(found)
    return {"image_size": 448, "lora_alpha": 16} | found.get("model", {})


def eva_sizes(eva: Piece, image_size: int) -> dict:
    """vision_config, from the tower's tensors; its heads have 88 channels each."""
    channels, _, _, patch = eva.empty("patch_embed.proj.weight").shape
    inner = len(eva.empty("blocks.0.mlp.fc1.weight"))
    depth = len([name for name in eva.found if re.search(EVA_NAMES + r"mlp\.fc1\.weight", name)])
    return {"model_type": "eva_vit_g", "hidden_size": channels, "intermediate_size": inner,
            "num_hidden_layers": depth, "num_attention_heads": channels // 88,
            "image_size": image_size, "patch_size": patch, "hidden_act": "gelu"}


def with_lora(llama: Piece, trained: Piece, alpha: float) -> dict[str, Part]:
    """The matrices of the decoder that have a LoRA, with it in them."""
    parts = {}
    for name in trained.found:
        found = re.search(LORA, name)
        if found:
            target = f"{found[1]}.weight"
            a, b = (re.sub(r"lora_[AB]", half, name) for half in ("lora_A", "lora_B"))
            parts[f"llama_model.{target}"] = Part(
                partial(merged, alpha), (llama, target), (trained, a), (trained, b))
    if not parts:
        raise NanogapError(f"{trained.path} holds no LoRA of a decoder (such as ...q_proj.lora_A); "
                           f"get the file by {CHECKPOINT}")
    return parts


def merged(alpha: float, matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + alpha / r * B A, added in float32.

    matrix: W (out, in), a: (r, in), b: (out, r)
    """
    change = b.float() @ a.float()                                            # (out, in)
    return (matrix + alpha / len(a) * change).to(matrix.dtype)
