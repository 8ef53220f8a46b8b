"""Train the mini model from nothing: first CLIP, then LLaVA on its frozen vision tower.

    python -m nanogap.train --out weights/mine                                     one process
    torchrun --nproc-per-node 2 -m nanogap.train --out weights/mine                one per CPU core
    python -m nanogap.train --out weights/more --start weights/mine --stages box   goes on with it

Together with --start, torchrun wants `-m -- nanogap.train`, since it has options of that beginning.

In:  nothing but a seed, or weights to start from.
Out: a folder in the layout of llava-hf/llava-1.5-7b-hf, with both towers of CLIP in `clip_text/`;
     all of it comes at the end, and weights that are there already are left alone.

The losses are in objectives.py, the scenes in nanogap/train/scenes.py.
"""

import math
import random
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from nanogap.checks.command import Parser, answer_for, path_argument, whole_number
from nanogap.checks.output import check_folder, claim, standing, whole_checkpoint
from nanogap.clip import CLIP, CLIPTextConfig, CLIPVisionConfig
from nanogap.errors import NanogapError
from nanogap.fast.processes import join, joined
from nanogap.llama import LlamaConfig
from nanogap.models import MODELS, VLM
from nanogap.prompt import DESCRIBE
from nanogap.train.fit import Progress, TrainingStage, fit
from nanogap.train.objectives import (
    Mixture,
    Scenes,
    captions,
    clip_loss,
    conversations,
    draw_often_alike,
    draw_single,
    llava_loss,
    short_questions,
)
from nanogap.train.scenes import caption, draw_scene
from nanogap.train.tokenizer import train_clip_tokenizer, train_llama_tokenizer
from nanogap.weights import load, pick_device, save, save_clip


@dataclass(frozen=True)
class Recipe:
    """Sizes, and how to train them."""

    vision: CLIPVisionConfig
    text: CLIPTextConfig
    decoder: LlamaConfig
    projection_dim: int
    stages: tuple[TrainingStage, ...]   # the first is CLIP's, the others are the VLM's
    pictures: int                       # long side of the smaller ones, pixels
    family: str = "llava"               # one of nanogap.models.MODELS


# For two CPU cores: LLaVA in miniature, 12 x 12 patches.
CPU = Recipe(
    vision=CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        image_size=168, patch_size=14),
    text=CLIPTextConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=0),
    decoder=LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, vocab_size=0, rms_norm_eps=1e-5,
        max_position_embeddings=2048),
    projection_dim=128,
    pictures=168,
    stages=(
        TrainingStage("CLIP", 28, 4500, 32, 1e-3),
        TrainingStage("read", 7, 1000, 16, 2.5e-3, Mixture(boxes=128, descriptions=16),
                      draw=draw_single),
        TrainingStage(
            "find", 36, 2600, 24, 1.5e-3,
            Mixture(boxes=48, finds=120, words=32, descriptions=8, hundredths=0.25,
                    find=20.0, word=3.0),
            muon_rate=0.006, rate_left=0.5, draw=draw_often_alike),
        TrainingStage(
            "box", 60, 3250, 16, 1.5e-3,
            Mixture(boxes=120, finds=48, words=16, descriptions=8, later=0.6, find=6.0, word=3.0),
            muon_rate=0.004),
    ))
# One GPU: LLaVA's own geometry, 336 pixels and 24 x 24 patches, and a wider and deeper decoder.
GPU = Recipe(
    vision=replace(
        CPU.vision, hidden_size=192, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=6, image_size=336),
    text=CPU.text,
    decoder=replace(
        CPU.decoder, hidden_size=320, intermediate_size=864, num_hidden_layers=6,
        num_attention_heads=10, num_key_value_heads=10),
    projection_dim=128,
    pictures=336,
    stages=(
        TrainingStage("CLIP", 20, 6000, 128, 1e-3),
        TrainingStage("read", 7, 2000, 16, 1.5e-3, Mixture(boxes=128), draw=draw_single),
        TrainingStage(
            "find", 52, 7000, 24, 1e-3,
            Mixture(boxes=48, finds=120, words=32, descriptions=8, hundredths=0.25,
                    find=20.0, word=3.0),
            muon_rate=0.006, rate_left=0.5, draw=draw_often_alike),
        TrainingStage(
            "box", 41, 7000, 16, 1e-3,
            Mixture(boxes=120, finds=48, words=16, descriptions=8, later=0.6, find=6.0, word=3.0),
            muon_rate=0.004),
    ))
