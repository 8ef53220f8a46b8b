"""The training loop that both stages share, and where it takes up again after an interruption.

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

from nanogap.errors import NanogapError
from nanogap.objectives import Batch, Scenes

SHARE = (0.2, 0.8)   # of the time: stage 0, stage 1
TIMED = 20           # steps by which --minutes is turned into a number of steps
SAVE_EVERY = 120.0   # seconds


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
    steps: list[int]                              # of stage 0 and 1
    minutes: float | None                         # sets the steps by the time that the first ones take
    stage: int = 0
    step: int = 0
    clip: dict = field(default_factory=dict)      # weights of stage 0, once done
    state: dict = field(default_factory=dict)     # weights and optimizer of the stage under way

    KEPT = ("settings", "steps", "stage", "step", "clip", "state")

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

    def choose_steps(self, seconds_per_step: float) -> None:
        """Turn minutes into a number of steps, the same in all processes."""
        chosen = torch.tensor(int(60 * self.minutes * SHARE[self.stage] / seconds_per_step))
        if dist.is_initialized():
            dist.broadcast(chosen, 0)
        self.steps[self.stage] = max(int(chosen), TIMED + 1)


def fit(name: str, model: nn.Module, loss_of: Callable[[Batch], Tensor], data: Scenes, rate: float,
        progress: Progress, workers: int) -> None:
    """One stage: AdamW with a short warm-up and a long linear decay; reports, and saves as it goes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    if progress.state:
        model.load_state_dict(progress.state["model"])
        optimizer.load_state_dict(progress.state["optimizer"])
    start, begun, saved, average = progress.step, time.time(), time.time(), None
    batches = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers,
                                          sampler=range(start * world + rank, sys.maxsize, world))
    for step, batch in enumerate(batches, start):
        if step == TIMED and start == 0 and progress.minutes is not None:
            progress.choose_steps((time.time() - begun) / TIMED)
        steps = progress.steps[progress.stage]
        if step >= steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 200, 1.0) * (1 - step / steps)
        loss = loss_of(batch)
        loss.backward()
        if world > 1:
            average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if rank == 0 and (step + 1) % 50 == 0:
            left = (time.time() - begun) / (step + 1 - start) * (steps - step - 1)
            print(f"{name}  step {step + 1}/{steps}  loss {average:.3f}  {left / 60:.0f} min to go",
                  flush=True)
        if rank == 0 and time.time() - saved > SAVE_EVERY:
            progress.step, saved = step + 1, time.time()
            progress.state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            progress.save()
    progress.stage, progress.step, progress.state = progress.stage + 1, 0, {}
