"""Tensors out of the pieces in which a model is published, and into one file of safetensors.

They are mapped into memory (files of torch before 1.6 cannot be, and are read whole) and written
one by one, for which safetensors' own writer wants all of a file at once.
Source: the format, https://github.com/huggingface/safetensors#format
"""

import ctypes
import json
import re
from collections.abc import Iterable
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from nanogap.checks.command import tell
from nanogap.checks.explain import weight_files
from nanogap.checks.reading import read_json, tensors_of
from nanogap.errors import NanogapError
from nanogap.weights import UNUSED

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
GB = 1_000_000_000


class Piece(dict[str, Tensor]):
    """The tensors of a folder of shards, or of a file that torch.save wrote, by their names."""

    def __init__(self, path: Path, download: str, wanted: str = "") -> None:
        """wanted: pattern of the names that are taken;  download: how to get it, for errors"""
        super().__init__()
        self.path, self.download = path, download
        if not path.exists():
            raise NanogapError(f"{path} does not exist; get it with {download}")
        files = weight_files(path, f"get it with {download}") if path.is_dir() else [path]
        for file in files:
            for name, tensor in tensors_of(file).items():
                if re.search(UNUSED, name) or not re.search(wanted, name):
                    continue
                if tensor.dtype not in NAMES:
                    raise NanogapError(f"{path}: {name} is {tensor.dtype}, and weights are "
                                       f"float32, bfloat16, float16; get it with {download}")
                self[name] = tensor

    def __missing__(self, name: str) -> Tensor:
        raise NanogapError(f"{self.path} lacks {name}; get it whole with {self.download}")

    def empty(self) -> "Piece":
        """The same without the numbers, to see which shapes are made of them."""
        other = copy(self)
        other.update({name: tensor.to("meta") for name, tensor in self.items()})
        return other

    def config(self, *kinds: str) -> dict:
        """Its config.json, which must be of one `model_type` of these."""
        file = self.path / "config.json"
        config = read_json(file)
        kind = config.get("model_type")
        if kind not in kinds:
            raise NanogapError(f"{file} describes a {kind!r:.80} model, not {kinds[0]!r}; get one "
                               f"with {self.download}")
        return config


def write_tensors(path: Path, empty: dict[str, Tensor],
                  tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors one after the other, in the order of the empty ones; each gigabyte is told."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, tensor in empty.items():
        begin, total = total, total + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, total]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                       # the numbers begin at a multiple of 8
    written = 0
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            # its bytes as they are; torch has no such view without numpy
            tensor = tensor.contiguous()
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
            written += tensor.nbytes
            if written % GB < tensor.nbytes:
                tell(f"{written / GB:.0f} of {total / GB:.1f} GB ...")
