"""Train the mini model from nothing: first CLIP, then LLaVA on its frozen vision tower.

    python -m nanogap.train --out weights/mini                                     one process
    torchrun --nproc-per-node 2 -m nanogap.train --out weights/mini                one per CPU core

In:  nothing but a seed.  Out: a folder in the layout of llava-hf/llava-1.5-7b-hf, and both towers of
CLIP in `clip_text/`.  The losses are in objectives.py, the scenes in scenes.py.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import nn

from nanogap.cli import Parser, answer_for, whole_number
from nanogap.clip import CLIP, CLIPTextConfig, CLIPVisionConfig
from nanogap.cli import NanogapError
from nanogap.train.fit import Course, Progress, fit
from nanogap.image import box_to_square
from nanogap.evaluate.journal import join
from nanogap.llama import LlamaConfig
from nanogap.models.llava import Llava, LlavaConfig
from nanogap.train.objectives import (Asked, Scenes, clip_loss, draw_often_alike, draw_single, llava_loss,
                                short_questions)
from nanogap.prompt import AFTER_IMAGE, BEFORE_IMAGE, DESCRIBE, format_box, where_is
from nanogap.scenes import caption, draw_scene
from nanogap.train.tokenizer import IMAGE, train_clip_tokenizer, train_llama_tokenizer
from nanogap.weights import pick_device, save_clip, save_llava


@dataclass(frozen=True)
class Recipe:
    vision: CLIPVisionConfig
    text: CLIPTextConfig
    decoder: LlamaConfig
    projection_dim: int
    courses: tuple[Course, ...]   # the first is CLIP's, the others are LLaVA's


# Two processes on two CPU cores: LLaVA in miniature, 12 x 12 patches.
COURSES = (
    Course("CLIP", 28, 4500, 16, 1e-3),
    Course("read", 7, 1000, 8, 2.5e-3, Asked(boxes=64), draw=draw_single),
    Course("find", 36, 2600, 12, 1.5e-3,
           Asked(boxes=24, finds=60, words=16, descriptions=4, hundredths=0.25, find=20.0, word=3.0),
           muon_rate=0.006, rate_left=0.5, draw=draw_often_alike),
    Course("box", 46, 3250, 8, 1.5e-3,
           Asked(boxes=60, finds=24, words=8, descriptions=4, find=6.0, word=3.0),
           muon_rate=0.004))
CPU = Recipe(
    vision=CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                            num_attention_heads=4, image_size=168, patch_size=14),
    text=CLIPTextConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2,
                        num_attention_heads=4, vocab_size=0),
    decoder=LlamaConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                        num_attention_heads=4, num_key_value_heads=4, head_dim=32, vocab_size=0,
                        rms_norm_eps=1e-5, max_position_embeddings=2048),
    projection_dim=128, courses=COURSES)
# One GPU: LLaVA's own geometry, 336 pixels and 24 x 24 patches, and a wider and deeper decoder.
GPU = Recipe(
    vision=replace(CPU.vision, hidden_size=192, intermediate_size=768, num_hidden_layers=6,
                   num_attention_heads=6, image_size=336),
    text=CPU.text,
    decoder=replace(CPU.decoder, hidden_size=320, intermediate_size=864, num_hidden_layers=6,
                    num_attention_heads=10, num_key_value_heads=10),
    projection_dim=128, courses=(
        Course("CLIP", 20, 6000, 128, 1e-3),
        Course("read", 7, 2000, 16, 1.5e-3, Asked(boxes=128), draw=draw_single),
        Course("find", 52, 7000, 24, 1e-3,
               Asked(boxes=48, finds=120, words=32, descriptions=8, hundredths=0.25, find=20.0, word=3.0),
               muon_rate=0.006, rate_left=0.5, draw=draw_often_alike),
        Course("box", 41, 7000, 16, 1e-3,
               Asked(boxes=120, finds=48, words=16, descriptions=8, find=6.0, word=3.0),
               muon_rate=0.004)))
RECIPES = {"cpu": CPU, "gpu": GPU}


def initialise(model: nn.Module, depth: int) -> None:
    """Normal weights of standard deviation fan_in^-1/2, less on the residual branches; small embeddings."""
    for name, parameter in model.named_parameters():
        if "embedding.weight" in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("class_embedding"):
            nn.init.normal_(parameter, std=len(parameter) ** -0.5)
        elif parameter.dim() >= 2:
            branch = name.split(".")[-2] in ("out_proj", "fc2", "o_proj", "down_proj")
            std = parameter[0].numel() ** -0.5 * ((2 * depth) ** -0.5 if branch else 1.0)
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


# ----- the two stages -----------------------------------------------------------------------------


@cache
def sentences(seed: int) -> list[str]:
    """What the LLaVA tokenizer learns from: questions and answers about a thousand scenes."""
    rng, said = random.Random(f"train {seed} words"), []
    for _ in range(1000):
        drawn = draw_scene(rng, 168)
        for expression, thing in drawn.expressions:
            box = box_to_square(drawn.things[thing].box, *drawn.image.size)
            said.append(BEFORE_IMAGE + AFTER_IMAGE.format(where_is(expression)) + " " + format_box(box))
        said += [BEFORE_IMAGE + AFTER_IMAGE.format(question) + " " + answer for question, answer in
                 [(DESCRIBE, caption(drawn.things, rng)), *short_questions(drawn, rng)]]
    return said


@cache
def captions(seed: int) -> list[str]:
    """What the CLIP tokenizer learns from."""
    rng = random.Random(f"train {seed} captions")
    return [caption(draw_scene(rng, 168).things, rng) for _ in range(1000)]


def new_clip(recipe: Recipe, seed: int) -> tuple[CLIP, Tokenizer]:
    """Stage 0's model, untrained, and its tokenizer."""
    words = train_clip_tokenizer(captions(seed), 256)
    text = replace(recipe.text, vocab_size=words.get_vocab_size())
    clip = CLIP(recipe.vision, text, recipe.projection_dim)
    torch.manual_seed(seed)
    initialise(clip, recipe.vision.num_hidden_layers)
    return clip, words


def new_llava(recipe: Recipe, seed: int, clip: CLIP) -> Llava:
    """Stage 1's model: an untrained projector and decoder on CLIP's vision tower, which is frozen."""
    tokenizer = train_llama_tokenizer(sentences(seed), 640)
    rows = -(-tokenizer.get_vocab_size() // 64) * 64                          # as published: a multiple of 64
    decoder = replace(recipe.decoder, vocab_size=rows)
    model = Llava(LlavaConfig(decoder, recipe.vision, tokenizer.token_to_id(IMAGE)))
    model.tokenizer = tokenizer
    torch.manual_seed(seed + 1)
    initialise(model, recipe.decoder.num_hidden_layers)
    model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.vision_tower.requires_grad_(False)
    return model


def train(out: Path, recipe: Recipe, device: torch.device, seed: int = 0, steps: list[int] | None = None,
          minutes: float | None = None, workers: int = 0) -> None:
    """All courses, from nothing to a folder that `nanogap.load` and transformers read.

    steps:   of each course; minutes: as many steps as fit into so much time; neither: the recipe's
    workers: processes that draw scenes beside this one
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    size, courses = recipe.vision.image_size, recipe.courses
    planned = sum(course.minutes for course in courses)
    progress = Progress(out / "training.pt",
                        {"seed": seed, "size": size, "courses": [course.name for course in courses]},
                        list(steps or (course.steps for course in courses)),
                        minutes and [minutes * course.minutes / planned for course in courses])
    progress.load()
    if steps:
        progress.steps = steps                                                # and not those that were saved
    out.mkdir(parents=True, exist_ok=True)
    clip, words = new_clip(recipe, seed)
    clip.to(device)
    if progress.course == 0:
        fit(courses[0], clip, lambda batch: clip_loss(clip, words, batch, device),
            Scenes(f"{seed} clip", courses[0].images, size), progress, workers)
        progress.clip, progress.state = clip.state_dict(), {}
        if rank == 0:
            save_clip(out / "clip_text", clip, words)
            progress.save()
    clip.load_state_dict(progress.clip)
    model = new_llava(recipe, seed, clip).to(device)
    for course in courses[progress.course:]:
        fit(course, model, lambda batch: llava_loss(model, batch, device, course.asked),
            Scenes(f"{seed} {course.name}", course.images, size, course.draw), progress, workers)
    if rank == 0:
        save_llava(out, model)
        progress.path.unlink(missing_ok=True)
        print(f"{out} is done: seed {seed}, --steps {' '.join(map(str, progress.steps))}")


def command(argv: Sequence[str] | None) -> None:
    """Check the arguments, join the other processes under torchrun, and train."""
    parser = Parser(prog="python -m nanogap.train", description="Train the mini model from nothing.")
    parser.add_argument("--out", type=Path, required=True,
                        help="folder to write; weights/mini is the shipped one")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="as many steps as fit into so much time")
    length.add_argument("--steps", type=whole_number, nargs=len(COURSES), help="exactly so many steps",
                        metavar=tuple(course.name.upper() for course in COURSES))
    parser.add_argument("--recipe", choices=RECIPES, help="default: gpu where there is one, else cpu")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--seed", type=whole_number, default=0)
    parser.add_argument("--workers", type=whole_number, default=0,
                        help="processes that draw scenes beside this one (default: none)")
    args = parser.parse_args(argv)
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        raise NanogapError(f"--minutes {args.minutes} is no time to train in; "
                           "leave it out for the recipe's steps")
    if args.out.exists() and not args.out.is_dir():
        raise NanogapError(f"--out {args.out} is a file; give a folder to write the weights to")
    device = pick_device(args.device)
    if join()[1] > 1:                                                         # under torchrun
        torch.set_num_threads(1)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                            # products in TF32
    recipe = RECIPES[args.recipe or ("gpu" if device.type == "cuda" else "cpu")]
    train(args.out, recipe, device, args.seed, args.steps, args.minutes, args.workers)


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.train", command, None))
