"""Published sizes with random weights, which are enough to measure speed and memory.

The tokens are those of weights/mini, at the front of a vocabulary of the published size.
"""

from dataclasses import replace
from pathlib import Path

import torch

from nanogap.checks.loading import MINI
from nanogap.checks.output import new_folder
from nanogap.clip import CLIPVisionConfig
from nanogap.llama import LlamaConfig
from nanogap.llava import LlavaConfig
from nanogap.models import VLM
from nanogap.models.saving import save
from nanogap.weights import read_tokenizer

SEVEN = LlamaConfig(vocab_size=32064, rms_norm_eps=1e-5, max_position_embeddings=4096)
SIZES = {
    "7b": LlavaConfig(SEVEN, CLIPVisionConfig()),
    # 576 patches, and most of the work in the decoder, as in the large ones
    "350m": LlavaConfig(
        replace(SEVEN, hidden_size=1024, intermediate_size=2816, num_hidden_layers=20,
                num_attention_heads=16, num_key_value_heads=16, head_dim=64),
        CLIPVisionConfig(512, 2048, 8, 8)),
    "tiny": LlavaConfig(
        replace(SEVEN, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=4, head_dim=16, vocab_size=640),
        CLIPVisionConfig(32, 64, 3, 2, 56, 14)),
}


@torch.no_grad()
def save_random(size: str, folder: Path, dtype: torch.dtype) -> None:
    """Write normal weights of deviation fan_in^-1/2: signals neither explode nor vanish."""
    with new_folder("--save", folder) as partial:
        tokenizer = read_tokenizer(MINI)
        with torch.device("meta"):
            model = VLM(replace(SIZES[size], image_token=tokenizer.token_to_id("<image>") or 0))
        model.to(dtype).to_empty(device="cpu")
        model.tokenizer = tokenizer
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                fan_in = (parameter[0] if parameter.dim() > 1 else parameter).numel()
                parameter.normal_(std=fan_in ** -0.5, generator=generator)
        save(partial, model, dtype)
