"""The training loop that all stages share, and how it goes on after an interruption.

In:  a model, a loss, data.
Out: the model, trained; on the way a line of progress and a saved state.

Under torchrun every process takes its own batches, and the gradients are averaged.
"""

import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nanogap.checks.command import tell
from nanogap.checks.output import write_whole
from nanogap.errors import NanogapError
from nanogap.fast.processes import joined
from nanogap.train.questions import Batch, Scenes
from nanogap.train.recipes import Stage

TIMED = 20             # steps after which --minutes is turned into a number of steps, repeatedly
REPORT_EVERY = 10.0    # seconds
SAVE_EVERY = 120.0     # seconds


@dataclass
class Progress:
    """Where training stands, saved on the way."""

    path: Path
    settings: dict                # of a training that may go on with this one
    parts: nn.ModuleDict          # all that is trained
    steps: list[int]              # of each stage
    stage: int = 0
    step: int = 0
    optimizers: list[dict] = field(default_factory=list)

    def save(self, optimizers: list[dict]) -> None:
        """Write the whole file or nothing; the first process does it for all."""
        self.optimizers = optimizers
        if joined()[0] == 0:
            data = io.BytesIO()
            torch.save(vars(self) | {"path": "", "parts": self.parts.state_dict()}, data)
            write_whole("--out", self.path, data.getvalue())

    def load(self) -> None:
        """Go on where an earlier run stopped, if there was one."""
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            if saved["settings"] != self.settings:
                raise ValueError
            self.parts.load_state_dict(saved["parts"])
            vars(self).update(saved, path=self.path, parts=self.parts)
        except Exception:   # whatever an unpickler comes upon
            raise NanogapError(f"{self.path} is broken, or of a training with other settings; "
                               "delete it to start anew") from None


def optimizers(model: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
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
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss.backward()
    if dist.is_initialized():
        grads = [p.grad for p in parameters if p.grad is not None]
        total = nn.utils.parameters_to_vector(grads)          # of all processes, in one message
        dist.all_reduce(total)
        nn.utils.vector_to_parameters(total / dist.get_world_size(), grads)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = stepper.defaults["lr"] * share
        stepper.step()
        stepper.zero_grad()
    return loss.item()


def fit(model: Any, loss_of: Callable[[Any, Batch], Tensor], data: Scenes, progress: Progress,
        minutes: float | None = None, workers: int = 0) -> None:
    """The stage of the data, from its first step or from where it was interrupted.

    minutes: take as many steps as fit into them
    """
    stage = data.stage
    rank, world = joined()
    steppers = optimizers(model, stage)
    for stepper, state in zip(steppers, progress.optimizers, strict=False):   # none at the start
        stepper.load_state_dict(state)
    first, average = progress.step, None
    begun = told = saved = time.time()
    own = range(first * world + rank, sys.maxsize, world)                     # of this process
    batches = iter(DataLoader(data, batch_size=None, num_workers=workers, sampler=own))
    while progress.step < progress.steps[progress.stage]:
        steps = progress.steps[progress.stage]
        share = rate_share(progress.step, steps, stage.rate_left)
        loss = take_step(model, steppers, loss_of(model, next(batches)), share)
        average = loss if average is None else 0.98 * average + 0.02 * loss
        progress.step += 1
        now, done = time.time(), progress.step
        if minutes and first == 0 and done % TIMED == 0 and done <= max(TIMED, steps / 2):
            fitting = torch.tensor(max(int(60 * minutes / (now - begun) * done), done + 1))
            if world > 1:
                dist.broadcast(fitting, 0)                                    # the same for all
            progress.steps[progress.stage] = steps = int(fitting)
        if rank == 0 and (now - told >= REPORT_EVERY or done == steps):
            told = now
            to_go = timedelta(seconds=round((now - begun) / (done - first) * (steps - done)))
            tell(f"{stage.name:5}  step {done}/{steps}  loss {average:.3f}  {to_go} to go ...")
        if now - saved > SAVE_EVERY:
            saved = now
            progress.save([stepper.state_dict() for stepper in steppers])
