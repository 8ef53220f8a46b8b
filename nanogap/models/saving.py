"""Models as files: in the layouts in which they are published.

In:  a model.  Out: a folder that `nanogap.load` reads, and transformers as well.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import TensorSpec, serialize_file
from tokenizers import Tokenizer
from torch import nn

from nanogap.checks.config import write_json
from nanogap.models.base import VLM
from nanogap.train.clip import CLIP


def our_name(name: str, rename: Sequence[tuple[str, str]]) -> str:
    """The module path of a published tensor name, `model.language_model.norm.weight`; or back."""
    for pattern, replacement in rename:
        name = re.sub(pattern, replacement, name)
    return name


def save_tensors(path: Path, module: nn.Module, dtype: torch.dtype,
                 rename: Sequence[tuple[str, str]] = ()) -> None:
    """Write a module's tensors; rename: patterns from names of modules to names on disk."""
    state = {our_name(name, rename): value.detach().to("cpu", dtype)
             for name, value in module.state_dict().items()
             if not name.startswith("text_guide.")}
    # safetensors.torch.save_file would need numpy for what these pointers do
    specs = {name: TensorSpec(dtype=str(dtype).removeprefix("torch."), shape=list(value.shape),
                              data_ptr=value.data_ptr(), data_len=value.nbytes)
             for name, value in state.items()}
    partial = path.with_suffix(".partial")
    serialize_file(specs, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(path)


def save(folder: Path, model: VLM, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model in its published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    model.write_config(folder, str(dtype).removeprefix("torch."))
    model.tokenizer.save(str(folder / "tokenizer.json"))
    save_tensors(folder / "model.safetensors", model, dtype, model.on_disk)


def save_clip(folder: Path, clip: CLIP, tokenizer: Tokenizer,
              dtype: torch.dtype = torch.bfloat16) -> None:
    """Write both towers in the layout of openai/clip-vit-large-patch14-336."""
    folder.mkdir(parents=True, exist_ok=True)
    start = tokenizer.token_to_id("<|startoftext|>")
    end = tokenizer.token_to_id("<|endoftext|>")
    width = clip.visual_projection.out_features
    shared = {"projection_dim": width, "hidden_act": "quick_gelu"}
    tokens = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    text = asdict(clip.text_model.config) | shared | tokens
    vision = asdict(clip.vision_model.config) | shared
    write_json(folder / "config.json", {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "text_config": text | {"model_type": "clip_text_model"},
        "vision_config": vision | {"model_type": "clip_vision_model"}})
    tokenizer.save(str(folder / "tokenizer.json"))
    save_tensors(folder / "model.safetensors", clip, dtype)
