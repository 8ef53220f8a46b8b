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
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from nanogap.checks.command import Parser, answer_for, path_argument, tell, whole_number
from nanogap.checks.loading import check_place
from nanogap.checks.output import check_folder, claim, whole_checkpoint
from nanogap.clip import CLIPVisionTower
from nanogap.errors import NanogapError
from nanogap.fast.processes import join, joined
from nanogap.models import MODELS, VLM
from nanogap.models.saving import save
from nanogap.train.clip import CLIP, captions, clip_loss, save_clip
from nanogap.train.fit import Progress, fit
from nanogap.train.questions import Scenes, conversations
from nanogap.train.reading import llava_loss
from nanogap.train.recipes import RECIPE, Recipe, recipe_for
from nanogap.train.untrained import new_clip, new_model, started


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
    run = partial(train_stages, out, recipe, device, seed, steps, minutes, workers, start)
    if joined()[0] > 0:                                      # the first process writes for all
        run()
        return
    with claim("--out", out):
        there = sorted([*out.glob("*.json"), *out.glob("*.safetensors")])
        if there and not (out / "training.pt").exists():      # beside it they are of this training
            raise NanogapError(f"--out {out} holds weights already ({there[0].name}), which are "
                               "not overwritten; give a new folder")
        tell("drawing scenes, to learn their words ...")
        try:
            progress, model, clip, words = run()
        except KeyboardInterrupt:
            tell(f"stopped; the same command goes on from what is saved in {out}")
            raise
        with whole_checkpoint("--out", out) as folder:
            if clip and words and model.Tower is CLIPVisionTower:
                save_clip(folder / "clip_text", clip, words)
            elif start and (start / "clip_text").exists():
                shutil.copytree(start / "clip_text", folder / "clip_text")
            save(folder, model)
        progress.path.unlink(missing_ok=True)
        print(f"{out} is done: seed {seed}, --steps {' '.join(map(str, progress.steps))}")


def train_stages(out: Path, recipe: Recipe, device: torch.device, seed: int,
                 steps: list[int] | None, minutes: float | None, workers: int, start: Path | None
                 ) -> tuple[Progress, VLM, CLIP | None, Tokenizer | None]:
    """One stage after the other, from where an earlier run stopped; the arguments are `train`'s."""
    clip, words, parts = None, None, nn.ModuleDict()
    # one model is trained; the one at hand prepares pictures and asks, on the CPU
    if start is None:
        clip, words = new_clip(recipe, seed)
        at_hand, model = (new_model(recipe, seed, clip) for _ in range(2))
        parts["clip"] = clip
    else:
        torch.manual_seed(seed)      # LLaVA-1.6 has a newline that LLaVA-1.5 has not
        at_hand, model = (started(start, recipe.family) for _ in range(2))
    parts["model"] = model
    settings = {"seed": seed, "model": recipe.family, "size": recipe.vision.image_size,
                "stages": [stage.name for stage in recipe.stages]}
    progress = Progress(out / "training.pt", settings, parts.to(device),
                        [stage.steps for stage in recipe.stages])
    progress.load()
    progress.steps = steps or progress.steps                                  # not those saved
    planned = sum(stage.minutes for stage in recipe.stages)
    for stage in recipe.stages[progress.stage:]:
        part = stage.share(joined()[1])
        length = minutes and minutes * stage.minutes / planned
        scenes = partial(Scenes, seed, part, recipe.pictures, at_hand.pixel_values)
        if clip and words and stage.name == "CLIP":
            loss = partial(clip_loss, clip, words, device=device)
            fit(clip, loss, scenes(captions), progress, length, workers)
            model.vision_tower.load_state_dict(clip.vision_model.state_dict())
        else:
            loss = partial(llava_loss, model, device=device)
            ask = partial(conversations, at_hand, part)
            fit(model, loss, scenes(ask), progress, length, workers)
        progress.stage += 1
        progress.step = 0
        progress.save([])                                # new optimizers in the next stage
    return progress, model, clip, words


def command(argv: Sequence[str] | None) -> None:
    """Check the arguments, join the other processes under torchrun, and train."""
    parser = Parser(prog="python -m nanogap.train",
                    description="Train the mini model from nothing.")
    add = parser.add_argument
    add("--out", type=path_argument, required=True,
        help="folder to write; it goes on with a training that was interrupted")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="as many steps as fit into so much time")
    length.add_argument("--steps", type=whole_number, nargs="+",
                        help="exactly so many steps of each stage")
    names = [stage.name for stage in RECIPE.stages]
    add("--stages", nargs="+", choices=names, metavar="STAGE",
        help=f"of {' '.join(names)} (default: all, or with --start all but CLIP)")
    add("--start", type=path_argument, metavar="DIR",
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
    check_place(args.device, None)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if join()[1] > 1:                                                         # under torchrun
        torch.set_num_threads(1)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                            # products in TF32
    recipe = recipe_for(args.model)
    chosen = args.stages or names[args.start is not None:]
    if ("CLIP" in chosen) == (args.start is not None):
        raise NanogapError(f"--stages {' '.join(chosen)}: from nothing CLIP is the first, and with "
                           "--start it is there already")
    stages = tuple(stage for stage in recipe.stages if stage.name in chosen)
    if args.steps and len(args.steps) != len(stages):
        raise NanogapError(f"--steps {' '.join(map(str, args.steps))}: give a number for each of "
                           f"{', '.join(stage.name for stage in stages)}")
    train(args.out, replace(recipe, stages=stages), device, args.seed, args.steps, args.minutes,
          args.workers, args.start)


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.train", command, None))
