"""Tiny pieces in the forms in which models are published: pickles, deltas, LoRA, tokenizer.model.

The numbers are those of tests/tiny.py: a tensor's name there, and not the piece, says which.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from nanogap.clip import CLIPTextConfig, CLIPVisionConfig
from nanogap.llama import LlamaForCausalLM
from nanogap.models.eva import EvaTower
from nanogap.train.losses import CLIP
from tests.tiny import (
    IMAGE_TOKEN,
    draw,
    tiny_config,
    tiny_next_config,
    tiny_tensors,
    tiny_tokenizer,
    write_shards,
)

PIECES = IMAGE_TOKEN               # of the tiny tokenizer, before its special tokens
VISION = tiny_config().vision
WIDE = CLIPVisionConfig(128, 64, 3, 2, image_size=56, patch_size=14)     # 64 channels a head
DECODER = tiny_config(vocab_size=PIECES, rms_norm_eps=1e-6).text
OLD_BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
CLIP_TEXT = CLIPTextConfig(16, 32, 1, 2, vocab_size=300)
TEXT_KEYS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
             "num_attention_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
             "vocab_size": PIECES, "rope_scaling": None, "bos_token_id": 0, "eos_token_id": 1}


# ----- files --------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def sentencepiece(pieces: Sequence[str]) -> bytes:
    """A tokenizer.model; behind <unk>, <s>, </s> and the bytes, a later piece has a lower score."""
    data = b""
    for i, piece in enumerate(pieces):
        score = min(0.0, 258.0 - i)
        data += field(1, field(1, piece.encode()) + field(2, score) + field(3, 1))
    return data + field(2, field(3, 2)) + field(3, field(1, b"identity"))


def write_folder(folder: Path, config: dict, tensors: dict[str, Tensor], files: str = "bin",
                 count: int = 2) -> Path:
    """config.json, the tiny tokenizer's pieces as they were learnt, and shards.

    files: their kind, "bin", "legacy" for those of older versions, or "safetensors"
    """
    def write(path: Path, part: dict[str, Tensor]) -> None:
        torch.save({name: value.clone() for name, value in part.items()}, path,
                   _use_new_zipfile_serialization=files == "bin")

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    vocab = tiny_tokenizer().get_vocab(with_added_tokens=False)
    (folder / "tokenizer.model").write_bytes(sentencepiece(sorted(vocab, key=vocab.get)))
    if files == "safetensors":
        write_shards(folder, tensors, count)
    else:
        write_shards(folder, tensors, count, "pytorch_model.bin", write)
    return folder


def llama_tensors() -> dict[str, Tensor]:
    """A decoder under the names of LLaMA's own repositories, old buffers included."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(DECODER).state_dict().items()}
    tensors = {name: draw(f"language_model.{name}", shape, 0).half()
               for name, shape in shapes.items()}
    return tensors | {OLD_BUFFER: torch.rand(8)}


def clip_tensors() -> dict[str, Tensor]:
    """A CLIP under its own names."""
    with torch.device("meta"):
        clip = CLIP(VISION, CLIP_TEXT, 16)
    return {name: draw(name.replace("vision_model.", "vision_tower."), value.shape, 0)
            for name, value in clip.state_dict().items()}


# ----- LLaVA's own layout -------------------------------------------------------------------------


def write_clip(folder: Path, files: str = "bin") -> Path:
    """A CLIP as OpenAI's repositories hold it, in float32 and with a buffer of older versions."""
    tensors = clip_tensors()
    tensors["vision_model.embeddings.position_ids"] = torch.arange(VISION.grid ** 2 + 1)[None]
    config = {"model_type": "clip", "projection_dim": 16, "text_config": asdict(CLIP_TEXT),
              "vision_config": asdict(VISION)}
    return write_folder(folder, config, tensors, files, 1)


def original(name: str) -> str:
    """A name of the hub's in LLaVA's own layout: LLaMA's names, and CLIP's tower inside."""
    name = name.replace("language_model.", "").replace("linear_1", "0").replace("linear_2", "2")
    name = name.replace("multi_modal_projector.", "model.mm_projector.")
    name = name.replace("image_newline", "model.image_newline")
    return name.replace("vision_tower.", "model.vision_tower.vision_tower.")


