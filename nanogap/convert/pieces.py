"""The pieces of a published model: names and shapes at once, numbers when they are needed.

In:  a folder with shards and their index, or one file that torch.save wrote.
Out: parts of the new checkpoint, each made of tensors of the pieces.

Numbers are mapped into memory, and of each piece one file is open at a time.  (Files of torch
before 1.6 cannot be mapped: of these one is read whole.)
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Size, Tensor

from nanogap.checks.explain import check_form, names_in, weight_files
from nanogap.checks.loading import snapshot
from nanogap.checks.pickles import tensors_of
from nanogap.checks.reading import read_json
from nanogap.errors import NanogapError
from nanogap.models.saving import our_name
from nanogap.weights import DTYPES, UNUSED


class Piece:
    """The tensors of a folder or a file, by their names in it."""

    def __init__(self, path: Path, download: str) -> None:
        """download: the command that gets it, for errors"""
        self.path, self.download = snapshot(path), download
        self.found: dict[str, tuple[Path, Size, str]] = {}         # file, shape and precision
        self.open: tuple[Path, dict[str, Tensor]] | None = None    # a pickle, read or mapped
        if not self.path.exists():
            raise NanogapError(f"{path} does not exist; get it with {download}")
        check_form(self.path, names_in(self.path))
        step = f"get it with {download}"
        for file in weight_files(self.path, step) if self.path.is_dir() else [path]:
            for name, tensor in tensors_of(file).items():
                if not re.search(UNUSED, name):
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    self.found[name] = (file, tensor.shape, dtype)

    def config(self, *kinds: str) -> dict:
        """Its config.json, which must be of one `model_type` of these."""
        file = self.path / "config.json"
        config = read_json(file)
        if config.get("model_type") not in kinds:
            raise NanogapError(f"{file} describes a {config.get('model_type')!r:.80} model, not "
                               f"{kinds[0]!r}; get one with {self.download}")
        return config

    def where(self, name: str) -> str:
        """The file that holds a tensor, and its name there, for messages."""
        return f"{self.found[name][0]}: {name}"

    def empty(self, name: str) -> Tensor:
        """A tensor without its numbers; it must be there, and of a precision that weights have."""
        if name not in self.found:
            raise NanogapError(f"{self.path} lacks {name}; get it whole with {self.download}")
        _, shape, dtype = self.found[name]
        if dtype not in DTYPES:
            raise NanogapError(f"{self.where(name)} is torch.{dtype}, and weights are "
                               f"{', '.join(DTYPES)}; get it with {self.download}")
        return torch.empty(shape, dtype=DTYPES[dtype], device="meta")

    def get(self, name: str) -> Tensor:
        """A tensor with its numbers, mapped into memory."""
        file = self.found[name][0]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        if self.open is None or self.open[0] != file:
            self.open = None                              # first this one goes
            self.open = (file, tensors_of(file))
        return self.open[1][name]


class Part:
    """A tensor of the new checkpoint, and how it is made."""

    def __init__(self, make: Callable[..., Tensor], *sources: tuple[Piece, str]) -> None:
        """make: what makes it of the tensors in `sources`, each a piece and a name there"""
        self.make, self.sources = make, sources
        empty = [piece.empty(name) for piece, name in sources]
        try:
            self.empty = make(*empty)    # without numbers: what shape and precision will it have?
        except RuntimeError:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in empty)
            raise NanogapError(f"{self.where()} are {shapes}, which do not go together: the pieces "
                               "belong to different models") from None

    def where(self) -> str:
        """Where it comes from, for messages."""
        return " and ".join(piece.where(name) for piece, name in self.sources)

    def tensor(self) -> Tensor:
        """It, with its numbers."""
        return self.make(*(piece.get(name) for piece, name in self.sources))


def parts_of(piece: Piece, rename: Sequence[tuple[str, str]], dtype: torch.dtype | None = None,
             wanted: str = "") -> dict[str, Part]:
    """All tensors of a piece under new names, as they are or in another precision.

    rename: patterns, and what takes their place; a name that none fits stays as it is
    wanted: pattern of the names that a model takes, where it leaves the others
    """
    def same(tensor: Tensor) -> Tensor:
        return tensor.to(dtype or tensor.dtype)

    return {our_name(name, rename): Part(same, (piece, name))
            for name in piece.found if re.search(wanted, name)}
