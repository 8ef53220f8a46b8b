"""From a folder to a model: config.json, the tensors by their names, and the tokenizer.

In:  a folder in a layout of nanogap/llava.py.  Out: a model.
The model is built without memory (meta device) and takes the tensors of the files, all of them and
no others.  Source: the layouts and defaults that transformers 5.23 reads.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap.clip import CLIPText, CLIPTextConfig, CLIPVisionConfig
from nanogap.errors import NanogapError
from nanogap.image import CLIP_MEAN, CLIP_STD
from nanogap.llama import LlamaConfig
from nanogap.llava import Llava, LlavaConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODELS: dict[str, type[Llava]] = {"llava": Llava}   # by `model_type`; more in nanogap/models
UNUSED = r"rotary_emb\.inv_freq$|embeddings\.position_ids$"          # in older files
# what a config.json leaves out is a ViT-B/32's, as in transformers' classes
VIT_B_32 = CLIPVisionConfig(768, 3072, 12, 12, 224, 32)
TEXT_B_32 = CLIPTextConfig(512, 2048, 12, 8)


def load(folder: str | Path, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, clip: str | Path | None = None) -> Llava:
    """Load a checkpoint, ready to ground; config.json says which of MODELS it is.

    folder: config.json, tokenizer.json and model.safetensors, or shards with their index
    device: None takes CUDA where there is one, else the CPU
    dtype:  None takes the checkpoint's own on a GPU; on a CPU float32, bfloat16 for large models
    clip:   folder of the tower's CLIP, for strategies that read; None takes `clip_text` in there
    """
    folder = Path(folder)
    family = MODELS[read_json(folder / "config.json")["model_type"]]
    config = read_config(folder, family)
    with torch.device("meta"):
        model = family(config)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None and device.type == "cpu":
        dtype = "float32" if sum(p.numel() for p in model.parameters()) <= 2e9 else "bfloat16"
    dtype = DTYPES[str(dtype or config.dtype or "float16").removeprefix("torch.")]
    fill(model, folder, device, dtype, family.rename)
    model.tokenizer = read_tokenizer(folder)
    if clip or (folder / "clip_text").is_dir():
        model.text_guide = load_text_guide(Path(clip or folder / "clip_text"), device, dtype)
    return model


def load_text_guide(folder: Path, device: torch.device, dtype: torch.dtype) -> CLIPText:
    """Text tower and projections of a CLIP, in the layout of openai/clip-vit-large-patch14-336."""
    config = read_json(folder / "config.json")
    text = replace(TEXT_B_32, **known(CLIPTextConfig, config["text_config"]))
    vision = replace(VIT_B_32, **known(CLIPVisionConfig, config["vision_config"]))
    with torch.device("meta"):
        clip = CLIPText(vision, text, config.get("projection_dim", 512))
    fill(clip, folder, device, dtype, skip=r"^vision_model\.|^logit_scale$")
    clip.tokenizer = read_tokenizer(folder)
    return clip


def read_json(path: Path) -> dict:
    """The object in a JSON file, without what is null; empty where there is no such file."""
    def present(pairs: list[tuple[str, Any]]) -> dict:
        return {key: value for key, value in pairs if value is not None}
    return json.loads(path.read_text(), object_pairs_hook=present) if path.exists() else {}


def known(config: type, part: dict) -> dict[str, Any]:
    """The keys of a part of config.json that a configuration here has."""
    return {f.name: part[f.name] for f in fields(config) if f.name in part}


def read_config(folder: Path, family: type[Llava] = Llava) -> LlavaConfig:
    """config.json, and what generation_config.json and preprocessor_config.json add to it."""
    config = family.complete(read_json(folder / "config.json"))
    text, vision = config.get("text_config", {}), CLIPVisionConfig()
    if "vision_config" in config:
        vision = replace(VIT_B_32, **known(CLIPVisionConfig, config["vision_config"]))
    ends = read_json(folder / "generation_config.json").get(
        "eos_token_id", config.get("eos_token_id", text.get("eos_token_id", 2)))
    ends = ends if isinstance(ends, list) else [ends]
    processor = read_json(folder / "processor_config.json").get(
        "image_processor", read_json(folder / "preprocessor_config.json"))
    return family.Config(**known(family.Config, config) | {
        "text": read_text_config(text, config.get("tie_word_embeddings", False)),
        "vision": vision,
        "image_token": config.get("image_token_index", config.get("image_token_id", 32000)),
        "projector_bias": config.get("multimodal_projector_bias", True),
        "bos_token": text.get("bos_token_id", 1),
        "eos_token": ends[0],
        "other_ends": tuple(ends[1:]),
        "image_mean": tuple(processor.get("image_mean", CLIP_MEAN)),
        "image_std": tuple(processor.get("image_std", CLIP_STD)),
        "dtype": str(config.get("torch_dtype", config.get("dtype", "")))})


def read_text_config(text: dict, tied: bool) -> LlamaConfig:
    """The decoder's part of config.json; some of its defaults depend on what it says."""
    heads = text.get("num_attention_heads", 32)
    rope = text.get("rope_scaling") or text.get("rope_parameters", {})
    depending = {"num_key_value_heads": heads, "head_dim": text.get("hidden_size", 4096) // heads}
    return LlamaConfig(**depending | known(LlamaConfig, text) | known(LlamaConfig, rope) | {
        "tie_word_embeddings": tied or text.get("tie_word_embeddings", False)})


def fill(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype,
         rename: tuple[tuple[str, str], ...] = (), skip: str = "$^") -> None:
    """Give a model on the meta device the tensors of a folder: all of them, and no others.

    rename, skip: patterns of names on disk: to those of modules; of what is left out ("$^": none)
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(folder):
        if re.search(UNUSED, name) or re.search(skip, name):
            continue
        for pattern, replacement in rename:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor.to(device, dtype)
    if isinstance(model, Llava) and model.config.text.tie_word_embeddings:
        embeddings = tensors["language_model.model.embed_tokens.weight"]
        tensors.setdefault("language_model.lm_head.weight", embeddings)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(False).eval()


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint, one by one, mapped into memory."""
    for path in weight_files(folder):
        if path.suffix == ".bin":                      # as CLIP is published
            yield from torch.load(path, map_location="cpu", weights_only=True,
                                  mmap=is_zipfile(path)).items()     # torch before 1.6: no archive
            continue
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:                             # a mapping each, which ends with its tensor:
            with safe_open(path, framework="pt") as file:     # one copy in memory, never two
                yield name, file.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The files of tensors: one, or else those of an index (an older one may be left over)."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        shards = read_json(folder / f"{name}.index.json").get("weight_map", {}).values()
        if shards:
            return sorted({folder / Path(shard).name for shard in shards})
    raise NanogapError(f"{folder} holds no model.safetensors and no index of shards")


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json; a special token that is spelled out in a text stays text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer
