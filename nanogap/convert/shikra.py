"""Shikra-7B: what is published is a difference to LLaMA-7B, and no vision tower.

In:  three folders.  Out: a recipe, as of nanogap/convert/recipes.py.
"""

from pathlib import Path

import torch
from torch import Size, Tensor

from nanogap.checks.command import shown
from nanogap.checks.loading import snapshot
from nanogap.checks.reading import optional, printable
from nanogap.checks.silent import Table, require
from nanogap.convert import recipes
from nanogap.convert.pieces import Part, Piece
from nanogap.errors import NanogapError
from nanogap.models import MODELS
from nanogap.models.saving import our_name

LLAMA = recipes.download("huggyllama/llama-7b --exclude '*.bin*'", 13)
DELTA = recipes.download("shikras/shikra-7b-delta-v1", 13)
SHIKRA_KEYS: Table = {"mm_use_im_start_end": (True,), "mm_vision_select_feature": ("patch",)}


def shikra(base: Path, delta: Path, clip: Path) -> recipes.Recipe:
    """Shikra-7B: what is published is a difference to LLaMA-7B, and no vision tower.

    source: mllm/models/shikra/apply_delta.py of shikras/shikra, which adds in float16
    """
    base, delta = snapshot(base), snapshot(delta)
    config = recipes.config_of("shikra", delta, DELTA)
    check_together(base, recipes.config_of("llama", base, LLAMA), delta, config)
    require(config, SHIKRA_KEYS, str(delta / "config.json"))
    special = MODELS["shikra"].special_tokens
    difference, llama = Piece(delta, DELTA), Piece(base, LLAMA)
    rows = recipes.rows_of(difference)
    tokenizer = recipes.read_tokenizer(delta, special, rows)
    for token, i in optional(delta / "added_tokens.json").items():
        if tokenizer.token_to_id(token) != i:
            raise NanogapError(f"{delta / 'added_tokens.json'} gives {printable(token)} the ID "
                               f"{i!r:.80}, and Shikra's code {tokenizer.token_to_id(token)}; get "
                               f"the difference with {DELTA}")
    dtype, parts = torch.float16, {}
    for name in llama.files:
        difference.shape(name)                            # a base of more layers is another
    for name in difference.files:
        part = difference.part(name, dtype)
        if not name.startswith("model.mm_projector."):
            part = added(difference, llama, name, len(special))
        parts[our_name(name, recipes.LLAVA_NAMES)] = part
    vision, clip_piece, tower = recipes.read_clip(clip, config, delta, dtype)
    new = recipes.config_with_clip(config, vision) | {
        "model_type": "shikra", "image_token_index": rows - len(special),
        "text_config": recipes.decoder_config(config, "llama", rows)}
    pieces = {"vision_tower.": clip_piece, "": difference}
    return recipes.Recipe(new, tokenizer, dtype, parts | tower, pieces)


def check_together(base: Path, of_base: dict, delta: Path, of_delta: dict) -> None:
    """Refuse two folders whose config.json say different things of one decoder."""
    for key in recipes.DECODER:
        a, b = of_base.get(key), of_delta.get(key)
        if a is not None and b is not None and a != b:
            raise NanogapError(f"{base / 'config.json'}: {key} is {shown(a)}, and "
                               f"{delta / 'config.json'} has {shown(b)}: the pieces belong to "
                               f"different models; get the base with {LLAMA}")


def added(difference: Piece, base: Piece, name: str, new_rows: int) -> Part:
    """LLaMA's tensor and the difference to it; for the new tokens the difference is all there is.
    """
    shape, old = difference.shape(name), base.shape(name)
    longer = Size((old[0] + new_rows, *old[1:])) if name in recipes.ROWS else old
    if shape not in (old, longer):
        raise NanogapError(f"{base.where(name)} is {list(old)}, and the difference to it in "
                           f"{difference.files[name]} is {list(shape)}; get the base that belongs "
                           f"to it with {base.download}")

    def make() -> Tensor:
        total = difference.get(name).to(torch.float16, copy=True)
        total[:old[0]] += base.get(name).to(torch.float16)
        return total

    return Part(shape, torch.float16, make, difference.where(name))