RECIPES = {"cpu": CPU, "gpu": GPU}


def recipe_for(family: str, recipe: Recipe) -> Recipe:
    """The same for another family.

    Four patches of MiniGPT-v2 make a token, and a token should see less than a thing: so there are
    32 x 32 of them, as published.
    """
    vision = recipe.vision
    if family == "minigpt_v2":
        patch = 8 if recipe is CPU else 14
        vision = replace(vision, image_size=32 * patch, patch_size=patch, layer_norm_eps=1e-6)
    return replace(recipe, family=family, vision=vision)


# ----- the models, untrained ----------------------------------------------------------------------


def initialise(model: nn.Module, depth: int) -> None:
    """Normal weights of standard deviation fan_in^-1/2, and smaller ones on the residual branches.

    Embeddings of CLIP are small, biases 0.
    """
    for name, parameter in model.named_parameters():
        if "embedding.weight" in name and parameter.dim() == 2 or name.endswith("pos_embed"):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("class_embedding"):
            nn.init.normal_(parameter, std=len(parameter) ** -0.5)
        elif parameter.dim() >= 2:
            std = parameter[0].numel() ** -0.5
            if re.search(r"(out_proj|attn\.proj|fc2|o_proj|down_proj)\.weight$", name):
                std *= (2 * depth) ** -0.5
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


@cache
def sentences(seed: int, family: str) -> list[str]:
    """What the tokenizer learns from: questions and answers about a thousand scenes."""
    rng = random.Random(f"train {seed} words")
    model = MODELS[family]
    said = []
    for _ in range(1000):
        drawn = draw_scene(rng, 168)
        asked = []
        for expression, thing in drawn.expressions:
            box = model.frame.from_pixels(drawn.things[thing].box, *drawn.image.size)
            asked.append((model.template.question(expression), model.box_format.say(box)))
        asked.append((DESCRIBE, caption(drawn.things, rng)))
        asked += short_questions(drawn, rng)
        for question, answer in asked:
            before, after = model.template.around(question)
            said += [before, f"{after} {answer}"]
    return said


@cache
def caption_words(seed: int) -> list[str]:
    """What the CLIP tokenizer learns from."""
    rng = random.Random(f"train {seed} captions")
    return [caption(draw_scene(rng, 168).things, rng) for _ in range(1000)]


def new_clip(recipe: Recipe, seed: int) -> tuple[CLIP, Tokenizer]:
    """An untrained CLIP and its tokenizer."""
    words = train_clip_tokenizer(caption_words(seed), 256)
    text = replace(recipe.text, vocab_size=words.get_vocab_size())
    clip = CLIP(recipe.vision, text, recipe.projection_dim, MODELS[recipe.family].Tower)
    torch.manual_seed(seed)
    initialise(clip, recipe.vision.num_hidden_layers)
    return clip, words


def new_model(recipe: Recipe, seed: int, clip: CLIP) -> VLM:
    """An untrained projector and decoder on CLIP's vision tower, which is frozen."""
    family = MODELS[recipe.family]
    tokenizer = train_llama_tokenizer(sentences(seed, recipe.family), 640, family.special_tokens)
    rows = 64 * math.ceil(tokenizer.get_vocab_size() / 64)                    # as published
    decoder = replace(recipe.decoder, vocab_size=rows)
    image_token = tokenizer.token_to_id(family.special_tokens[0])
    model = family(family.Config(decoder, recipe.vision, image_token))
    model.tokenizer = tokenizer
    torch.manual_seed(seed + 1)
    initialise(model, recipe.decoder.num_hidden_layers)
    tower = model.get_submodule("vision_tower")
    tower.load_state_dict(clip.vision_model.state_dict())
    tower.requires_grad_(False)
    return model


