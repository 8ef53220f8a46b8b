"""Writing safetensors tensor by tensor: a header that says where each will stand, then the numbers.

In:  parts, in the order in which they are to be made.
Out: model.safetensors, or shards and their index; no more than one result is in memory.

(safetensors' own writer wants all tensors of a file at once.)
Source: the format, https://github.com/huggingface/safetensors#format
"""

import ctypes
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nanogap.checks.command import tell
from nanogap.checks.reading import write_json
from nanogap.convert.pieces import Part
from nanogap.errors import NanogapError

SHARD = 4_000_000_000         # bytes of a file, unless one tensor is larger
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TELL_EVERY = 5.0              # seconds


def size(part: Part) -> int:
    """Its bytes."""
    return part.shape.numel() * part.dtype.itemsize


def check_room(flag: str, folder: Path, parts: dict[str, Part]) -> None:
    """Refuse to begin what the disk has no room for."""
    wanted, free = sum(map(size, parts.values())), shutil.disk_usage(folder).free
    if wanted > free:
        raise NanogapError(f"{flag} {folder} has room for {free / 1e9:.1f} GB, and the model takes "
                           f"{wanted / 1e9:.1f} GB; give a folder on another disk")


def divide(parts: dict[str, Part], most: int) -> list[dict[str, Part]]:
    """The parts in their order, in shards of at most so many bytes."""
    shards: list[dict[str, Part]] = [{}]
    room = most
    for name, part in parts.items():
        if shards[-1] and size(part) > room:
            shards.append({})
            room = most
        shards[-1][name] = part
        room -= size(part)
    return shards


def write_parts(folder: Path, parts: dict[str, Part], most: int = SHARD) -> None:
    """Make all parts, one after the other, and write them; progress is told on stderr.

    raises: NanogapError where one is not finite
    """
    shards = divide(parts, most)
    total, tensors, written = sum(map(size, parts.values())), 0, 0
    begun = told = time.monotonic()
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        for part in write_shard(folder / file, shard):
            tensors, written, now = tensors + 1, written + size(part), time.monotonic()
            if now - told > TELL_EVERY or tensors == len(parts):
                told = now
                left = (now - begun) * (total - written) / max(written, 1)
                tell(f"{tensors} of {len(parts)} tensors, {written / 1e9:.1f} of "
                     f"{total / 1e9:.1f} GB, {left / 60:.1f} min to go")
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_shard(path: Path, parts: dict[str, Part]) -> Iterator[Part]:
    """One file; each of its parts once it is written."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, part in parts.items():
        begin, end = end, end + size(part)
        header[name] = {"dtype": NAMES[part.dtype], "shape": list(part.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                       # the numbers begin at a multiple of 8
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts.values():
            tensor = part.make().contiguous()
            assert tensor.shape == part.shape and tensor.dtype == part.dtype, part.source
            if not bool(tensor.isfinite().all()):
                raise NanogapError(f"{part.source} holds numbers that are not finite: it is "
                                   "broken, or belongs to another model; download it again")
            file.write(numbers(tensor))
            yield part


def numbers(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as long as it lives; torch has no such view without numpy."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
