"""MiniGPT-v2 out of three pieces: Llama-2-7b-chat, EVA's tower, and what was trained.

In:  a folder and two pickles.  Out: a recipe, as of nanogap/convert/recipes.py.
"""

import re
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Size, Tensor

from nanogap.checks.command import shown, tell
from nanogap.checks.loading import snapshot
from nanogap.checks.pickles import read_saved
from nanogap.checks.reading import printable
from nanogap.convert import recipes
from nanogap.convert.pieces import Part, Piece
from nanogap.errors import NanogapError

LLAMA_2 = recipes.download("meta-llama/Llama-2-7b-chat-hf --exclude '*.bin*'", 13)
EVA = "the link to it in MiniGPT-4's minigpt4/models/eva_vit.py (2 GB)"
CHECKPOINT = "the link to it in MiniGPT-4's README"
AGAIN = f"get the file by {CHECKPOINT}"
BLOCKS = 39                  # of EVA's 40 that MiniGPT-v2 runs
EVA_HEAD = 88                # channels of a head
EVA_WIDTH = 1408             # channels of the published tower
LORA = re.compile(r"^llama_model\.base_model\.model\.(.+)\.lora_([AB])(\.default)?\.weight$")
TRAINED = re.compile(r"^(llama_proj|ln_vision)\.(weight|bias)$")


def minigpt_v2(base: Path, vision: Path, checkpoint: Path) -> recipes.Recipe:
    """MiniGPT-v2: Llama-2-7b-chat-hf, LAVIS' eva_vit_g.pth, and a checkpoint of its training.

    What was frozen in training is in neither of the last two: `ln_vision` was, from its beginning,
    so it normalises and no more.  All tensors keep the precision that they are published in.
    """
    base = snapshot(base)
    config = recipes.config_of("llama", base, LLAMA_2)
    llama, eva, trained = Piece(base, LLAMA_2), Piece(vision, EVA), Piece(checkpoint, CHECKPOINT)
    settings = training_settings(checkpoint, eva.shape("patch_embed.proj.weight")[0])
    if config.get("hidden_size") == 4096 and config.get("max_position_embeddings") == 2048:
        raise NanogapError(f"{base / 'config.json'}: max_position_embeddings is 2048, which is "
                           f"LLaMA-1's or Vicuna's; MiniGPT-v2 stands on Llama-2: get {LLAMA_2}")
    rows = recipes.rows_of(llama)
    tokenizer = recipes.read_tokenizer(base, (), rows)
    sizes, parts = eva_parts(eva, settings["image_size"])
    parts |= llama.parts(((r"^", "llama_model."),))
    loras: dict[str, dict[str, str]] = {}
    for name in trained.files:
        if TRAINED.search(name):
            parts[name] = trained.part(name)
        elif found := LORA.search(name):
            loras.setdefault(found[1], {})[found[2]] = name
        else:
            raise NanogapError(f"{trained.where(name)} is no part of what MiniGPT-v2 trains; "
                               f"{AGAIN}")
    if not loras:
        raise NanogapError(f"{checkpoint} holds no LoRA of a decoder (such as ...q_proj.lora_A); "
                           f"{AGAIN}")
    for target, names in loras.items():
        parts[f"llama_model.{target}.weight"] = merged(llama, trained, target, names, settings)
    width = sizes["hidden_size"]
    for name, make in (("weight", torch.ones), ("bias", torch.zeros)):
        parts.setdefault(f"ln_vision.{name}", Part(
            Size((width,)), torch.float32, partial(make, width), "ln_vision"))
    new = {"model_type": "minigpt_v2", "image_token_index": rows, "vision_config": sizes,
           "text_config": recipes.decoder_config(config, "llama", rows)}
    pieces = {"visual_encoder.": eva, "llama_proj.": trained, "": llama}
    return recipes.Recipe(new, tokenizer, llama.dtype(recipes.ROWS[0]), parts, pieces)


def training_settings(checkpoint: Path, width: int) -> dict[str, int]:
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
                           f"'minigpt_v2'; {AGAIN}")
    settings = {}
    for key, published in (("image_size", 448), ("lora_alpha", 16), ("lora_r", 0)):  # 0: not said
        if published and key not in model and width != EVA_WIDTH:
            raise NanogapError(f"{checkpoint}: its config says no {key}, and the vision tower is "
                               f"not the published one; {AGAIN}")
        value = model.get(key, published)
        if type(value) is not int or not min(published, 1) <= value < 1 << 16:
            raise NanogapError(f"{checkpoint}: {key} is {value!r:.80} in its config, not a whole "
                               f"number above 0; {AGAIN}")
        settings[key] = value
    return settings


def eva_parts(eva: Piece, image_size: int) -> tuple[dict, dict[str, Part]]:
    """EVA's tower: its sizes, and its tensors without those that MiniGPT-v2 leaves out."""
    numbers = {name.split(".")[1] for name in eva.files if re.match(r"blocks\.\d+\.", name)}
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
             "image_size": image_size, "patch_size": patch, "hidden_act": "gelu"}
    return sizes, eva.parts(((r"^", "visual_encoder."),), wanted=wanted)


def merged(llama: Piece, trained: Piece, target: str, names: dict[str, str],
           settings: dict[str, int]) -> Part:
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
                           f"make a change to its {list(shape)}; {AGAIN}")
    if settings.get("lora_r", rank) not in (0, rank):
        raise NanogapError(f"{trained.path}: LoRA's A and B of {target} have rank {rank}, and its "
                           f"config says lora_r {settings['lora_r']}; {AGAIN}")
    scale = settings["lora_alpha"] / rank

    def make() -> Tensor:
        change = trained.get(names["B"]).float() @ trained.get(names["A"]).float()
        return (llama.get(name) + scale * change).to(dtype)

    return Part(shape, dtype, make, llama.where(name))
