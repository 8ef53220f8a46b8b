"""Models as files: in the layouts in which they are published.

In:  a model.  Out: a folder that `nanogap.load` reads, and transformers as well.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import TensorSpec, serialize_file
from torch import nn

from nanogap.models.base import VLM


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
