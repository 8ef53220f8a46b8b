"""The machine: what it can do at most, and how much time and memory a model takes.

Limits are measured, not looked up: a large copy, and a large matrix product, each the best of five.
"""

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanogap.llava import clock_ms
from nanogap.weights import weight_files


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


def limits(device: torch.device, dtype: torch.dtype) -> dict:
    """The limits of a device: bytes copied (read and written), and a large matrix product."""
    def fastest(work: Callable[[], object]) -> float:
        return min([timed(device, work)[1] for _ in range(6)][1:]) / 1000     # seconds

    side, size = (8192, 1 << 30) if device.type == "cuda" else (2048, 1 << 26)
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device).to(dtype)
    copying = fastest(lambda: target.copy_(source))
    multiplying = fastest(lambda: matrix @ matrix)
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


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's weights; where these are mapped from a file, this reads them."""
    for parameter in model.parameters():
        parameter.view(-1)[::1024].sum()
    return sum(parameter.nbytes for parameter in model.parameters())


def first_use(get: Callable[[], tuple[Any, int]], use: Callable[[Any], object],
              device: torch.device) -> tuple[Any, dict]:
    """Get a model and its bytes, and use it once: the model, and the time and memory it took."""
    in_use, _ = memory(device, forget_peak=True)
    (model, size), load_ms = timed(device, get)
    use(model)
    peak = memory(device)[1] - in_use
    return model, {"load_s": load_ms / 1000, "weight_bytes": size, "peak_bytes": peak,
                   "peak_over_weights": peak / size}


def read_files(folder: Path) -> float:
    """Seconds to read all bytes of a checkpoint once."""
    start = time.perf_counter()
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 26):
                pass
    return time.perf_counter() - start
