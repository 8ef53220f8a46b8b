"""The pieces of a published model: every tensor's name and shape at once, its numbers when needed.

In:  a folder with shards and their index, or one file that torch.save wrote.
Out: parts of the new checkpoint, each a shape and a way to make it.

Numbers are mapped into memory, and of each piece one file is open at a time.  (Files of torch
before 1.6 cannot be mapped: of these one is read whole.)
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Size, Tensor

from nanogap.checks.checkpoint import Shard, refuse_adapter, weight_files
from nanogap.checks.config import printable
from nanogap.errors import NanogapError
from nanogap.weights import DTYPES, UNUSED, our_name

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """A tensor of the new checkpoint."""

    shape: Size
    dtype: torch.dtype
    make: Callable[[], Tensor]
    source: str               # the file that it comes from, and its name there


class Piece:
    """The tensors of a folder or a file, by their names in it."""

    def __init__(self, path: Path, download: str) -> None:
        """
        download: the command that gets it, for errors
        raises:   NanogapError where it is missing or broken, or holds an adapter
        """
        self.path = path
        self.download = download
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.shard: Shard | None = None
        if not path.exists():
            raise NanogapError(f"{path} does not exist; get it with {download}")
        if path.is_dir():
            refuse_adapter(path)
        for file in weight_files(path, download) if path.is_dir() else [path]:
            self.look_into(file)
        self.shard = None

    def look_into(self, file: Path) -> None:
        """What one of the files holds."""
        self.shard = None                                 # one file at a time
        self.shard = Shard(file, CPU)
        for name in self.shard.names():
            if UNUSED.search(name):
                continue
            if name in self.files:
                raise NanogapError(f"{file} holds {printable(name)}, which {self.files[name]} "
                                   f"holds as well; get them again with {self.download}")
            tensor = self.shard.get(name)
            self.files[name] = file
            self.shapes[name] = tensor.shape
            self.dtypes[name] = tensor.dtype

    def shape(self, name: str) -> Size:
        """The shape of a tensor that must be there, and be of numbers that weights have."""
        if name not in self.files:
            raise NanogapError(f"{self.path} lacks {printable(name)}; get it whole with "
                               f"{self.download}")
        if self.dtypes[name] not in DTYPES.values():
            raise NanogapError(f"{self.where(name)} is {self.dtypes[name]}, and weights are "
                               f"{', '.join(DTYPES)}; get them again with {self.download}")
        return self.shapes[name]

    def where(self, name: str) -> str:
        """The file that holds a tensor, and its name there, for messages."""
        return f"{self.files[name]}: {printable(name)}"

    def get(self, name: str) -> Tensor:
        """The numbers of a tensor, mapped into memory."""
        file = self.files[name]
        if self.shard is None or self.shard.path != file:
            self.shard = None                             # first this one goes
            self.shard = Shard(file, CPU)
        return self.shard.get(name)

    def part(self, name: str, dtype: torch.dtype | None = None) -> Part:
        """A tensor as it is, or in another precision."""
        shape, dtype = self.shape(name), dtype or self.dtypes[name]
        return Part(shape, dtype, lambda: self.get(name).to(dtype), self.where(name))

    def parts(self, rename: Sequence[tuple[str, str]], dtype: torch.dtype | None = None,
              wanted: str = "") -> dict[str, Part]:
        """All of them, under new names.

        rename: patterns, and what takes their place; a name that none fits stays as it is
        wanted: pattern of the names that a model takes, where it leaves the others
        """
        return {our_name(name, rename): self.part(name, dtype)
                for name in self.files if re.search(wanted, name)}