def write_llava(folder: Path, files: str = "bin", tiles: bool = False) -> Path:
    """LLaVA-1.5, or 1.6 with `tiles`, which holds its tower."""
    config, own = tiny_config(vocab_size=PIECES), {"image_aspect_ratio": "pad"}
    if tiles:
        config = replace(tiny_next_config(vocab_size=PIECES), vision=WIDE)
        own = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
               "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}    # (width, height)
    tensors = {original(name): value for name, value in tiny_tensors(config).items()
               if tiles or not name.startswith("vision_tower.")}
    return write_folder(folder, TEXT_KEYS | own | {
        "model_type": "llava", "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_resampler_type": None,
    }, tensors | {OLD_BUFFER: torch.rand(8)}, files)


# ----- Shikra -------------------------------------------------------------------------------------


def write_llama(folder: Path, **config: object) -> Path:
    """LLaMA-7B as huggyllama/llama-7b has it, or Llama-2."""
    return write_folder(folder, TEXT_KEYS | {"model_type": "llama"} | config, llama_tensors())


def write_delta(folder: Path) -> Path:
    """Shikra's difference to it: three more rows of embeddings, a projector, buffers of zeros."""
    hidden, C = DECODER.hidden_size, VISION.hidden_size
    shapes = {name: value.shape for name, value in llama_tensors().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shapes[name] = (PIECES + 3, hidden)
    tensors = {name: 0.25 * draw(f"delta {name}", shape, 1).half()
               for name, shape in shapes.items()}
    tensors[OLD_BUFFER] = torch.zeros(8)
    tensors["model.mm_projector.weight"] = draw("weight", (hidden, C), 2).half()
    tensors["model.mm_projector.bias"] = draw("bias", (hidden,), 2).half()
    return write_folder(folder, TEXT_KEYS | {
        "model_type": "shikra", "vocab_size": PIECES + 3, "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14"}, tensors)


# ----- MiniGPT-v2 ---------------------------------------------------------------------------------

EVA = CLIPVisionConfig(88, 16, 3, 1, image_size=28, patch_size=14)
RANK = 8


def eva_tensors(blocks: int) -> dict[str, Tensor]:
    """eva_vit_g.pth: one more block than MiniGPT-v2 runs, a norm and a head that it leaves out."""
    with torch.device("meta"):
        tower = EvaTower(replace(EVA, num_hidden_layers=blocks))
    shapes = {name: value.shape for name, value in tower.state_dict().items()}
    shapes |= {"norm.weight": (88,), "head.weight": (10, 88)}
    tensors = {name: draw(name, shape, 0).half() for name, shape in shapes.items()}
    return tensors | {"relative_position_index": torch.arange(4)}


def lora_name(layer: int, kind: str, half: str, newer: bool = False) -> str:
    """newer: as a newer peft has it"""
    return (f"llama_model.base_model.model.model.layers.{layer}.self_attn.{kind}_proj."
            f"lora_{half}{'.default' if newer else ''}.weight")


def write_minigpt(folder: Path, blocks: int = 3, newer: bool = False) -> dict[str, Path]:
    """Llama-2, EVA and the checkpoint of a training; newer: as it might be written today."""
    base = write_llama(folder / "llama-2", rms_norm_eps=1e-5)
    vision, checkpoint = folder / "eva_vit_g.pth", folder / "minigptv2_checkpoint.pth"
    torch.save(eva_tensors(blocks), vision, _use_new_zipfile_serialization=newer)
    hidden = DECODER.hidden_size
    shapes = {"llama_proj.weight": (hidden, 4 * EVA.hidden_size), "llama_proj.bias": (hidden,)}
    for layer in range(DECODER.num_hidden_layers):
        for kind in "qv":
            shapes[lora_name(layer, kind, "A", newer)] = (RANK, hidden)
            shapes[lora_name(layer, kind, "B", newer)] = (hidden, RANK)
    tensors = {name: draw(name, shape, 3) for name, shape in shapes.items()}
    tensors[f"llama_model.base_model.model.{OLD_BUFFER}"] = torch.rand(8)
    if newer:
        tensors["ln_vision.weight"] = torch.full((88,), 3.0)
        tensors["visual_encoder.blocks.0.norm1.bias"] = torch.full((88,), 5.0)
        tensors["llama_model.model.norm.weight"] = torch.full((hidden,), 7.0)
    model = {"arch": "minigpt_v2", "image_size": 56, "lora_r": RANK, "lora_alpha": 32}
    torch.save({"model": tensors, "epoch": 3, "config": {"model": model},
                "optimizer": {"state": {0: {"step": torch.tensor(9.0)}}}},
               checkpoint, _use_new_zipfile_serialization=newer)
    return {"base": base, "vision": vision, "checkpoint": checkpoint}
