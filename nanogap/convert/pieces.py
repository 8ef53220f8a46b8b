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
from safetensors import safe_open
from torch import Size, Tensor

from nanogap.checks.belongs import tensors_of
from nanogap.checks.explain import check_readable, weight_files
from nanogap.checks.pickles import of_model, read_saved
from nanogap.checks.reading import printable
from nanogap.checks.silent import refuse_adapter
from nanogap.errors import NanogapError
from nanogap.models.saving import our_name
from nanogap.weights import DTYPES, UNUSED


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
        self.path, self.download = path, download
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, Size] = {}
        self.dtypes: dict[str, str] = {}
        self.open: tuple[Path, dict[str, Tensor]] | None = None    # a pickle, read or mapped
        if not path.exists():
            raise NanogapError(f"{path} does not exist; get it with {download}")
        refuse_adapter(path)
        for file in weight_files(path, download) if path.is_dir() else [path]:
            check_readable(file)
            for name, shape, dtype in tensors_of(file):
                if re.search(UNUSED, name):
                    continue
                if name in self.files:
                    raise NanogapError(f"{file} holds {printable(name)}, which {self.files[name]} "
                                       f"holds as well; get them again with {self.download}")
                self.files[name], self.shapes[name], self.dtypes[name] = file, shape, dtype

    def shape(self, name: str) -> Size:
        """The shape of a tensor that must be there, and be of numbers that weights have."""
        if name not in self.files:
            raise NanogapError(f"{self.path} lacks {printable(name)}; get it whole with "
                               f"{self.download}")
        if self.dtypes[name] not in DTYPES:
            raise NanogapError(f"{self.where(name)} is torch.{self.dtypes[name]}, and weights are "
                               f"{', '.join(DTYPES)}; get them again with {self.download}")
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Its precision."""
        self.shape(name)
        return DTYPES[self.dtypes[name]]

    def where(self, name: str) -> str:
        """The file that holds a tensor, and its name there, for messages."""
        return f"{self.files[name]}: {printable(name)}"

    def get(self, name: str) -> Tensor:
        """The numbers of a tensor, mapped into memory."""
        file = self.files[name]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        if self.open is None or self.open[0] != file:
            self.open = None                              # first this one goes
            self.open = (file, of_model(read_saved(file)))
        return self.open[1][name]

    def part(self, name: str, dtype: torch.dtype | None = None) -> Part:
        """A tensor as it is, or in another precision."""
        shape, dtype = self.shape(name), dtype or self.dtype(name)
        return Part(shape, dtype, lambda: self.get(name).to(dtype), self.where(name))

    def parts(self, rename: Sequence[tuple[str, str]], dtype: torch.dtype | None = None,
              wanted: str = "") -> dict[str, Part]:
        """All of them, under new names.

        rename: patterns, and what takes their place; a name that none fits stays as it is
        wanted: pattern of the names that a model takes, where it leaves the others
        """
        return {our_name(name, rename): self.part(name, dtype)
                for name in self.files if re.search(wanted, name)}
