"""LLaVA's sizes with random weights: all that speed and memory ask of a model.

In:  the name of a size.  Out: a `Llava` that answers nonsense at the speed of the real one, or a folder
in the published layout.

Weights are normal with standard deviation fan_in^-1/2, and biases 0: signals neither explode nor
vanish.  The words are those of weights/mini, at the front of a vocabulary of the published size.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from nanogap.clip import CLIPVisionConfig
from nanogap.cli import NanogapError
from nanogap.llama import LlamaConfig
from nanogap.models.llava import Llava, LlavaConfig
from nanogap.train.tokenizer import IMAGE
from nanogap.weights import read_tokenizer, save_llava

WORDS = Path(__file__).resolve().parents[2] / "weights" / "mini"

SEVEN = LlamaConfig(vocab_size=32064, rms_norm_eps=1e-5, max_position_embeddings=4096)
SIZES = {
    "7b": (CLIPVisionConfig(), SEVEN),
    "13b": (CLIPVisionConfig(),
            replace(SEVEN, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                    num_attention_heads=40, num_key_value_heads=40)),
    # 576 patches, and most of the work in the decoder, as in the large ones
    "350m": (CLIPVisionConfig(512, 2048, 8, 8),
             replace(SEVEN, hidden_size=1024, intermediate_size=2816, num_hidden_layers=20,
                     num_attention_heads=16, num_key_value_heads=16, head_dim=64)),
    "tiny": (CLIPVisionConfig(32, 64, 3, 2, 56, 14),
             replace(SEVEN, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                     num_attention_heads=4, num_key_value_heads=4, head_dim=16, vocab_size=640)),
}


def empty_llava(config: LlavaConfig) -> Llava:
    """All the shapes and no memory."""
    with torch.device("meta"):
        return Llava(config)


def count_parameters(size: str) -> int:
    """Of a model of a size."""
    vision, text = SIZES[size]
    return sum(p.numel() for p in empty_llava(LlavaConfig(text, vision)).parameters())


@torch.no_grad()
def random_llava(size: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Llava:
    """A model of a size, drawn in place: it never takes more memory than its weights."""
    vision, text = SIZES[size]
    tokenizer = read_tokenizer(WORDS, text.vocab_size)
    config = LlavaConfig(text, vision, tokenizer.token_to_id(IMAGE), dtype=str(dtype).removeprefix("torch."))
    model = empty_llava(config).to(dtype)
    model.to_empty(device=device).requires_grad_(False).eval()
    model.tokenizer = tokenizer
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1)
        else:
            fan_in = (parameter[0] if parameter.dim() > 1 else parameter).numel()
            parameter.normal_(std=fan_in ** -0.5, generator=generator)
    return model


def save_random(size: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Write random weights in the layout of llava-hf/llava-1.5-7b-hf.

    raises: NanogapError where there is something already, or too little room
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NanogapError(f"--save {folder} is there already; give a new folder, or measure what is in it "
                           f"with --weights {folder}")
    needed = dtype.itemsize * count_parameters(size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < 1.01 * needed:
            raise NanogapError(f"--save {folder}: {size} takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB "
                               "are free; give a folder on another disk")
        save_llava(folder, random_llava(size, device, dtype), dtype)
    except OSError as error:
        raise NanogapError(f"--save {folder} cannot be written ({error.strerror or error}); "
                           "give another folder") from None
