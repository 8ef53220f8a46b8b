"""What is made of what: one function for each form in which a model is published.

In:  the pieces.  Out: a recipe: what config.json says, the tokenizer, and every tensor of the new
folder with the way to make it.

    llava       LLaVA's own layout of 1.5 and 1.6: other names, the vision tower apart or inside
    shikra      a difference to LLaMA-7B, and CLIP: nanogap/convert/shikra.py
    minigpt_v2  Llama-2-7b-chat, EVA's tower, and what was trained: nanogap/convert/minigpt.py
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Size, Tensor

from nanogap import weights
from nanogap.checks import silent
from nanogap.checks.explain import look_at_clip
from nanogap.checks.loading import snapshot
from nanogap.checks.reading import printable, read_json
from nanogap.clip import CLIPVisionConfig
from nanogap.convert.pieces import Part, Piece
from nanogap.convert.sentencepiece import read_llama_tokenizer
from nanogap.errors import NanogapError
from nanogap.models import MODELS


def download(what: str, gigabytes: float) -> str:
    """The command that gets a repository of the hub, or some of its files."""
    folder = what.split()[0].split("/")[1].lower()
    return f"`hf download {what} --local-dir weights/{folder}` ({gigabytes} GB)"


LLAVA = download("liuhaotian/llava-v1.5-7b", 14)
CLIPS = {   # by the picture's side in pixels, the two that are published
    224: download("openai/clip-vit-large-patch14 model.safetensors config.json tokenizer.json",
                  1.7),
    336: download("openai/clip-vit-large-patch14-336 pytorch_model.bin config.json tokenizer.json",
                  1.7)}

# names in LLaVA's layout, and Shikra's -> the hub's
LLAVA_NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),               # 1.6: inside
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.mm_projector\.", "multi_modal_projector."),                    # Shikra: one Linear
    (r"^model\.image_newline$", "image_newline"),
    (r"^(model\.(embed_tokens|layers|norm)\.|lm_head\.)", r"language_model.\1"))
ROWS = ("model.embed_tokens.weight", "lm_head.weight")     # a row for each token
HEAD = 64                                                  # channels of a head, in all of CLIP's
# keys of a decoder's config.json that say something of it
DECODER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
           "rope_parameters", "max_position_embeddings", "hidden_act", "attention_bias",
           "mlp_bias", "sliding_window", "partial_rotary_factor")
# what would change an answer and is not implemented: key -> the values that change nothing
LLAVA_KEYS: silent.Table = {
    "mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,), "mm_use_im_patch_token": (False,),
    "mm_resampler_type": (None,), "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "image_aspect_ratio": ("pad", "anyres")}


@dataclass(frozen=True)
class Recipe:
    """All that a new folder will hold."""

    config: dict              # config.json: what cannot be told from the tensors
    tokenizer: Tokenizer
    dtype: torch.dtype
    parts: dict[str, Part]    # by name on disk
    pieces: dict[str, Piece]  # the piece to which names belong that begin so; "": all others


# ----- what several need --------------------------------------------------------------------------


def config_of(kind: str, folder: Path, download: str) -> dict:
    """The config.json of a piece that must be of that `model_type`, and not quantised."""
    config = read_json(folder / "config.json")
    found = config.get("model_type")
    if found != kind:
        raise NanogapError(f"{folder / 'config.json'} describes a {found!r:.80} model, not "
                           f"{kind!r}; get it with {download}")
    silent.refuse_quantised(folder, config)
    return config


def decoder_config(config: dict, kind: str, rows: int) -> dict:
    """text_config: what a config.json says of its decoder; beginning and end are LLaMA's."""
    text = {key: config[key] for key in DECODER if key in config}
    return text | {"model_type": kind, "vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2}


def config_with_clip(config: dict, vision: CLIPVisionConfig) -> dict:
    """What is the same in config.json of each model with a CLIP's tower.

    config: as the model is published
    """
    return {"vision_feature_layer": config.get("mm_vision_select_layer", -2),
            "vision_config": asdict(vision) | {"model_type": "clip_vision_model",
                                               "hidden_act": "quick_gelu"}}


def read_tokenizer(folder: Path, special_tokens: Sequence[str], rows: int) -> Tokenizer:
    """The tokenizer of a piece whose embeddings have so many rows."""
    tokenizer = read_llama_tokenizer(folder / "tokenizer.model", special_tokens)
    pieces = tokenizer.get_vocab_size()
    if pieces != rows:
        raise NanogapError(f"{folder / 'tokenizer.model'} makes {pieces} tokens, and the "
                           f"embeddings have {rows} rows; give the one of this model")
    return tokenizer


def rows_of(piece: Piece) -> int:
    """How many embeddings a decoder has, of tokens that it reads and of those that it says."""
    shapes = [piece.shape(name) for name in ROWS]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        raise NanogapError(f"{piece.path} has embeddings {list(shapes[0])} ({ROWS[0]}) and "
                           f"{list(shapes[1])} ({ROWS[1]}); get them again with {piece.download}")
    return shapes[0][0]


def clip_vision(folder: Path, download: str) -> CLIPVisionConfig:
    """The sizes of a CLIP's vision tower, whose own files must agree with one another."""
    look_at_clip(folder, download)
    silent.check_clip(folder)
    config = weights.read_json(folder / "config.json")
    vision = replace(weights.VIT_B_32, **weights.known(CLIPVisionConfig, config["vision_config"]))
    file, processor = silent.read_processor(folder)
    silent.check_pixels(f"{folder / file}", processor, {"model_type": "clip"}, silent.PIXELS,
                        vision)
    return vision


def read_clip(path: Path | None, config: dict, source: Path,
              dtype: torch.dtype) -> tuple[CLIPVisionConfig, Piece, dict[str, Part]]:
    """A CLIP whose tower a model took as it is: the tower's sizes and its tensors.

    config, source: what the model's config.json says, and the folder that it stands in
    """
    name = printable(str(config.get("mm_vision_tower")))
    side, other = (336, 224) if name.endswith("-336") else (224, 336)
    if path is None:
        raise NanogapError(f"{source} holds no vision tower ({name} is its own); get it with "
                           f"{CLIPS[side]} and give it by --clip")
    folder = snapshot(path)
    vision = clip_vision(folder, CLIPS[side])
    if vision.image_size == other and vision.hidden_size == CLIPVisionConfig().hidden_size:
        raise NanogapError(f"{folder} is a CLIP for {other} pixels, and {source} was trained with "
                           f"{name}; get that with {CLIPS[side]}")
    silent.require(config, {"mm_hidden_size": (vision.hidden_size,)}, str(source / "config.json"))
    piece = Piece(folder, CLIPS[side])
    to_hub = ((r"^vision_model\.", "vision_tower.vision_model."),)
    return vision, piece, piece.parts(to_hub, dtype, wanted=r"^vision_model\.")


# ----- LLaVA --------------------------------------------------------------------------------------


def llava(base: Path, clip: Path | None = None) -> Recipe:
    """LLaVA-1.5 and 1.6 as liuhaotian's repositories hold them.

    base: config.json with LLaVA's own keys, tokenizer.model, shards
    clip: the CLIP that the tower comes from; where a tower is in `base`, only its sizes are read
    """
    base = snapshot(base)
    config = read_json(base / "config.json")
    kinds = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
    kind = config.get("model_type")
    if kind not in kinds or "mm_vision_tower" not in config:
        raise NanogapError(f"{base / 'config.json'} describes a {kind!r:.80} model in another "
                           "layout than LLaVA's own (it would have mm_vision_tower); give a folder "
                           f"such as {LLAVA} makes")
    silent.refuse_quantised(base, config)
    silent.require(config, LLAVA_KEYS, str(base / "config.json"))
    piece = Piece(base, LLAVA)
    tiles = config.get("image_aspect_ratio") == "anyres"
    model = "llava_next" if tiles else "llava"
    rows = rows_of(piece)
    special = MODELS[model].special_tokens
    tokenizer = read_tokenizer(base, special, rows + len(special))
    dtype = piece.dtype(ROWS[0])
    parts = piece.parts(LLAVA_NAMES, dtype)
    new_rows = 64 * math.ceil((rows + len(special)) / 64)                     # as the hub has it
    for name in ROWS:
        parts[f"language_model.{name}"] = with_rows(piece, name, new_rows, dtype)
    pieces = {"": piece}
    if not any(name.startswith("vision_tower.") for name in parts):
        vision, pieces["vision_tower."], tower = read_clip(clip, config, base, dtype)
        parts |= tower
    elif clip:
        vision = clip_vision(snapshot(clip), MODELS[model].clip_download)
    else:
        vision = tower_sizes(parts, base)
    new = config_with_clip(config, vision) | {
        "model_type": model, "image_token_index": rows, "projector_hidden_act": "gelu",
        "text_config": decoder_config(config, kinds[kind], new_rows)}
    if tiles:
        new["image_grid_pinpoints"] = pinpoints(config, base)
    return Recipe(new, tokenizer, dtype, parts, pieces)


def pinpoints(config: dict, base: Path) -> list[list[int]]:
    """The sizes of canvases; LLaVA's own code reads (width, height), and the hub's the reverse."""
    found = config.get("image_grid_pinpoints")
    if not isinstance(found, list) or not all(
            isinstance(pair, list) and len(pair) == 2 for pair in found):
        raise NanogapError(f"{base / 'config.json'}: image_grid_pinpoints is {found!r:.80}, not "
                           "pairs of width and height; give the one that was published")
    return [[height, width] for width, height in found]


def with_rows(piece: Piece, name: str, rows: int, dtype: torch.dtype) -> Part:
    """Embeddings with rows for <image> and <pad>, and up to a round number, as the hub has them.

    They are the mean of the others, so no such token is ever the likeliest.
    """
    def make() -> Tensor:
        old = piece.get(name).to(dtype)
        new = old.new_empty(rows, *old.shape[1:])
        new[:len(old)] = old
        new[len(old):] = old.mean(0, dtype=torch.float32)
        return new

    source = f"{piece.where(name)}, with rows for new tokens,"
    return Part(Size((rows, *piece.shape(name)[1:])), dtype, make, source)


def tower_sizes(parts: dict[str, Part], base: Path) -> CLIPVisionConfig:
    """The sizes of a vision tower, from its tensors; CLIP's heads have 64 channels each."""
    prefix = "vision_tower.vision_model."
    shapes = {name.removeprefix(prefix): part.shape for name, part in parts.items()}
    layers = {name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")}
    try:
        hidden, _, _, patch = shapes["embeddings.patch_embedding.weight"]
        grid = math.isqrt(shapes["embeddings.position_embedding.weight"][0] - 1)
        inner = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError):
        raise NanogapError(f"{base} holds a vision tower that is no CLIP's, or not all of it; "
                           "get it again, whole") from None
    if hidden % HEAD:
        raise NanogapError(f"{base} holds a vision tower of {hidden} channels, and how many heads "
                           "it has cannot be told; give the CLIP that it comes from by --clip")
    return CLIPVisionConfig(hidden, inner, len(layers), hidden // HEAD, grid * patch, patch)
