"""The training loop that all stages share.

In:  a model, a loss, data.  Out: the model, trained; on the way a line of progress.

Under torchrun every process takes its own batches, and the gradients are averaged.
"""

import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nanogap.checks.command import tell
from nanogap.fast.processes import joined
from nanogap.train.questions import Batch, Scenes
from nanogap.train.recipes import Stage

REPORT_EVERY = 10.0    # seconds


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
        minutes: float | None = None, workers: int = 0) -> int:
    """Take the steps of a stage, or as many as fit into the minutes; returns how many.

    The rates rise over 200 steps, and decay to what the stage leaves of them.
    """
    stage, steps = data.stage, data.stage.steps
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
            fitting = torch.tensor(max(int(60 * minutes / (now - begun) * done), done))
            if world > 1:
                dist.broadcast(fitting, 0)                                    # the same for all
            steps = int(fitting)
        if rank == 0 and (now - told >= REPORT_EVERY or done == steps):
            told = now
            to_go = timedelta(seconds=round((now - begun) / done * (steps - done)))
            tell(f"{stage.name:5}  step {done}/{steps}  loss {average:.3f}  {to_go} to go ...")
        if done == steps:
            break
    return steps
