"""The pieces in which a model is published: folders of shards, and files that torch.save wrote.

In:  the path of one.  Out: its tensors by their names there, mapped into memory.
(Files of torch before 1.6 cannot be mapped, and are read whole.)
"""

import re
from copy import copy
from pathlib import Path

from torch import Tensor

from nanogap.checks.explain import weight_files
from nanogap.checks.reading import read_json, tensors_of
from nanogap.errors import NanogapError
from nanogap.weights import DTYPES, UNUSED


class Piece(dict[str, Tensor]):
    """The tensors of one piece."""

    def __init__(self, path: Path, download: str, wanted: str = "") -> None:
        """wanted: pattern of the names that are taken;  download: how to get it, for errors"""
        super().__init__()
        self.path, self.download = path, download
        if not path.exists():
            raise NanogapError(f"{path} does not exist; get it with {download}")
        step = f"get it with {download}"
        for file in weight_files(path, step) if path.is_dir() else [path]:
            for name, tensor in tensors_of(file).items():
                if re.search(UNUSED, name) or not re.search(wanted, name):
                    continue
                if tensor.dtype not in DTYPES.values():
                    raise NanogapError(f"{path}: {name} is {tensor.dtype}, and weights are "
                                       f"{', '.join(DTYPES)}; get it with {download}")
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
        if config.get("model_type") not in kinds:
            raise NanogapError(f"{file} describes a {config.get('model_type')!r:.80} model, not "
                               f"{kinds[0]!r}; get one with {self.download}")
        return config
