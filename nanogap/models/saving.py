"""Models as files: in their published layouts, which `nanogap.load` and transformers read."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import TensorSpec, serialize_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import nn

from nanogap.models.base import VLM

START_TOKENS = ("<unk>", "<s>", "</s>")   # IDs 0, 1, 2 of a LLaMA


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


def llama_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]],
                    special_tokens: Iterable[str]) -> Tokenizer:
    """special_tokens: a model's own, behind all pieces."""
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    added = (*START_TOKENS, *special_tokens)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer
