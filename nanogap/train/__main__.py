"""Train the mini model from nothing: first CLIP, then LLaVA on its frozen vision tower.

    python -m nanogap.train --out weights/mine                                     one process
    torchrun --nproc-per-node 2 -m nanogap.train --out weights/mine                one per CPU core
    python -m nanogap.train --out weights/more --start weights/mine --stages box   goes on with it

Together with --start, torchrun wants `-m -- nanogap.train`, since it has options of that beginning.

Out: a folder in the layout of llava-hf/llava-1.5-7b-hf, with both towers of CLIP in `clip_text/`.
The recipe is in recipes.py, the losses in clip.py and reading.py, the scenes in scenes.py.
"""

import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from nanogap.checks.command import (
    Parser,
    answer_for,
    count_argument,
    path_argument,
    tell,
    whole_number,
)
from nanogap.checks.loading import check_place, folder_of
from nanogap.checks.output import check_folder, claim, whole
from nanogap.clip import CLIPVisionTower
from nanogap.errors import NanogapError
from nanogap.fast.processes import join, joined
from nanogap.models import MODELS, VLM
from nanogap.models.saving import save
from nanogap.train.clip import CLIP, clip_loss, save_clip
from nanogap.train.fit import Progress, fit
from nanogap.train.questions import Scenes
from nanogap.train.reading import llava_loss
from nanogap.train.recipes import RECIPE, Recipe, recipe_for
from nanogap.train.untrained import new_clip, new_model, started


def train(args: Namespace, recipe: Recipe, device: torch.device) -> None:
    """All stages, from nothing or a checkpoint to a folder that `nanogap.load` reads.

    args:   out, start, seed, minutes and workers of the command
    raises: NanogapError where the folder holds weights, or another training writes to it
    """
    if joined()[0] > 0:                                      # the first process writes for all
        train_stages(args, recipe, device)
        return
    check_folder("--out", args.out)
    with claim("--out", args.out):
        there = sorted([*args.out.glob("config.json"), *args.out.glob("*.safetensors")])
        if there and not (args.out / "training.pt").exists():      # else they are of this training
            raise NanogapError(f"--out {args.out} holds weights already ({there[0].name}), which "
                               "are not overwritten; give a new folder")
        if not args.start:
            tell("drawing scenes, to learn their words ...")
        progress, model, clip = train_stages(args, recipe, device)
        with whole("--out", args.out) as folder:
            if clip and model.Tower is CLIPVisionTower:
                save_clip(folder / "clip_text", clip)
            elif args.start and (args.start / "clip_text").exists():
                shutil.copytree(args.start / "clip_text", folder / "clip_text")
            save(folder, model)
        progress.path.unlink(missing_ok=True)
        steps = " ".join(map(str, progress.steps))
        print(f"{args.out} is done: seed {args.seed}, --steps {steps}")


def train_stages(args: Namespace, recipe: Recipe,
                 device: torch.device) -> tuple[Progress, VLM, CLIP | None]:
    """One stage after the other, from where an earlier run stopped."""
    torch.manual_seed(args.seed)         # LLaVA-1.6 has a newline that LLaVA-1.5 has not
    # one model is trained; the one at hand prepares pictures and asks, on the CPU
    at_hand, model = (started(args.start, recipe.family) if args.start
                      else new_model(recipe, args.seed) for _ in range(2))
    clip = None if args.start else new_clip(recipe, args.seed)
    settings = {"seed": args.seed, "model": recipe.family,
                "stages": [stage.name for stage in recipe.stages]}
    steps = [stage.steps for stage in recipe.stages]
    parts = nn.ModuleDict({"clip": clip, "model": model} if clip else {"model": model})
    progress = Progress(args.out / "training.pt", settings, parts.to(device), steps)
    progress.load()
    if args.minutes is None:
        progress.steps = steps                                                # not those saved
    planned = sum(stage.minutes for stage in recipe.stages)
    for stage in recipe.stages[progress.stage:]:
        scenes = Scenes(args.seed, stage.share(joined()[1]), at_hand)
        minutes = args.minutes and args.minutes * stage.minutes / planned
        if clip and stage.name == "CLIP":
            fit(clip, clip_loss, scenes, progress, minutes, args.workers)
            model.vision_tower.load_state_dict(clip.vision_model.state_dict())
        else:
            fit(model, llava_loss, scenes, progress, minutes, args.workers)
        progress.stage += 1
        progress.step = 0
        progress.save([])                                # new optimizers in the next stage
    return progress, model, clip


def command(argv: Sequence[str] | None) -> None:
    """Check the arguments, join the other processes under torchrun, and train."""
    parser = Parser(prog="python -m nanogap.train",
                    description="Train the mini model from nothing.")
    add = parser.add_argument
    add("--out", type=path_argument, required=True,
        help="folder to write; it goes on with a training that was interrupted")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="as many steps as fit into so much time")
    length.add_argument("--steps", type=count_argument, nargs="+",
                        help="exactly so many steps of each stage")
    names = [stage.name for stage in RECIPE.stages]
    add("--stages", nargs="+", choices=names, metavar="STAGE",
        help=f"of {' '.join(names)} (default: all, or with --start all but CLIP)")
    add("--start", type=folder_of, metavar="DIR",
        help="weights to go on with (default: none, from nothing)")
    add("--model", choices=MODELS, default="llava", help="default: %(default)s")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--seed", type=whole_number, default=0)
    add("--workers", type=whole_number, default=0,
        help="processes that draw scenes beside this one (default: none)")
    args = parser.parse_args(argv)
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        raise NanogapError(f"--minutes {args.minutes} is no time to train in; "
                           "leave it out for the recipe's steps")
    chosen = args.stages or names[args.start is not None:]
    if ("CLIP" in chosen) == (args.start is not None):
        raise NanogapError(f"--stages {' '.join(chosen)}: from nothing CLIP is the first, and with "
                           "--start it is there already")
    recipe = recipe_for(args.model)
    stages = [stage for stage in recipe.stages if stage.name in chosen]
    steps = args.steps or [stage.steps for stage in stages]
    if len(steps) != len(stages):
        raise NanogapError(f"--steps {' '.join(map(str, steps))}: give a number for each of "
                           f"{', '.join(stage.name for stage in stages)}")
    stages = [replace(stage, steps=count) for stage, count in zip(stages, steps, strict=True)]
    check_place(args.device, None)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if join()[1] > 1:                                                         # under torchrun
        torch.set_num_threads(1)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                            # products in TF32
    new = not args.out.exists()
    try:
        train(args, replace(recipe, stages=tuple(stages)), device)
    except KeyboardInterrupt:
        if joined()[0] == 0:
            tell(f"stopped; the same command goes on from what is saved in {args.out}")
        raise
    finally:
        if new:
            with suppress(OSError):
                args.out.rmdir()                         # where nothing came into it


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.train", command, None))
