"""What is made of what, for LLaVA and Shikra; for MiniGPT-v2: nanogap/convert/minigpt.py.

In:  the pieces.  Out: a recipe: what config.json says, the tokenizer, and every tensor of the new
folder with the way to make it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from nanogap import weights
from nanogap.checks.command import shown
from nanogap.checks.explain import look_through
from nanogap.checks.loading import snapshot
from nanogap.checks.silent import Table, check_clip, require
from nanogap.clip import CLIPVisionConfig
from nanogap.convert.pieces import Part, Piece, parts_of
from nanogap.convert.sentencepiece import read_llama_tokenizer
from nanogap.errors import NanogapError
from nanogap.models import MODELS
from nanogap.models.saving import our_name


@dataclass(frozen=True)
class Recipe:
    """All that a new folder will hold."""

    config: dict              # config.json: what cannot be told from the tensors
    tokenizer: Tokenizer
    parts: dict[str, Part]    # by name on disk
    source: Path              # of the config, for messages


# ----- what several need --------------------------------------------------------------------------

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"     # a row for each token
# keys of a decoder's config.json that say something of it
DECODER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
           "rope_parameters", "max_position_embeddings", "hidden_act", "attention_bias",
           "mlp_bias", "sliding_window", "partial_rotary_factor")
# names in LLaVA's layout, and Shikra's -> the hub's
LLAVA_NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),               # 1.6: inside
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.mm_projector\.", "multi_modal_projector."),                    # Shikra: one Linear
    (r"^model\.image_newline$", "image_newline"),
    (r"^(model\.(embed_tokens|layers|norm)\.|lm_head\.)", r"language_model.\1"))


def decoder_config(config: dict, kind: str, rows: int) -> dict:
    """text_config: what a config.json says of its decoder; beginning and end are LLaMA's."""
    text = {key: config[key] for key in DECODER if key in config}
    return text | {"model_type": kind, "vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2}


def read_tokenizer(piece: Piece, special_tokens: Sequence[str], rows: int) -> Tokenizer:
    """The tokenizer of a piece, of as many tokens as there are rows of embeddings."""
    file = piece.path / "tokenizer.model"
    tokenizer = read_llama_tokenizer(file, special_tokens)
    if tokenizer.get_vocab_size() != rows:
        raise NanogapError(f"{file} makes {tokenizer.get_vocab_size()} tokens, and the "
                           f"embeddings have {rows} rows; give the one of this model")
    return tokenizer


def read_clip(path: Path | None, config: dict,
              dtype: torch.dtype) -> tuple[CLIPVisionConfig, dict[str, Part]]:
    """A CLIP whose tower a model took as it is: the tower's sizes and its tensors.

    config: of the model, as it is published
    """
    of_336 = str(config.get("mm_vision_tower")).endswith("-336")
    download = MODELS["llava" if of_336 else "shikra"].clip_download
    if path is None:
        raise NanogapError(f"the vision tower is apart; get it with {download} and give it by "
                           "--clip")
    folder = snapshot(path)
    look_through(folder, {"clip": f"get the CLIP with {download}"})
    check_clip(folder)
    sizes = weights.read_json(folder / "config.json")["vision_config"]
    vision = replace(weights.VIT_B_32, **weights.known(CLIPVisionConfig, sizes))
    if vision.image_size == (224 if of_336 else 336):
        raise NanogapError(f"{folder} is a CLIP for {vision.image_size} pixels, and the model was "
                           f"trained with another; get it with {download}")
    clip = Piece(folder, download)
    return vision, parts_of(clip, ((r"^", "vision_tower."),), dtype, wanted=r"^vision_model\.")


def config_with_clip(config: dict, vision: CLIPVisionConfig) -> dict:
    """What is the same in config.json of each model with a CLIP's tower."""
    return {"vision_feature_layer": config.get("mm_vision_select_layer", -2),
            "vision_config": asdict(vision) | {"model_type": "clip_vision_model",
                                               "hidden_act": "quick_gelu"}}


# ----- LLaVA --------------------------------------------------------------------------------------

LLAVA = "`hf download liuhaotian/llava-v1.5-7b --local-dir weights/llava-v1.5-7b` (14 GB)"
# `model_type` in LLaVA's own layout -> its decoder's
KINDS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
# what would change an answer and is not implemented: key -> the values that change nothing
LLAVA_KEYS: Table = {
    "mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,), "mm_use_im_patch_token": (False,),
    "mm_resampler_type": (None,), "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "image_aspect_ratio": ("pad", "anyres")}
INSIDE = "model.vision_tower.vision_tower.vision_model."   # a tower that 1.6 holds


def llava(base: Path, clip: Path | None = None) -> Recipe:
    """LLaVA-1.5 and 1.6 as liuhaotian's repositories hold them.

    base: config.json with LLaVA's own keys, tokenizer.model, shards
    clip: the CLIP that the tower comes from; not needed where the tower is in `base`
    """
    piece = Piece(base, LLAVA)
    config = piece.config(*KINDS)
    if not config.get("mm_vision_tower"):
        raise NanogapError(f"{piece.path} is not in LLaVA's own layout; give it to run.py as it is "
                           f"by --weights, or get one that is with {LLAVA}")
    require(config, LLAVA_KEYS, str(piece.path / "config.json"))
    tiles = config.get("image_aspect_ratio") == "anyres"
    model = "llava_next" if tiles else "llava"
    special, embeddings = MODELS[model].special_tokens, piece.empty(EMBEDDINGS)
    rows, dtype = len(embeddings), embeddings.dtype
    tokenizer = read_tokenizer(piece, special, rows + len(special))
    parts = parts_of(piece, LLAVA_NAMES, dtype)
    if any(name.startswith(INSIDE) for name in piece.found):
        vision = tower_sizes(piece)
    else:
        vision, tower = read_clip(clip, config, dtype)
        parts |= tower
    more_rows = 64 * math.ceil((rows + len(special)) / 64)                    # as the hub has it
    for name in (EMBEDDINGS, HEAD):
        longer = partial(with_rows, rows=more_rows, dtype=dtype)
        parts[f"language_model.{name}"] = Part(longer, (piece, name))
    new = config_with_clip(config, vision) | {
        "model_type": model, "torch_dtype": str(dtype), "image_token_index": rows,
        "text_config": decoder_config(config, KINDS[config["model_type"]], more_rows)}
    if tiles:   # LLaVA's own code reads (width, height), and the hub's the reverse
        new["image_grid_pinpoints"] = [
            pair[::-1] for pair in config.get("image_grid_pinpoints") or []]
    return Recipe(new, tokenizer, parts, piece.path)


def with_rows(old: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Embeddings with rows for <image> and <pad>, and up to a round number, as the hub has them.

    They are the mean of the others, so no such token is ever the likeliest.
    """
    mean = old.to(dtype).mean(0, keepdim=True, dtype=torch.float32).to(dtype)
    return torch.cat([old.to(dtype), mean.expand(rows - len(old), -1)])


def tower_sizes(piece: Piece) -> CLIPVisionConfig:
    """The sizes of a vision tower that a LLaVA holds; CLIP's heads have 64 channels each."""
    hidden, _, _, patch = piece.empty(f"{INSIDE}embeddings.patch_embedding.weight").shape
    positions = len(piece.empty(f"{INSIDE}embeddings.position_embedding.weight"))
    inner = len(piece.empty(f"{INSIDE}encoder.layers.0.mlp.fc1.weight"))
    layers = sum(name.endswith("mlp.fc1.weight") for name in piece.found)
    side = patch * math.isqrt(positions - 1)
    return CLIPVisionConfig(hidden, inner, layers, hidden // 64, side, patch)


# ----- Shikra -------------------------------------------------------------------------------------

LLAMA = "`hf download huggyllama/llama-7b --exclude '*.bin*' --local-dir weights/llama-7b` (13 GB)"
DELTA = "`hf download shikras/shikra-7b-delta-v1 --local-dir weights/shikra-7b-delta-v1` (13 GB)"
SHIKRA_KEYS: Table = {"mm_use_im_start_end": (True,), "mm_vision_select_feature": ("patch",)}


def shikra(base: Path, delta: Path, clip: Path) -> Recipe:
    """Shikra-7B: what is published is a difference to LLaMA-7B, and no vision tower.

    source: mllm/models/shikra/apply_delta.py of shikras/shikra, which adds in float16
    """
    llama, difference = Piece(base, LLAMA), Piece(delta, DELTA)
    config = difference.config("shikra")
    require(config, SHIKRA_KEYS, str(difference.path / "config.json"))
    of_base = llama.config("llama")
    for key in DECODER:
        a, b = of_base.get(key), config.get(key)
        if a is not None and b is not None and a != b:
            raise NanogapError(f"{llama.path / 'config.json'}: {key} is {shown(a)}, and that of "
                               f"{difference.path} {shown(b)}: the pieces belong to different "
                               f"models; get the base with {LLAMA}")
    special, rows = MODELS["shikra"].special_tokens, len(difference.empty(EMBEDDINGS))
    tokenizer = read_tokenizer(difference, special, rows)
    parts = parts_of(difference, LLAVA_NAMES, torch.float16)
    for name in difference.found:
        if not name.startswith("model.mm_projector."):
            more = len(special) if name in (EMBEDDINGS, HEAD) else 0
            parts[our_name(name, LLAVA_NAMES)] = Part(
                partial(added, more), (difference, name), (llama, name))
    vision, tower = read_clip(clip, config, torch.float16)
    new = config_with_clip(config, vision) | {
        "model_type": "shikra", "torch_dtype": "float16", "image_token_index": rows - len(special),
        "text_config": decoder_config(config, "llama", rows)}
    return Recipe(new, tokenizer, parts | tower, difference.path)


def added(more: int, difference: Tensor, base: Tensor) -> Tensor:
    """The sum; in rows of Shikra's own tokens, `more` behind LLaMA's, the difference is all."""
    base = base.to(torch.float16)
    if more:
        base = F.pad(base, (0, 0, 0, more))
    return difference.to(torch.float16) + base
