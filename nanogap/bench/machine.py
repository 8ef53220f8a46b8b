"""How much time and memory work takes on this machine."""

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanogap.llava import clock_ms


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", told.read_text()) if told.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """What some work gives, and the milliseconds that it takes."""
    start = clock_ms(device)
    done = work()
    return done, clock_ms(device) - start


def peak_memory(device: torch.device, forget: bool = False) -> int:
    """The most bytes of memory that were in use; elsewhere than on CUDA those of the process.

    forget:  count from what is in use now
    returns: 0 where the system does not tell (it is Linux that does)
    """
    if device.type == "cuda":
        if forget:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    told = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(told[0])


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's weights; where these are mapped from a file, this reads them."""
    for parameter in model.parameters():
        parameter.view(-1)[::1024].sum()
    return sum(parameter.nbytes for parameter in model.parameters())


def first_use(get: Callable[[], tuple[Any, int]], use: Callable[[Any], object],
              device: torch.device) -> tuple[Any, dict]:
    """Get a model and its bytes, and use it once: the model, and the time and memory it took."""
    in_use = peak_memory(device, forget=True)
    (model, size), load_ms = timed(device, get)
    use(model)
    peak = peak_memory(device) - in_use
    return model, {"load_s": load_ms / 1000, "weight_bytes": size, "peak_bytes": peak,
                   "peak_over_weights": peak / size}
