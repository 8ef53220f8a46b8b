"""What is made of what: one function for each form in which a model is published.

In:  the pieces.  Out: a recipe: what config.json says, the tokenizer, and every tensor of the new
folder with the way to make it.

    llava       LLaVA's own layout of 1.5 and 1.6: other names, the vision tower apart or inside
    shikra      a difference to LLaMA-7B, and CLIP
    minigpt_v2  Llama-2-7b-chat, EVA's tower, and what was trained, LoRA among it
"""

import math
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Size, Tensor

from nanogap import weights
from nanogap.checks.command import shown, tell
from nanogap.checks.explain import look_at_clip
from nanogap.checks.loading import snapshot
from nanogap.checks.pickles import read_saved
from nanogap.checks.reading import optional, printable, read_json
from nanogap.checks.silent import (
    PIXELS,
    check_clip,
    check_pixels,
    read_processor,
    refuse_quantised,
    require_all,
)
from nanogap.clip import CLIPVisionConfig
from nanogap.convert.pieces import Part, Piece
from nanogap.convert.sentencepiece import read_llama_tokenizer
from nanogap.errors import NanogapError
from nanogap.models import MODELS
from nanogap.models.saving import our_name

LLAMA = ("`hf download huggyllama/llama-7b --exclude '*.bin*' --local-dir weights/llama-7b` "
         "(13 GB)")
LLAMA_2 = ("`hf download meta-llama/Llama-2-7b-chat-hf --exclude '*.bin*' --local-dir "
           "weights/llama-2-7b-chat-hf` (13 GB)")
LLAVA = "`hf download liuhaotian/llava-v1.5-7b --local-dir weights/llava-v1.5-7b` (14 GB)"
DELTA = ("`hf download shikras/shikra-7b-delta-v1 --local-dir weights/shikra-7b-delta-v1` "
         "(13 GB)")
CLIPS = {   # by the picture's side in pixels, the two that are published
    224: ("`hf download openai/clip-vit-large-patch14 model.safetensors config.json "
          "tokenizer.json --local-dir weights/clip-vit-large-patch14` (1.7 GB)"),
    336: ("`hf download openai/clip-vit-large-patch14-336 pytorch_model.bin config.json "
          "tokenizer.json --local-dir weights/clip-vit-large-patch14-336` (1.7 GB)")}
EVA = "the link to it in MiniGPT-4's minigpt4/models/eva_vit.py (2 GB)"
CHECKPOINT = "the link to it in MiniGPT-4's README"

# names in LLaVA's layout, and Shikra's -> the hub's
LLAVA_NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),               # 1.6: inside
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.mm_projector\.", "multi_modal_projector."),                    # Shikra: one Linear
    (r"^model\.image_newline$", "image_newline"),
    (r"^(model\.(embed_tokens|layers|norm)\.|lm_head\.)", r"language_model.\1"))
CLIP_NAMES = ((r"^vision_model\.", "vision_tower.vision_model."),)
ROWS = ("model.embed_tokens.weight", "lm_head.weight")     # a row for each token
HEAD = 64                                                  # channels of a head, in all of CLIP's
# keys of a decoder's config.json that say something of it
DECODER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
           "rope_parameters", "max_position_embeddings", "hidden_act", "attention_bias",
           "mlp_bias", "sliding_window", "partial_rotary_factor")
