"""The training loop that all stages share, and how it goes on after an interruption.

In:  a model, a loss, data.
Out: the model, trained; on the way a line of progress and a saved state.

Under torchrun every process takes its own batches, and the gradients are averaged.
"""

import io
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nanogap.checks.command import tell
from nanogap.checks.output import write_whole
from nanogap.errors import NanogapError
from nanogap.fast.processes import joined
from nanogap.train.batches import Batch, Scenes
from nanogap.train.recipes import TrainingStage

TIMED = 20             # steps after which --minutes is turned into a number of steps, repeatedly
REPORT_EVERY = 10.0    # seconds
SAVE_EVERY = 120.0     # seconds


# ----- where training stands ----------------------------------------------------------------------


@dataclass
class Progress:
    """Where training stands, saved on the way."""

    path: Path
    settings: dict
    steps: list[int]                              # of each stage
    minutes: list[float] | None                   # of each stage, where they decide its steps
    stage: int = 0
    step: int = 0
    clip: dict = field(default_factory=dict)      # weights of CLIP, once trained
    state: dict = field(default_factory=dict)     # weights and optimizers of the current stage

    KEPT = ("settings", "steps", "stage", "step", "clip", "state")

    def save(self) -> None:
        """Write the whole file or nothing."""
        data = io.BytesIO()
        torch.save({key: getattr(self, key) for key in self.KEPT}, data)
        write_whole("--out", self.path, data.getvalue())

    def load(self) -> None:
        """Go on where an earlier run stopped, if there was one.

        raises: NanogapError where the file is broken, or of a training with other settings
        """
        if not self.path.exists():
            return
        try:
            with warnings.catch_warnings(action="ignore"):   # of a file of another kind
                saved = torch.load(self.path, map_location="cpu", weights_only=True)
            settings = saved["settings"]
        except Exception as error:   # whatever an unpickler comes upon
            raise NanogapError(f"{self.path} cannot be read ({type(error).__name__}); "
                               "delete it to start anew") from None
        if settings != self.settings or saved.keys() != set(self.KEPT):
            raise NanogapError(f"{self.path} is of a training with other settings "
                               f"({settings!s:.200}), or of an older version; delete it to start "
                               "anew")
        for key in self.KEPT:
            setattr(self, key, saved[key])

    def restore(self, model: nn.Module, steppers: Sequence[torch.optim.Optimizer]) -> None:
        """Give a model and its optimizers what was saved in this stage, if there is anything."""
        if self.state:
            model.load_state_dict(self.state["model"])
            # no optimizers at the beginning of a stage
            for stepper, state in zip(steppers, self.state["optimizers"], strict=False):
                stepper.load_state_dict(state)

    def keep(self, step: int, model: nn.Module, steppers: Sequence[torch.optim.Optimizer]) -> None:
        """Save the state within a stage."""
        self.step = step
        self.state = {"model": model.state_dict(),
                      "optimizers": [stepper.state_dict() for stepper in steppers]}
        self.save()

    def end_stage(self, model: nn.Module) -> None:
        """The next stage begins with this model and with new optimizers."""
        self.stage += 1
        self.step = 0
        self.state = {"model": model.state_dict(), "optimizers": []}

    def choose_steps(self, done: int, seconds: float, seconds_per_step: float) -> int:
        """Turn what is left of a stage's minutes into steps, the same number in all processes."""
        assert self.minutes is not None
        left = (60 * self.minutes[self.stage] - seconds) / seconds_per_step
        chosen = torch.tensor(done + max(int(left), 1))
        if dist.is_initialized():
            dist.broadcast(chosen, 0)
        self.steps[self.stage] = int(chosen)
        return int(chosen)


class Report:
    """A line of progress now and then, with a running mean of the loss."""

    def __init__(self, name: str, start: int, begun: float) -> None:
        self.name, self.start, self.begun = name, start, begun
        self.told = begun
        self.average: float | None = None

    def add(self, loss: float, done: int, steps: int, now: float) -> None:
        """Note the loss of a step; `done` steps of `steps` are done with it."""
        self.average = loss if self.average is None else 0.98 * self.average + 0.02 * loss
        if now - self.told < REPORT_EVERY and done < steps:
            return
        self.told = now
        left = (now - self.begun) / (done - self.start) * (steps - done)
        time_left = f"{left / 60:.0f} min" if left >= 100 else f"{left:.0f} s"
        tell(f"{self.name:5}  step {done}/{steps}  loss {self.average:.3f}  {time_left} to go ...")


# ----- a step -------------------------------------------------------------------------------------


def optimizers(model: nn.Module, stage: TrainingStage) -> list[torch.optim.Optimizer]:
    """AdamW; where the stage has a rate for it, Muon for the matrices of projector and decoder.

    Embeddings and the head stay with AdamW.  Muon takes a step of one size in every direction of a
    matrix (kellerjordan.github.io/posts/muon).
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


def rate_share(step: int, steps: int, left: float) -> float:
    """The share of the rates at a step: it rises over 200 steps, and decays to what is left."""
    return min((step + 1) / 200, 1 - (1 - left) * step / steps)


def take_step(model: nn.Module, steppers: Sequence[torch.optim.Optimizer], loss: Tensor,
              share: float) -> float:
    """Change the weights by the gradients of a loss, at a share of the rates; returns the loss."""
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = stepper.defaults["lr"] * share
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss.backward()
    if joined()[1] > 1:
        average_gradients(parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for stepper in steppers:
        stepper.step()
        stepper.zero_grad()
    return loss.item()


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean of the gradients over all processes, in one message."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


# ----- a stage ------------------------------------------------------------------------------------


def fit(stage: TrainingStage, model: nn.Module, loss_of: Callable[[Batch], Tensor], data: Scenes,
        progress: Progress, workers: int) -> None:
    """One stage, from its first step or from where it was interrupted."""
    rank, world = joined()
    steppers = optimizers(model, stage)
    progress.restore(model, steppers)
    by_minutes = progress.minutes is not None and progress.step == 0
    begun = saved = timed = time.time()
    report = Report(stage.name, progress.step, begun)
    own = range(progress.step * world + rank, sys.maxsize, world)             # of this process
    batches = DataLoader(data, batch_size=None, num_workers=workers, sampler=own)
    for step, batch in enumerate(batches, progress.step):
        steps = progress.steps[progress.stage]
        if by_minutes and step % TIMED == 0 and 0 < step <= max(TIMED, steps / 2):
            now = time.time()
            # by the last steps alone: the first are slow on a GPU
            steps = progress.choose_steps(step, now - begun, (now - timed) / TIMED)
            timed = now
        if step >= steps:
            break
        share = rate_share(step, steps, stage.rate_left)
        loss = take_step(model, steppers, loss_of(batch), share)
        now = time.time()
        if rank > 0:                              # the first process reports and saves for all
            continue
        report.add(loss, step + 1, steps, now)
        if now - saved > SAVE_EVERY:
            saved = now
            progress.keep(step + 1, model, steppers)
    progress.end_stage(model)
