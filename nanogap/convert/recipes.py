"""What is made of what, for each model that is published in pieces.

In:  the pieces.  Out: a recipe: config.json as far as the tensors do not tell it, the pieces, whose
first has the tokenizer.model, and a function from them to the tensors of the new folder.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanogap.checks.command import shown
from nanogap.checks.reading import read_saved
from nanogap.checks.silent import Table, check_clip, require
from nanogap.convert.tensors import Piece
from nanogap.errors import NanogapError
from nanogap.llama import LlamaConfig
from nanogap.models import MODELS
from nanogap.models.saving import our_name
from nanogap.weights import known

Recipe = tuple[dict, tuple[Piece, ...], Callable[..., Iterator[tuple[str, Tensor]]]]
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

    tokens: of tokenizer.model, behind which the image's stands;  rows: of embeddings
    """
    kind = "mistral" if published["model_type"] == "llava_mistral" else "llama"
    return {"model_type": model, "torch_dtype": str(dtype), "image_token_index": tokens,
            "vision_feature_layer": published.get("mm_vision_select_layer"),
            "vision_config": vision, "text_config": published | {
                "model_type": kind, "vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2}}


def tower_sizes(piece: Piece, patch_embedding: str, head_dim: int) -> dict[str, int]:
    """What the tensors of a vision tower tell of its vision_config."""
    hidden, _, _, patch = piece[patch_embedding].shape
    widths = [len(tensor) for name, tensor in piece.items() if name.endswith("mlp.fc1.weight")]
    return {"hidden_size": hidden, "intermediate_size": max(widths, default=0),
            "num_hidden_layers": len(widths), "num_attention_heads": hidden // head_dim,
            "patch_size": patch}


def read_clip(path: Path | None, config: dict) -> tuple[dict, Piece]:
    """The CLIP whose tower a published config names: its vision_config and its tensors."""
    of_336 = str(config.get("mm_vision_tower")).endswith("-336")
    download = MODELS["llava" if of_336 else "shikra"].clip_download
    if path is None:
        raise NanogapError(f"the vision tower is apart; get it with {download} and give it by "
                           "--clip")
    piece = Piece(path, download, wanted=r"^vision_model\.")
    vision = piece.config("clip").get("vision_config", {})
    check_clip(path)
    size = vision.get("image_size", 224)
    if size == (224 if of_336 else 336):
        raise NanogapError(f"{path} is a CLIP for {size} pixels, and the model was trained with "
                           f"another; get it with {download}")
    return vision, piece


# ----- LLaVA --------------------------------------------------------------------------------------

LLAVA = "`hf download liuhaotian/llava-v1.5-7b --local-dir weights/llava-v1.5-7b` (14 GB)"
# what would change an answer and is not implemented: key -> the values that change nothing
LLAVA_KEYS: Table = {
    "mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,), "mm_use_im_patch_token": (False,),
    "mm_resampler_type": (None,), "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "image_aspect_ratio": ("pad", "anyres")}
INSIDE = "model.vision_tower.vision_tower.vision_model.embeddings."   # of a tower that 1.6 holds


def llava(base: Path, clip: Path | None = None) -> Recipe:
    """LLaVA-1.5 and 1.6 as liuhaotian's repositories hold them; 1.6 has its tower in `base`."""
    piece = Piece(base, LLAVA)
    config = piece.config("llava", "llava_llama", "llava_mistral")
    if not config.get("mm_vision_tower"):
        raise NanogapError(f"{base} is not in LLaVA's own layout; give it to run.py as it is "
                           f"by --weights, or get one that is with {LLAVA}")
    require(config, LLAVA_KEYS, str(base / "config.json"))
    if f"{INSIDE}position_embedding.weight" in piece:
        vision = tower_sizes(piece, f"{INSIDE}patch_embedding.weight", head_dim=64)
        grid = math.isqrt(len(piece[f"{INSIDE}position_embedding.weight"]) - 1)
        vision["image_size"] = vision["patch_size"] * grid
    else:
        vision, tower = read_clip(clip, config)
        piece.update(tower)
    model = "llava_next" if config.get("image_aspect_ratio") == "anyres" else "llava"
    tokens = len(piece[EMBEDDINGS])
    with_special = tokens + len(MODELS[model].special_tokens)
    rows = 64 * math.ceil(with_special / 64)                                  # as the hub has it
    new = config_of(model, config, vision, piece[EMBEDDINGS].dtype, tokens, rows)
    if model == "llava_next":   # LLaVA's own code reads (width, height), and the hub's the reverse
        new["image_grid_pinpoints"] = [
            pair[::-1] for pair in config.get("image_grid_pinpoints") or []]
    return new, (piece,), partial(llava_tensors, rows)


def llava_tensors(rows: int, piece: Piece) -> Iterator[tuple[str, Tensor]]:
    """All in one precision; embeddings with rows for <image>, <pad>, and up to a round number.

    Such a row is the mean of the others, so none of these tokens is ever the likeliest.
    """
    dtype = piece[EMBEDDINGS].dtype
    for name, tensor in piece.items():
        tensor = tensor.to(dtype)
        if name in (EMBEDDINGS, HEAD):
            mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(dtype)
            tensor = torch.cat([tensor, mean.expand(rows - len(tensor), -1)])
        yield our_name(name, LLAVA_NAMES), tensor


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
    rows = len(difference[EMBEDDINGS])
    tokens = rows - len(MODELS["shikra"].special_tokens)
    new = config_of("shikra", config, vision, torch.float16, tokens, rows)
    return new, (difference, llama), shikra_tensors


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
    # what a training says of its model; what it does not say is as in the published ones
    said = (read_saved(checkpoint).get("config") or {}).get("model", {})
    settings = {"image_size": 448, "lora_alpha": 16} | said
    sizes = tower_sizes(eva, "patch_embed.proj.weight", head_dim=88)
    sizes["image_size"] = settings["image_size"]
    rows = len(llama[EMBEDDINGS])
    new = config_of("minigpt_v2", config, sizes, llama[EMBEDDINGS].dtype, tokens=rows, rows=rows)
    return new, (llama, eva, trained), partial(minigpt_tensors, settings["lora_alpha"])


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
