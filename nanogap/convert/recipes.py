"""What is made of what, for each model that is published in pieces.

In:  the pieces.  Out: a recipe: what config.json says, the tokenizer's own tokens, and a function
that makes the tensors of the new folder.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanogap.checks.command import shown
from nanogap.checks.explain import look_through
from nanogap.checks.pickles import read_saved
from nanogap.checks.silent import Table, check_clip, require
from nanogap.convert.tensors import Piece
from nanogap.errors import NanogapError
from nanogap.llama import LlamaConfig
from nanogap.models import MODELS
from nanogap.models.saving import our_name
from nanogap.weights import known, read_json


@dataclass(frozen=True)
class Recipe:
    """All that a new folder will hold."""

    config: dict                       # config.json: what cannot be told from the tensors
    special_tokens: tuple[str, ...]    # behind those of tokenizer.model
    pieces: tuple[Piece, ...]          # tokenizer.model and the config come from the first
    # the pieces -> the new tensors, one by one, by their names on disk
    make: Callable[..., Iterator[tuple[str, Tensor]]]


# ----- what several need --------------------------------------------------------------------------

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"     # a row for each token
# names in LLaVA's layout, Shikra's and CLIP's -> the hub's
LLAVA_NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),               # 1.6: inside
    (r"^vision_model\.", "vision_tower.vision_model."),                       # CLIP
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.mm_projector\.", "multi_modal_projector."),                    # Shikra: one Linear
    (r"^model\.image_newline$", "image_newline"),
    (r"^(model\.(embed_tokens|layers|norm)\.|lm_head\.)", r"language_model.\1"))


def config_of(model: str, published: dict, vision: dict, dtype: torch.dtype,
              tokens: int, rows: int) -> dict:
    """config.json, as far as the loader needs it; beginning and end of a text are LLaMA's.

    published: what says the decoder's sizes;  vision: those of the tower
    tokens:    of tokenizer.model, behind which the image's stands;  rows: of embeddings
    """
    kind = "mistral" if published["model_type"] == "llava_mistral" else "llama"
    return {"model_type": model, "torch_dtype": str(dtype), "image_token_index": tokens,
            "vision_feature_layer": published.get("mm_vision_select_layer"),
            "vision_config": vision, "text_config": published | {
                "model_type": kind, "vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2}}


def tower_sizes(piece: Piece, patches: str, channels: int) -> dict[str, int]:
    """What the tensors of a vision tower tell of its vision_config.

    patches: name of the matrix that patches are embedded by;  channels: of a head
    """
    hidden, _, _, patch = piece[patches].shape
    layers = [tensor for name, tensor in piece.items() if name.endswith("mlp.fc1.weight")]
    if not layers:
        raise NanogapError(f"{piece.path} holds another kind of tower; get it with "
                           f"{piece.download}")
    return {"hidden_size": hidden, "intermediate_size": len(layers[0]), "patch_size": patch,
            "num_hidden_layers": len(layers), "num_attention_heads": hidden // channels}


def read_clip(path: Path | None, config: dict) -> tuple[dict, Piece]:
    """A CLIP whose tower a model took as it is: its vision_config and its tensors.

    config: of the model, as it is published
    """
    of_336 = str(config.get("mm_vision_tower")).endswith("-336")
    download = MODELS["llava" if of_336 else "shikra"].clip_download
    if path is None:
        raise NanogapError(f"the vision tower is apart; get it with {download} and give it by "
                           "--clip")
    look_through(path, {"clip": f"get the CLIP with {download}"})
    check_clip(path)
    vision = read_json(path / "config.json")["vision_config"]
    size = vision.get("image_size", 224)
    if size == (224 if of_336 else 336):
        raise NanogapError(f"{path} is a CLIP for {size} pixels, and the model was trained with "
                           f"another; get it with {download}")
    return vision, Piece(path, download, wanted=r"^vision_model\.")


# ----- LLaVA --------------------------------------------------------------------------------------

LLAVA = "`hf download liuhaotian/llava-v1.5-7b --local-dir weights/llava-v1.5-7b` (14 GB)"
KINDS = ("llava", "llava_llama", "llava_mistral")      # `model_type` in LLaVA's own layout
# what would change an answer and is not implemented: key -> the values that change nothing
LLAVA_KEYS: Table = {
    "mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,), "mm_use_im_patch_token": (False,),
    "mm_resampler_type": (None,), "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "image_aspect_ratio": ("pad", "anyres")}
INSIDE = "model.vision_tower.vision_tower.vision_model.embeddings."   # of a tower that 1.6 holds


def llava(base: Path, clip: Path | None = None) -> Recipe:
    """LLaVA-1.5 and 1.6 as liuhaotian's repositories hold them.

    base: config.json with LLaVA's own keys, tokenizer.model, shards
    clip: the CLIP that the tower comes from; not needed where the tower is in `base`
    """
    piece = Piece(base, LLAVA)
    config = piece.config(*KINDS)
    if not config.get("mm_vision_tower"):
        raise NanogapError(f"{base} is not in LLaVA's own layout; give it to run.py as it is "
                           f"by --weights, or get one that is with {LLAVA}")
    require(config, LLAVA_KEYS, str(base / "config.json"))
    if f"{INSIDE}position_embedding.weight" in piece:
        vision = tower_sizes(piece, f"{INSIDE}patch_embedding.weight", channels=64)
        grid = math.isqrt(len(piece[f"{INSIDE}position_embedding.weight"]) - 1)
        vision["image_size"] = vision["patch_size"] * grid
    else:
        vision, tower = read_clip(clip, config)
        piece.update(tower)
    tiles = config.get("image_aspect_ratio") == "anyres"
    model = "llava_next" if tiles else "llava"
    special, embeddings = MODELS[model].special_tokens, piece[EMBEDDINGS]
    rows = 64 * math.ceil((len(embeddings) + len(special)) / 64)              # as the hub has it
    new = config_of(model, config, vision, embeddings.dtype, tokens=len(embeddings), rows=rows)
    if tiles:   # LLaVA's own code reads (width, height), and the hub's the reverse
        new["image_grid_pinpoints"] = [
            pair[::-1] for pair in config.get("image_grid_pinpoints") or []]
    return Recipe(new, special, (piece,), partial(llava_tensors, rows))


def llava_tensors(rows: int, piece: Piece) -> Iterator[tuple[str, Tensor]]:
    """All in one precision, and so many rows of embeddings."""
    dtype = piece[EMBEDDINGS].dtype
    for name, tensor in piece.items():
        tensor = tensor.to(dtype)
        if name in (EMBEDDINGS, HEAD):
            tensor = with_rows(tensor, rows)
        yield our_name(name, LLAVA_NAMES), tensor


def with_rows(old: Tensor, rows: int) -> Tensor:
    """Embeddings with rows for <image> and <pad>, and up to a round number, as the hub has them.

    They are the mean of the others, so no such token is ever the likeliest.
    """
    mean = old.mean(0, keepdim=True, dtype=torch.float32).to(old.dtype)
    return torch.cat([old, mean.expand(rows - len(old), -1)])


# ----- Shikra -------------------------------------------------------------------------------------

LLAMA = "`hf download huggyllama/llama-7b --exclude '*.bin*' --local-dir weights/llama-7b` (13 GB)"
DELTA = "`hf download shikras/shikra-7b-delta-v1 --local-dir weights/shikra-7b-delta-v1` (13 GB)"


def shikra(base: Path, delta: Path, clip: Path) -> Recipe:
    """Shikra-7B: what is published is a difference to LLaMA-7B, and no vision tower."""
    llama, difference = Piece(base, LLAMA), Piece(delta, DELTA)
    config, of_base = difference.config("shikra"), llama.config("llama")
    for key, ours in known(LlamaConfig, config).items():
        theirs = of_base.get(key)
        if key != "vocab_size" and None not in (ours, theirs) and ours != theirs:
            raise NanogapError(f"{base / 'config.json'}: {key} is {shown(theirs)}, and that of "
                               f"{delta} {shown(ours)}: the pieces belong to different models; "
                               f"get the base with {LLAMA}")
    vision, tower = read_clip(clip, config)
    difference.update(tower)
    special, rows = MODELS["shikra"].special_tokens, len(difference[EMBEDDINGS])
    new = config_of("shikra", config, vision, torch.float16, tokens=rows - len(special), rows=rows)
    return Recipe(new, special, (difference, llama), shikra_tensors)


def shikra_tensors(difference: Piece, llama: Piece) -> Iterator[tuple[str, Tensor]]:
    """The sums, in float16; what LLaMA has none of is in the difference as it is.

    source: mllm/models/shikra/apply_delta.py of shikras/shikra
    """
    for name, tensor in difference.items():
        tensor = tensor.to(torch.float16, copy=True)
        if not name.startswith(("model.mm_projector.", "vision_model.")):
            base = llama[name].to(torch.float16)
            tensor[:len(base)] += base       # of embeddings, Shikra's own tokens are behind LLaMA's
        yield our_name(name, LLAVA_NAMES), tensor


# ----- MiniGPT-v2 ---------------------------------------------------------------------------------

LLAMA_2 = ("`hf download meta-llama/Llama-2-7b-chat-hf --exclude '*.bin*' "
           "--local-dir weights/llama-2-7b-chat-hf` (13 GB)")
EVA = "the link to it in MiniGPT-4's minigpt4/models/eva_vit.py (2 GB)"
CHECKPOINT = "the link to it in MiniGPT-4's README"
EVA_NAMES = r"^(cls_token|pos_embed|patch_embed\.|blocks\.([12]?\d|3[0-8])\.)"     # 39 of 40 blocks
# two matrices of the LoRA of each; newer versions of peft have `default` in the name
LORA_NAMES = ((r"^llama_model\.base_model\.model\.(.+\.lora_[AB])(\.default)?\.weight$", r"\1"),)


def minigpt_v2(base: Path, vision: Path, checkpoint: Path) -> Recipe:
    """MiniGPT-v2: Llama-2-7b-chat-hf, LAVIS' eva_vit_g.pth, and a checkpoint of its training."""
    llama, eva = Piece(base, LLAMA_2), Piece(vision, EVA, EVA_NAMES)
    trained = Piece(checkpoint, CHECKPOINT)
    config = llama.config("llama")
    if config.get("max_position_embeddings") == 2048:
        raise NanogapError(f"{base / 'config.json'}: max_position_embeddings is 2048, which is "
                           f"LLaMA-1's or Vicuna's; MiniGPT-v2 stands on Llama-2: get {LLAMA_2}")
    if not any("lora_A" in name for name in trained):
        raise NanogapError(f"{checkpoint} holds no LoRA of the decoder; get the file by "
                           f"{CHECKPOINT}")
    # what a training says of its model; what it does not say is as in the published ones
    said = (read_saved(checkpoint).get("config") or {}).get("model", {})
    settings = {"image_size": 448, "lora_alpha": 16} | said
    sizes = tower_sizes(eva, "patch_embed.proj.weight", channels=88)
    sizes["image_size"] = settings["image_size"]
    rows, dtype = len(llama[EMBEDDINGS]), llama[EMBEDDINGS].dtype
    new = config_of("minigpt_v2", config, sizes, dtype, tokens=rows, rows=rows)
    return Recipe(new, (), (llama, eva, trained),
                  partial(minigpt_tensors, settings["lora_alpha"]))


