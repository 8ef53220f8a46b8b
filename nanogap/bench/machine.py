"""The machine: what it can do at most, and how much time and memory a model takes.

In:  a device, and something to run.  Out: seconds, bytes, and bytes and operations a second.

Limits are measured, not looked up: a large copy, and a large matrix product, each the best of five.
"""

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from nanogap.llava import clock_ms
from nanogap.weights import weight_files

Model = TypeVar("Model", bound=nn.Module)
Done = TypeVar("Done")


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", told.read_text()) if told.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def timed(device: torch.device, work: Callable[[], Done]) -> tuple[Done, float]:
    """What some work gives, and the milliseconds that it takes."""
    start = clock_ms(device)
    done = work()
    return done, clock_ms(device) - start


def fastest(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that some work takes: the best of five, after one more that is not counted."""
    return min([timed(device, work)[1] for _ in range(6)][1:]) / 1000


def limits(device: torch.device, dtype: torch.dtype) -> dict:
    """The limits of a device: bytes copied (read and written), and a large matrix product."""
    side, size = 2048, 1 << 26
    if device.type == "cuda":
        side, size = 8192, 1 << 30
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device).to(dtype)
    copying = fastest(device, lambda: target.copy_(source))
    multiplying = fastest(device, lambda: matrix @ matrix)
    return {"copy_gb_s": 2 * source.nbytes / copying / 1e9,
            "matmul_tflop_s": 2 * side ** 3 / multiplying / 1e12}


def memory(device: torch.device, forget_peak: bool = False) -> tuple[int, int]:
    """Bytes of memory in use, now and at the most; elsewhere than on CUDA those of the process.

    0 and 0 where the system does not tell (it is Linux that does).
    """
    if device.type == "cuda":
        if forget_peak:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return 0, 0
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    kilobytes = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+)", status))
    return 1024 * int(kilobytes["VmRSS"]), 1024 * int(kilobytes["VmHWM"])


def first_use(get: Callable[[], tuple[Model, int]], use: Callable[[Model], object],
              device: torch.device) -> tuple[Model, dict]:
    """Load a model and use it once: the model, and how much time and memory that took.

    get: gives the model, and how many bytes its weights have
    """
    in_use, _ = memory(device, forget_peak=True)
    start = clock_ms(device)
    model, size = get()
    for module in model.modules():
        # without attributes, for to look at a packed weight would unpack it (fast/packed.py)
        for parameter in filter(torch.is_tensor, module.__dict__["_parameters"].values()):
            parameter.view(-1)[::1024].sum()   # where it is memory-mapped, this reads it
    load_s = (clock_ms(device) - start) / 1000
    use(model)
    peak = memory(device)[1] - in_use
    return model, {"load_s": load_s, "weight_bytes": size, "peak_bytes": peak,
                   "peak_over_weights": peak / size}


def read_files(folder: Path) -> float:
    """Seconds to read all bytes of a checkpoint once."""
    start = time.perf_counter()
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 26):
                pass
    return time.perf_counter() - start
