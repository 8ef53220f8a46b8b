"""Pickles of plain data, as the refer API's `refs(unc).p` is, and files of tensors.

In:  the path of one.  Out: what it holds.  Functions that a pickle names are never called.
"""

import pickle
from pathlib import Path
from typing import Any, NoReturn
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor

from nanogap.checks.command import lacks_memory
from nanogap.checks.reading import unreadable
from nanogap.errors import NanogapError

MORE = ("it holds more than tensors", "save it again with `torch.save(model.state_dict(), PATH)`")


class Plain(pickle.Unpickler):
    """Reads what needs no code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise NanogapError(f"it names {module}.{name}, and what it should hold needs no code; get "
                           "it from where it was published")


def read_plain(path: Path) -> Any:
    """The lists, dicts, text and numbers in a pickle.

    raises: NanogapError where it is none, or names anything that would be run
    """
    with path.open("rb") as file:
        try:
            return Plain(file, encoding="latin1").load()      # Python 2 wrote the published ones
        except NanogapError as error:
            raise NanogapError(f"{path} is refused: {error}") from None
        except Exception:                                     # a broken one raises almost anything
            raise unreadable(path, "it is no whole pickle, and holds no JSON",
                             "download it again, or give another file") from None


def read_saved(path: Path) -> Any:
    """What torch.save wrote: tensors, numbers, texts, and collections of them; no code is run.

    Tensors are mapped into memory, but for the format of torch before 1.6, which is read.
    """
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, mapped as above; of a training's file, those of its model.

    raises: NanogapError where it cannot be read, or holds anything else
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        state = read_saved(path)
    except Exception as error:               # an unpickler raises almost anything
        if lacks_memory(error):
            raise
        if "was not an allowed global" in str(error):                         # torch's words
            raise unreadable(path, *MORE) from None
        is_pickle = "Weights only load failed" not in str(error)      # torch advises to trust it
        why = error if is_pickle else "it is no file that torch.save wrote"
        raise unreadable(path, why, "download it again") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(
            isinstance(tensor, Tensor) and tensor.layout == torch.strided
            and not tensor.is_quantized for tensor in state.values()):
        raise unreadable(path, *MORE)
    return state