def minigpt_tensors(alpha: float, llama: Piece, eva: Piece,
                    trained: Piece) -> Iterator[tuple[str, Tensor]]:
    """The three together, the LoRA merged; each tensor in the precision that it is published in.

    What was trained stands before what it began with.  What was frozen is in neither of the last
    two: `ln_vision` was, from its beginning, so it normalises and no more.
    """
    rest = {our_name(name, LORA_NAMES): tensor for name, tensor in trained.items()}
    for name, value in (("ln_vision.weight", 1.0), ("ln_vision.bias", 0.0)):
        yield name, rest.pop(name, torch.full(eva["cls_token"].shape[2:], value))
    for name, tensor in eva.items():
        yield f"visual_encoder.{name}", rest.pop(f"visual_encoder.{name}", tensor)
    for name, tensor in llama.items():
        halves = [name.replace("weight", half) for half in ("lora_A", "lora_B")]
        if rest.keys() >= set(halves):
            a, b = (rest.pop(half).float() for half in halves)                # (r, in), (out, r)
            # W + alpha / r * B A, added in float32
            tensor = (tensor + alpha / len(a) * (b @ a)).to(tensor.dtype)     # (out, in)
        yield f"llama_model.{name}", rest.pop(f"llama_model.{name}", tensor)
    yield from rest.items()
