"""The training loop that all courses share, and where it takes up again after an interruption.

In:  a model, a loss, data.  Out: the model, trained; on the way a line of progress and a saved state.
Run under torchrun, every process takes its own batches and the gradients are averaged.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogap.cli import NanogapError
from nanogap.train.objectives import Asked, Batch, Draw, Scenes
from nanogap.scenes import draw_scene

TIMED = 20           # steps by which --minutes is turned into a number of steps, again and again
SAVE_EVERY = 120.0   # seconds


@dataclass(frozen=True)
class Course:
    """A part of the training, with a warm-up and a decay of its own; figures are per process and step."""

    name: str
    minutes: float            # two CPU cores; also its share of --minutes
    steps: int
    images: int
    rate: float               # AdamW's
    asked: Asked | None = None
    muon_rate: float | None = None
    rate_left: float = 0.0    # share of the rates to which they decay
    draw: Draw = draw_scene


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean of the gradients over all processes, in one message."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


@dataclass
class Progress:
    """Where training stands; saved as it goes, so that it continues after an interruption."""

    path: Path
    settings: dict
    steps: list[int]                              # of each course
    minutes: list[float] | None                   # of each course: sets the steps by how long the first take
    course: int = 0
    step: int = 0
    clip: dict = field(default_factory=dict)      # weights of CLIP, once trained
    state: dict = field(default_factory=dict)     # weights and optimizers of the course under way

    KEPT = ("settings", "steps", "course", "step", "clip", "state")

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        torch.save({key: getattr(self, key) for key in self.KEPT}, partial)
        partial.replace(self.path)

    def load(self) -> None:
        """Take up where an earlier run stopped, if there is one."""
        if not self.path.exists():
            return
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        if saved["settings"] != self.settings:
            raise NanogapError(f"{self.path} is of a training with other settings ({saved['settings']}); "
                               "delete it to start anew")
        for key in self.KEPT:
            setattr(self, key, saved[key])

    def choose_steps(self, done: int, seconds: float, seconds_per_step: float) -> int:
        """Turn what is left of a course's minutes into steps, the same number in all processes."""
        left = (60 * self.minutes[self.course] - seconds) / seconds_per_step
        chosen = torch.tensor(done + max(int(left), 1))
        if dist.is_initialized():
            dist.broadcast(chosen, 0)
        self.steps[self.course] = int(chosen)
        return int(chosen)


def optimizers(model: nn.Module, course: Course) -> list[torch.optim.Optimizer]:
    """AdamW; where the course has a rate for it, Muon for the matrices between the words and the answer.

    Muon takes a step of one size in every direction of a matrix (kellerjordan.github.io/posts/muon).
    """
    inner, outer = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            between = p.dim() == 2 and "embed" not in name and "lm_head" not in name
            (inner if course.muon_rate and between else outer).append(p)
    adamw = torch.optim.AdamW(outer, lr=course.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    return [adamw, torch.optim.Muon(inner, lr=course.muon_rate, weight_decay=0.01)] if inner else [adamw]


def rate_share(step: int, steps: int, left: float) -> float:
    """How much of its rate a course goes at: it warms up over 200 steps, and decays to what is left."""
    return min((step + 1) / 200, 1 - (1 - left) * step / steps)


def fit(course: Course, model: nn.Module, loss_of: Callable[[Batch], Tensor], data: Scenes,
        progress: Progress, workers: int) -> None:
    """One course, from the first step or from where it was interrupted; reports, and saves as it goes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steppers = optimizers(model, course)
    if progress.state:
        model.load_state_dict(progress.state["model"])
        for stepper, state in zip(steppers, progress.state["optimizers"]):
            stepper.load_state_dict(state)
    start, average = progress.step, None
    planned = progress.minutes is not None and start == 0
    begun = saved = timed = time.time()
    batches = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers,
                                          sampler=range(start * world + rank, sys.maxsize, world))
    for step, batch in enumerate(batches, start):
        steps = progress.steps[progress.course]
        if planned and step and step % TIMED == 0 and step <= max(TIMED, steps / 2):
            before, timed = timed, time.time()      # the first steps are slow, above all on a GPU
            steps = progress.choose_steps(step, timed - begun, (timed - before) / TIMED)
        if step >= steps:
            break
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = stepper.defaults["lr"] * rate_share(step, steps, course.rate_left)
        loss = loss_of(batch)
        loss.backward()
        if world > 1:
            average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if rank == 0 and (step + 1) % 50 == 0:
            left = (time.time() - begun) / (step + 1 - start) * (steps - step - 1)
            print(f"{course.name:5}  step {step + 1}/{steps}  loss {average:.3f}  {left / 60:.0f} min to go",
                  flush=True)
        if rank == 0 and time.time() - saved > SAVE_EVERY:
            progress.step, saved = step + 1, time.time()
            progress.state = {"model": model.state_dict(),
                              "optimizers": [stepper.state_dict() for stepper in steppers]}
            progress.save()
    progress.course, progress.step = progress.course + 1, 0
    progress.state = {"model": model.state_dict(), "optimizers": []}          # the next begins with new ones
