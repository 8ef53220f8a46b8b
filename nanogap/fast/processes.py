"""Several processes under torchrun: who they are, and how their records come together."""

import atexit
import json
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join() -> tuple[int, int]:
    """Rank and number of the processes under torchrun; 0 and 1 without.

    It is torchrun's own mark that counts: schedulers set WORLD_SIZE and RANK in any container.
    """
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=timedelta(days=30))   # the first to be done waits
        atexit.register(dist.destroy_process_group)   # its threads may not outlive the interpreter
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return joined()


def joined() -> tuple[int, int]:
    """The same, of processes that have joined before."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(records: list[dict], world: int) -> list[dict]:
    """The records of all processes (torch's own way to gather objects needs NumPy)."""
    if world == 1:
        return records
    every = []
    for rank in range(world):                      # each in turn tells all others
        data = bytearray(json.dumps(records).encode())
        size = torch.tensor([len(data)])
        dist.broadcast(size, rank)
        if rank != dist.get_rank():
            data = bytearray(int(size))
        dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), rank)       # writes into `data`
        every += json.loads(data)
    return every