def started(folder: Path, name: str) -> VLM:
    """The model of a folder, to be trained on: in one of MODELS, its own or one of the same parts.

    raises: NanogapError where its tensors are not those of the model
    """
    family, found = MODELS[name], load(folder, "cpu", "float32")
    config = found.config
    if type(found) is not family:
        config = family.Config(config.text, config.vision, config.image_token)
    model = family(config)
    model.tokenizer = found.tokenizer
    try:
        new = set(model.load_state_dict(found.state_dict(), strict=False).unexpected_keys)
    except RuntimeError:   # a tensor has another shape
        new = {"a tensor of another shape"}
    if new:
        raise NanogapError(f"--start {folder} has {min(new)}, which a {name} has not; start from "
                           f"a {name}, or from nothing")
    model.get_submodule("vision_tower").requires_grad_(False)
    return model


# ----- the training -------------------------------------------------------------------------------


def progress_of(out: Path, recipe: Recipe, seed: int, steps: list[int] | None,
                minutes: float | None) -> Progress:
    """How far the training in a folder has come; the arguments are those of `train`."""
    stages = recipe.stages
    settings = {"seed": seed, "model": recipe.family, "size": recipe.vision.image_size,
                "stages": [stage.name for stage in stages]}
    shares = None
    if minutes is not None:
        planned = sum(stage.minutes for stage in stages)
        shares = [minutes * stage.minutes / planned for stage in stages]
    progress = Progress(out / "training.pt", settings, [stage.steps for stage in stages], shares)
    progress.load()
    if steps:
        progress.steps = steps                                                # not those saved
    return progress


def check_new(out: Path) -> None:
    """Refuse a folder with weights in it; beside training.pt there may be some of its own."""
    there = standing(out)
    if "config.json" in there or there and not (out / "training.pt").exists():
        raise NanogapError(f"--out {out} holds weights already ({there[0]}), and they are not "
                           "overwritten; give a new folder, or move them away")


def train(out: Path, recipe: Recipe, device: torch.device, seed: int = 0,
          steps: list[int] | None = None, minutes: float | None = None, workers: int = 0,
          start: Path | None = None) -> None:
    """All stages, from nothing or a checkpoint to a folder that `nanogap.load` reads.

    steps:   of each stage; minutes: as many steps as fit into so much time; neither: the recipe's
    workers: processes that draw scenes beside this one
    start:   the folder of a trained model; the recipe's stages begin behind CLIP's then
    raises:  NanogapError where the folder holds weights, or another training writes to it
    """
    check_folder("--out", out)
    progress = partial(progress_of, out, recipe, seed, steps, minutes)
    if joined()[0] > 0:
        train_stages(recipe, device, seed, progress(), workers, start)
        return
    with claim("--out", out):
        check_new(out)
        done = progress()
        model, clip, words = train_stages(recipe, device, seed, done, workers, start)
        with whole_checkpoint("--out", out) as folder:
            if clip is not None and words is not None and model.reads_words:
                save_clip(folder / "clip_text", clip, words)
            elif start is not None and (start / "clip_text").exists():
                shutil.copytree(start / "clip_text", folder / "clip_text")
            save(folder, model)
        done.path.unlink(missing_ok=True)
        print(f"{out} is done: seed {seed}, --steps {' '.join(map(str, done.steps))}")


