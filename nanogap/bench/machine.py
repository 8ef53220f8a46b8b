"""What the machine can do, and what a model takes of it: time, memory, and the limits of both.

In:  a device, and a piece of work.  Out: seconds, bytes, and how many of them a second.

Limits are measured, not looked up: a large copy, and a large matrix product, each the best of five.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nanogap.models.llava import clock
from nanogap.weights import DOWNLOAD, shards


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that a piece of work takes, the best of five."""
    times = []
    for _ in range(6):
        start = clock(device)
        work()
        times.append(clock(device) - start)
    return min(times[1:])


def limits(device: torch.device, dtype: torch.dtype) -> dict:
    """What the machine can do: bytes copied (read and written), and a large matrix product."""
    side, size = (8192, 1 << 30) if device.type == "cuda" else (2048, 1 << 26)
    a, m = torch.rand(size, device=device), torch.randn(side, side, device=device).to(dtype)
    b = torch.empty_like(a)
    return {"copy_gb_s": 2 * a.nbytes / fastest(lambda: b.copy_(a), device) / 1e9,
            "matmul_tflop_s": 2 * side ** 3 / fastest(lambda: m @ m, device) / 1e12}


def memory(device: torch.device, forget_peak: bool = False) -> tuple[int, int]:
    """Bytes of memory in use now and at the most; on a CPU the process's, by Linux (elsewhere 0, 0)."""
    if device.type == "cuda":
        if forget_peak:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return 0, 0
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return tuple(1024 * int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "VmHWM"))


def first_use(get: Callable[[], nn.Module], use: Callable[[nn.Module], object],
              device: torch.device) -> tuple[nn.Module, dict]:
    """Load a model, use it once, and tell what that took."""
    in_use, _ = memory(device, forget_peak=True)
    start = clock(device)
    model = get()
    for parameter in model.parameters():
        parameter.view(-1)[::1024].sum()                                      # memory-mapped: read it now
    load_s, size = clock(device) - start, sum(p.nbytes for p in model.parameters())
    use(model)
    peak = memory(device)[1] - in_use
    return model, {"load_s": load_s, "weight_bytes": size, "peak_bytes": peak,
                   "peak_over_weights": peak / size}


def read_files(folder: Path) -> float:
    """Seconds to read the bytes of a checkpoint once, into memory of their own."""
    start = time.perf_counter()
    for path in shards(folder, DOWNLOAD):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 26):
                pass
    return time.perf_counter() - start
