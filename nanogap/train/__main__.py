"""Train the mini model from nothing: first CLIP, then LLaVA on its frozen vision tower.

    python -m nanogap.train --out weights/mine                                     one process
    torchrun --nproc-per-node 2 -m nanogap.train --out weights/mine                one per CPU core
    python -m nanogap.train --out weights/more --start weights/mine --stages box   goes on with it
    torchrun --nproc-per-node 2 -m -- nanogap.train --start ...     torchrun has such options itself

Out: a folder in the layout of llava-hf/llava-1.5-7b-hf, with both towers of CLIP in `clip_text/`.
It is written after each stage: what was interrupted goes on with --start and the stages that lack.
"""

import math
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
from nanogap.train.losses import CLIP, clip_loss, llava_loss, save_clip
from nanogap.train.recipes import RECIPE, Batch, Recipe, Scenes, Stage, recipe_for
from nanogap.train.untrained import new_clip, new_model, started


def optimizers(model: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """AdamW; where the stage has a rate for it, Muon for the matrices between embedding and head.

    Muon takes a step of one size in all directions of a matrix (kellerjordan.github.io/posts/muon).
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        inner = p.dim() == 2 and "embed" not in name and "lm_head" not in name
        if p.requires_grad:
            (matrices if stage.muon_rate and inner else others).append(p)
    steppers: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        others, lr=stage.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    if matrices:
        steppers.append(torch.optim.Muon(matrices, lr=stage.muon_rate, weight_decay=0.01))
    return steppers


def take_step(model: nn.Module, steppers: Sequence[torch.optim.Optimizer], loss: Tensor,
              share: float) -> float:
    """Change the weights by the gradients of a loss, at a share of the rates; returns the loss."""
    loss.backward()
    if dist.is_initialized():
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        total = nn.utils.parameters_to_vector(grads)          # of all processes, in one message
        dist.all_reduce(total)
        nn.utils.vector_to_parameters(total / dist.get_world_size(), grads)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = stepper.defaults["lr"] * share
        stepper.step()
        stepper.zero_grad()
    return loss.item()


def fit(model: Any, loss_of: Callable[[Any, Batch], Tensor], data: Scenes,
        minutes: float | None, workers: int = 0) -> int:
    """Take the steps of a stage, or as many as fit into the minutes; returns how many.

    The rates rise over 200 steps, and decay to what the stage leaves of them.
    """
    stage = data.stage
    steps = stage.steps
    rank, world = joined()
    steppers = optimizers(model, stage)
    own = range(rank, sys.maxsize, world)                                     # of this process
    begun = told = time.time()
    average = 0.0
    for step, batch in enumerate(DataLoader(data, None, num_workers=workers, sampler=own)):
        share = min((step + 1) / 200, 1 - (1 - stage.rate_left) * step / steps)
        loss = take_step(model, steppers, loss_of(model, batch), share)
        average = 0.98 * average + 0.02 * loss if step else loss
        done = step + 1
        now = time.time()
        if minutes:
            fitting = torch.tensor(max(math.ceil(60 * minutes / (now - begun) * done), done))
            if world > 1:
                dist.broadcast(fitting, 0)                                    # the same for all
            steps = int(fitting)
        if rank == 0 and (now - told >= 10 or done == steps):
            told = now
            to_go = timedelta(seconds=round((now - begun) / done * (steps - done)))
            tell(f"{stage.name:5}  step {done}/{steps}  loss {average:.3f}  {to_go} to go ...")
        if done == steps:
            break
    return steps


def train(args: Namespace, recipe: Recipe, device: torch.device) -> None:
    """All stages, from nothing or from --start; the model is written after each of them."""
    rank, world = joined()
    torch.manual_seed(args.seed)         # LLaVA-1.6 has a newline that LLaVA-1.5 has not
    # one model is trained; the one at hand prepares pictures and asks, on the CPU
    at_hand, model = (started(args.start, recipe.family) if args.start
                      else new_model(recipe, args.seed) for _ in range(2))
    model.to(device)
    clip = None if args.start else new_clip(recipe, args.seed).to(device)
    planned = sum(stage.minutes for stage in recipe.stages)
    steps: list[int] = []
    for stage in recipe.stages:
        scenes = Scenes(args.seed, stage.share(world), at_hand)
        minutes = args.minutes and args.minutes * stage.minutes / planned
        if clip and stage.name == "CLIP":
            steps.append(fit(clip, clip_loss, scenes, minutes, args.workers))
            model.vision_tower.load_state_dict(clip.vision_model.state_dict())
        else:
            steps.append(fit(model, llava_loss, scenes, minutes, args.workers))
        if rank == 0:                    # the first process writes for all
            write(args, model, clip)
            tell(f"{stage.name} is done and written to {args.out}; --start goes on with it ...")
    if rank == 0:
        print(f"{args.out} is done: seed {args.seed}, --steps {' '.join(map(str, steps))}")


def write(args: Namespace, model: VLM, clip: CLIP | None) -> None:
    """The model with its CLIP, or with the CLIP text of the weights that it began with."""
    with whole("--out", args.out) as folder:
        if clip and model.Tower is CLIPVisionTower:
            save_clip(folder / "clip_text", clip)
        elif args.start and (args.start / "clip_text").exists():
            shutil.copytree(args.start / "clip_text", folder / "clip_text")
        save(folder, model)
        shutil.rmtree(args.out / "clip_text", ignore_errors=True)    # that of the stage before


def command(argv: Sequence[str] | None) -> None:
    """Check the arguments, join the other processes under torchrun, and train."""
    parser = Parser(prog="python -m nanogap.train",
                    description="Train the mini model from nothing.")
    add = parser.add_argument
    add("--out", type=path_argument, required=True,
        help="new folder; the model is written to it after each stage")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=count_argument,
                        help="as many steps as fit into so much time")
    length.add_argument("--steps", type=count_argument, nargs="+",
                        help="exactly so many steps of each stage")
    names = [stage.name for stage in RECIPE.stages[1:]]
    add("--stages", nargs="+", choices=names, metavar="STAGE", default=names,
        help=f"of {' '.join(names)} (default: all); without --start, CLIP's comes before them")
    add("--start", type=folder_of, metavar="DIR", help="weights to go on with (default: none, "
        "from nothing), such as those of a training that was interrupted")
    add("--model", choices=MODELS, default="llava", help="default: %(default)s")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--seed", type=whole_number, default=0)
    add("--workers", type=whole_number, default=0,
        help="processes that draw scenes beside this one (default: none)")
    args = parser.parse_args(argv)
    recipe = recipe_for(args.model)
    stages = [stage for stage in recipe.stages if stage.name in args.stages]
    if not args.start:
        stages.insert(0, recipe.stages[0])
    steps = args.steps or [stage.steps for stage in stages]
    if len(steps) != len(stages):
        raise NanogapError(f"--steps {' '.join(map(str, steps))}: give a number for each of "
                           f"{', '.join(stage.name for stage in stages)}")
    stages = [replace(stage, steps=count) for stage, count in zip(stages, steps, strict=True)]
    check_place(args.device, None)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    join()                                                                    # under torchrun
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                            # products in TF32
    check_folder("--out", args.out)
    with claim("--out", args.out) if joined()[0] == 0 else nullcontext():
        there = sorted([*args.out.glob("config.json"), *args.out.glob("*.safetensors")])
        if there:
            raise NanogapError(f"--out {args.out} holds weights already ({there[0].name}), which "
                               "are not overwritten; give a new folder")
        train(args, replace(recipe, stages=tuple(stages)), device)


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.train", command, None))