# what would change an answer and is not implemented: key -> the values that change nothing
LLAVA_KEYS: dict[str, tuple] = {
    "mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,), "mm_use_im_patch_token": (False,),
    "mm_resampler_type": (None,), "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "image_aspect_ratio": ("pad", "anyres")}
SHIKRA_KEYS: dict[str, tuple] = {
    "mm_use_im_start_end": (True,), "mm_vision_select_feature": ("patch",)}


@dataclass(frozen=True)
class Recipe:
    """All that a new folder will hold."""

    config: dict              # config.json: what cannot be told from the tensors
    tokenizer: Tokenizer
    dtype: torch.dtype
    parts: dict[str, Part]    # by name on disk
    pieces: dict[str, Piece]  # the piece to which names belong that begin so; "": all others


# ----- what several need --------------------------------------------------------------------------


def decoder_config(config: dict, kind: str, rows: int) -> dict:
    """text_config: what a config.json says of its decoder; beginning and end are LLaMA's."""
    text = {key: config[key] for key in DECODER if key in config}
    return text | {"model_type": kind, "vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2}


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


def read_clip(path: Path | None, config: dict, source: Path) -> tuple[CLIPVisionConfig, Piece]:
    """A CLIP whose tower a model took as it is, and its sizes.

    source: whose config.json names it
    """
    name = printable(str(config.get("mm_vision_tower")))
    side, other = (336, 224) if name.endswith("-336") else (224, 336)
    download = CLIPS[side]
    if path is None:
        raise NanogapError(f"{source} holds no vision tower ({name} is its own); get it with "
                           f"{download} and give it by --clip")
    folder = snapshot(path)
    if not (folder / "config.json").is_file():
        raise NanogapError(f"{folder} has no config.json, so it is no CLIP; get it with {download}")
    vision = clip_vision(folder)
    if vision.image_size == other and vision.hidden_size == CLIPVisionConfig().hidden_size:
        raise NanogapError(f"{folder} is a CLIP for {other} pixels, and {source} was trained with "
                           f"{name}; get that with {download}")
    return vision, Piece(folder, download)


def clip_vision(folder: Path) -> CLIPVisionConfig:
    """The sizes of a CLIP's vision tower, whose own files must agree with one another."""
    look_at_clip(folder)
    check_clip(folder)
    found = weights.known(CLIPVisionConfig,
                          weights.read_json(folder / "config.json")["vision_config"])
    vision = replace(weights.VIT_B_32, **found)
    file, processor = read_processor(folder)
    check_pixels(f"{folder / file}", processor, {"model_type": "clip"}, PIXELS, vision)
    return vision


def check_width(folder: Path, config: dict, vision: CLIPVisionConfig) -> None:
    """Refuse a CLIP of another width than the projector was made for."""
    require_all(config, {"mm_hidden_size": (vision.hidden_size,)}, str(folder / "config.json"))


def check_together(one: Path, other: Path, keys: Sequence[str], download: str) -> None:
    """Refuse two pieces whose config.json say different things of one decoder."""
    ours, theirs = (read_json(folder / "config.json") for folder in (one, other))
    for key in keys:
        a, b = ours.get(key), theirs.get(key)
        if a is not None and b is not None and a != b:
            raise NanogapError(f"{one / 'config.json'}: {key} is {shown(a)}, and "
                               f"{other / 'config.json'} has {shown(b)}: the pieces belong to "
                               f"different models; get the base with {download}")


def clip_parts(clip: Piece, dtype: torch.dtype) -> dict[str, Part]:
    """The vision tower of a CLIP."""
    return clip.parts(CLIP_NAMES, dtype, wanted=r"^vision_model\.")


def vision_config(vision: CLIPVisionConfig) -> dict:
    """As config.json says it."""
    return asdict(vision) | {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}


# ----- LLaVA --------------------------------------------------------------------------------------


def llava(base: Path, clip: Path | None) -> Recipe:
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
    refuse_quantised(base, config)
    require_all(config, LLAVA_KEYS, str(base / "config.json"))
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
    if any(name.startswith("vision_tower.") for name in parts):
        vision = clip_vision(snapshot(clip)) if clip else tower_sizes(parts, base)
    else:
        vision, tower = read_clip(clip, config, base)
        check_width(base, config, vision)
        parts |= clip_parts(tower, dtype)
        pieces["vision_tower."] = tower
    new = {"model_type": model, "image_token_index": rows, "projector_hidden_act": "gelu",
           "vision_feature_layer": config.get("mm_vision_select_layer", -2),
           "text_config": decoder_config(config, kinds[kind], new_rows),
           "vision_config": vision_config(vision)}
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
    return Part(Size((rows, *piece.shapes[name][1:])), dtype, make, source)


def tower_sizes(parts: dict[str, Part], base: Path) -> CLIPVisionConfig:
    """The sizes of a vision tower, from its tensors; CLIP's heads have 64 channels each."""
    prefix = "vision_tower.vision_model."
    shapes = {name.removeprefix(prefix): part.shape for name, part in parts.items()}
    layers = {re.sub(r"\D.*", "", name.removeprefix("encoder.layers."))
              for name in shapes if name.startswith("encoder.layers.")}
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


# ----- Shikra -------------------------------------------------------------------------------------


def shikra(base: Path, delta: Path, clip: Path) -> Recipe:
    """Shikra-7B: what is published is a difference to LLaMA-7B, and no vision tower.

    source: mllm/models/shikra/apply_delta.py of shikras/shikra, which adds in float16
    """
    base, delta = snapshot(base), snapshot(delta)
    config = read_json(delta / "config.json")
    if config.get("model_type") != "shikra":
        raise NanogapError(f"{delta / 'config.json'} describes a {config.get('model_type')!r:.80} "
                           f"model, not 'shikra'; get the difference with {DELTA}")
    check_llama(base, LLAMA)
    refuse_quantised(delta, config)
    check_together(base, delta, DECODER, LLAMA)
    require_all(config, SHIKRA_KEYS, str(delta / "config.json"))
    special = MODELS["shikra"].special_tokens
    difference, llama = Piece(delta, DELTA), Piece(base, LLAMA)
    rows = rows_of(difference)
    tokenizer = read_tokenizer(delta, special, rows)
    for token, i in optional(delta / "added_tokens.json").items():
        if tokenizer.token_to_id(token) != i:
            raise NanogapError(f"{delta / 'added_tokens.json'} gives {printable(token)} the ID "
                               f"{i!r:.80}, and Shikra's code {tokenizer.token_to_id(token)}; get "
                               f"the difference with {DELTA}")
    dtype = torch.float16
    parts = {}
    for name in llama.files:
        difference.shape(name)                            # a base of more layers is another
    for name in difference.files:
        part = difference.part(name, dtype)
        if not name.startswith("model.mm_projector."):
            part = added(difference, llama, name, len(special))
        parts[our_name(name, LLAVA_NAMES)] = part
    vision, tower = read_clip(clip, config, delta)
    check_width(delta, config, vision)
    parts |= clip_parts(tower, dtype)
    new = {"model_type": "shikra", "image_token_index": rows - len(special),
           "vision_feature_layer": config.get("mm_vision_select_layer", -2),
           "text_config": decoder_config(config, "llama", rows),
           "vision_config": vision_config(vision)}
    return Recipe(new, tokenizer, dtype, parts, {"vision_tower.": tower, "": difference})


def check_llama(folder: Path, download: str) -> dict:
    """The config.json of a language model alone."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != "llama":
        raise NanogapError(f"{folder / 'config.json'} describes a "
                           f"{config.get('model_type')!r:.80} model, not 'llama'; get it with "
                           f"{download}")
    refuse_quantised(folder, config)
    return config


def added(difference: Piece, base: Piece, name: str, new_rows: int) -> Part:
    """LLaMA's tensor and the difference to it; for the new tokens the difference is all there is.
    """
    shape, old = difference.shapes[name], base.shape(name)
    same = shape == old
    if not same and not (name in ROWS and shape == Size((old[0] + new_rows, *old[1:]))):
        raise NanogapError(f"{base.where(name)} is {list(old)}, and the difference to it in "
                           f"{difference.files[name]} is {list(shape)}; get the base that belongs "
                           f"to it with {base.download}")

    def make() -> Tensor:
        total = difference.get(name).to(torch.float16, copy=True)
        total[:old[0]] += base.get(name).to(torch.float16)
        return total

    return Part(shape, torch.float16, make, difference.where(name))


# ----- MiniGPT-v2 ---------------------------------------------------------------------------------

BLOCKS = 39                  # of EVA's 40 that MiniGPT-v2 runs
EVA_HEAD = 88                # channels of a head
EVA_WIDTH = 1408             # channels of the published tower
LORA = re.compile(r"^llama_model\.base_model\.model\.(.+)\.lora_([AB])(\.default)?\.weight$")
TRAINED = re.compile(r"^(llama_proj|ln_vision)\.(weight|bias)$")


def minigpt_v2(base: Path, vision: Path, checkpoint: Path) -> Recipe:
    """MiniGPT-v2: Llama-2-7b-chat-hf, LAVIS' eva_vit_g.pth, and a checkpoint of its training.

    What was frozen in training is in neither of the last two: `ln_vision` was, from its beginning,
    so it normalises and no more.  All tensors keep the precision that they are published in.
    """
    base = snapshot(base)
    config = check_llama(base, LLAMA_2)
    llama, eva, trained = Piece(base, LLAMA_2), Piece(vision, EVA), Piece(checkpoint, CHECKPOINT)
    settings = training_settings(checkpoint, eva.shape("patch_embed.proj.weight")[0])
    if config.get("hidden_size") == 4096 and config.get("max_position_embeddings") == 2048:
        raise NanogapError(f"{base / 'config.json'}: max_position_embeddings is 2048, which is "
                           f"LLaMA-1's or Vicuna's; MiniGPT-v2 stands on Llama-2: get {LLAMA_2}")
    rows = rows_of(llama)
    tokenizer = read_tokenizer(base, (), rows)
    sizes, parts = eva_parts(eva, settings)
    parts |= llama.parts(((r"^", "llama_model."),))
    loras: dict[str, dict[str, str]] = {}
    for name in trained.files:
        if TRAINED.search(name):
            parts[name] = trained.part(name)
        elif found := LORA.search(name):
            loras.setdefault(found[1], {})[found[2]] = name
        else:
            raise NanogapError(f"{trained.where(name)} is no part of what MiniGPT-v2 trains; "
                               f"get the file by {CHECKPOINT}")
    if not loras:
        raise NanogapError(f"{checkpoint} holds no LoRA of a decoder (such as ...q_proj.lora_A); "
                           f"get the file by {CHECKPOINT}")
    for target, names in loras.items():
        parts[f"llama_model.{target}.weight"] = merged(llama, trained, target, names, settings)
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        parts.setdefault(f"ln_vision.{name}", constant(sizes["hidden_size"], value))
    new = {"model_type": "minigpt_v2", "image_token_index": rows, "vision_config": sizes,
           "text_config": decoder_config(config, "llama", rows)}
    dtype = llama.dtype(ROWS[0])
    pieces = {"visual_encoder.": eva, "llama_proj.": trained, "": llama}
    return Recipe(new, tokenizer, dtype, parts, pieces)


def training_settings(checkpoint: Path, width: int) -> dict:
    """The settings of the training that a checkpoint comes from, as far as they are needed here.

    width: of the vision tower; what is not said can be known of the published one only
    """
    found = read_saved(checkpoint).get("config")
    if isinstance(found, Namespace):
        found = vars(found)
    model = found.get("model") if isinstance(found, dict) else None
    model = model if isinstance(model, dict) else {}
    if model.get("arch", "minigpt_v2") != "minigpt_v2":
        raise NanogapError(f"{checkpoint} is of a training of {shown(model['arch'])}, and not of "
                           f"'minigpt_v2'; get the file by {CHECKPOINT}")
    settings = {"image_size": 448, "lora_alpha": 16, "lora_r": 0}             # of MiniGPT-v2
    for key in ("image_size", "lora_alpha"):
        if key not in model and width != EVA_WIDTH:
            raise NanogapError(f"{checkpoint}: its config says no {key}, and the vision tower is "
                               f"not the published one; get the file by {CHECKPOINT}")
    for key in settings:
        value = model.get(key, settings[key])
        least = 0 if key == "lora_r" else 1               # 0: it is not said
        if type(value) is not int or not least <= value < 1 << 16:
            raise NanogapError(f"{checkpoint}: {key} is {value!r:.80} in its config, not a whole "
                               f"number above 0; get the file by {CHECKPOINT}")
        settings[key] = value
    return settings


def eva_parts(eva: Piece, settings: dict) -> tuple[dict, dict[str, Part]]:
    """EVA's tower: its sizes, and its tensors without those that MiniGPT-v2 leaves out."""
    numbers = {int(name.split(".")[1]) for name in eva.files if re.match(r"blocks\.\d+\.", name)}
    depth = min(len(numbers), BLOCKS)
    blocks = "|".join(map(str, range(depth)))
    wanted = rf"^(cls_token|pos_embed|patch_embed\.|blocks\.({blocks})\.)"
    left = [name for name in eva.files if not re.search(wanted, name)]
    if left:
        tell(f"{eva.path}: MiniGPT-v2 leaves out {len(left)} of its tensors, such as "
             f"{printable(left[0])}")
    convolution = eva.shape("patch_embed.proj.weight")
    inner = eva.shape("blocks.0.mlp.fc1.weight")
    if len(convolution) != 4 or convolution[0] % EVA_HEAD:
        raise NanogapError(f"{eva.where('patch_embed.proj.weight')} is {list(convolution)}, and "
                           f"EVA's has a multiple of {EVA_HEAD} channels; get the file by {EVA}")
    hidden, patch = convolution[0], convolution[-1]
    sizes = {"model_type": "eva_vit_g", "hidden_size": hidden, "intermediate_size": inner[0],
             "num_hidden_layers": depth, "num_attention_heads": hidden // EVA_HEAD,
             "image_size": settings["image_size"], "patch_size": patch, "hidden_act": "gelu"}
    return sizes, eva.parts(((r"^", "visual_encoder."),), wanted=wanted)


def merged(llama: Piece, trained: Piece, target: str, names: dict[str, str],
           settings: dict) -> Part:
    """A matrix of the decoder with its LoRA in it: W + alpha / r * B A, added in float32.

    W: (out, in), B: (out, r), A: (r, in)
    """
    name = f"{target}.weight"
    shape, dtype = llama.shape(name), llama.dtype(name)
    halves = [trained.shape(names[half]) if half in names else Size() for half in "AB"]
    rank = max(halves[0][:1], default=0)
    if halves != [Size((rank, shape[-1])), Size((shape[0], rank))] or rank == 0:
        found = " and ".join(str(list(half)) for half in halves)
        raise NanogapError(f"{trained.path}: LoRA's A and B of {target} are {found}, and do not "
                           f"make a change to its {list(shape)}; get the file by {CHECKPOINT}")
    if settings.get("lora_r", rank) not in (0, rank):
        raise NanogapError(f"{trained.path}: LoRA's A and B of {target} have rank {rank}, and its "
                           f"config says lora_r {settings['lora_r']}; get the file by "
                           f"{CHECKPOINT}")
    scale = settings["lora_alpha"] / rank

    def make() -> Tensor:
        change = trained.get(names["B"]).float() @ trained.get(names["A"]).float()
        return (llama.get(name) + scale * change).to(dtype)

    return Part(shape, dtype, make, llama.where(name))


def constant(size: int, value: float) -> Part:
    """A vector that no piece holds."""
    return Part(Size((size,)), torch.float32, lambda: torch.full((size,), value), "ln_vision")


RECIPES = {"llava": llava, "shikra": shikra, "minigpt-v2": minigpt_v2}