def train_stages(recipe: Recipe, device: torch.device, seed: int, progress: Progress, workers: int,
                 start: Path | None) -> tuple[VLM, CLIP | None, Tokenizer | None]:
    """One stage after the other, from where an earlier run stopped; the arguments are `train`'s."""
    stages = [stage.share(joined()[1]) for stage in recipe.stages]
    clip, words = None, None
    if start is None:
        clip, words = train_clip(recipe, device, seed, progress, workers)
        at_hand, model = (new_model(recipe, seed, clip) for _ in range(2))
    else:
        at_hand, model = (started(start, recipe.family) for _ in range(2))
    model.to(device)                          # the other prepares pictures and asks, on the CPU
    for stage in stages[progress.stage:]:
        assert stage.asked is not None                                        # it is for CLIP alone
        ask = partial(conversations, at_hand, stage.asked)
        data = Scenes(f"{seed} {stage.name}", stage.images, recipe.pictures, at_hand.pixel_values,
                      ask, stage.draw)
        fit(stage, model, partial(llava_loss, model, device=device), data, progress, workers)
    return model, clip, words


def train_clip(recipe: Recipe, device: torch.device, seed: int, progress: Progress,
               workers: int) -> tuple[CLIP, Tokenizer]:
    """The first stage, if it was not done before."""
    clip, words = new_clip(recipe, seed)
    prepare = new_model(recipe, seed, clip).pixel_values
    clip.to(device)
    if progress.stage == 0:
        stage = recipe.stages[0].share(joined()[1])
        data = Scenes(f"{seed} clip", stage.images, recipe.pictures, prepare, captions, stage.draw)
        fit(stage, clip, partial(clip_loss, clip, words, device=device), data, progress, workers)
        progress.clip = clip.state_dict()
        progress.state = {}
        if joined()[0] == 0:
            progress.save()
    progress.give(clip, progress.clip)
    return clip, words


def command(argv: Sequence[str] | None) -> None:
    """Check the arguments, join the other processes under torchrun, and train."""
    parser = Parser(prog="python -m nanogap.train",
                    description="Train the mini model from nothing.")
    parser.add_argument("--out", type=path_argument, required=True,
                        help="folder to write; it goes on with a training that was interrupted")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="as many steps as fit into so much time")
    length.add_argument("--steps", type=whole_number, nargs="+",
                        help="exactly so many steps of each stage")
    names = [stage.name for stage in CPU.stages]
    parser.add_argument("--stages", nargs="+", choices=names, metavar="STAGE",
                        help=f"of {' '.join(names)} (default: all, or with --start all but CLIP)")
    parser.add_argument("--start", type=path_argument, metavar="DIR",
                        help="weights to go on with (default: none, from nothing)")
    parser.add_argument("--model", choices=MODELS, default="llava", help="default: %(default)s")
    parser.add_argument("--recipe", choices=RECIPES,
                        help="default: gpu where there is one, else cpu")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--seed", type=whole_number, default=0)
    parser.add_argument("--workers", type=whole_number, default=0,
                        help="processes that draw scenes beside this one (default: none)")
    args = parser.parse_args(argv)
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        raise NanogapError(f"--minutes {args.minutes} is no time to train in; "
                           "leave it out for the recipe's steps")
    device = pick_device(args.device)
    if join()[1] > 1:                                                         # under torchrun
        torch.set_num_threads(1)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                            # products in TF32
    recipe = RECIPES[args.recipe or ("gpu" if device.type == "cuda" else "cpu")]
    recipe = recipe_for(args.model, recipe)
    chosen = args.stages or names[args.start is not None:]
    if ("CLIP" in chosen) == (args.start is not None) or len(set(chosen)) < len(chosen):
        raise NanogapError(f"--stages {' '.join(chosen)}: from nothing CLIP is the first, and with "
                           "--start it is there already")
    recipe = replace(recipe, stages=tuple(s for s in recipe.stages if s.name in chosen))
    if args.steps and len(args.steps) != len(recipe.stages):
        raise NanogapError(f"--steps {' '.join(map(str, args.steps))}: give a number for each of "
                           f"{', '.join(s.name for s in recipe.stages)}")
    train(args.out, recipe, device, args.seed, args.steps, args.minutes, args.workers, args.start)


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.train", command, None))
