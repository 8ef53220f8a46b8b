"""Pickles: of plain data, as the refer API's `refs(unc).p` is, and of torch.save's.

In:  the path of one.  Out: what it holds.  Functions that it names are never called.
"""

import argparse
import io
import pickle
from pathlib import Path
from typing import Any, NoReturn
from zipfile import is_zipfile

import torch

from nanogap.checks.reading import instead, printable, read_bytes
from nanogap.errors import NanogapError


class Plain(pickle.Unpickler):
    """Reads what needs no code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise NanogapError(f"it names {printable(f'{module}.{name}')}, and what it should hold "
                           "needs no code; get it from where it was published")


def read_plain(path: Path, limit: int = 1 << 28) -> Any:
    """The lists, dicts, text and numbers in a pickle of at most `limit` bytes.

    raises: NanogapError where it is none, or names anything that would be run
    """
    data = io.BytesIO(read_bytes(path, limit))
    try:
        return Plain(data, encoding="latin1").load()          # Python 2 wrote the published ones
    except NanogapError as error:
        raise NanogapError(f"{path} is refused: {error}") from None
    except Exception:                                         # a broken one raises almost anything
        raise NanogapError(instead(path) or f"{path} is no whole pickle, and holds no JSON; "
                           "download it again, or give another file") from None


def read_saved(path: Path) -> Any:
    """What torch.save wrote: tensors, numbers, texts, and collections of them; no code is run.

    Tensors are mapped into memory, but for the format of torch before 1.6, which is read.  Of all
    classes only argparse.Namespace is taken, which holds a training's settings.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))


def of_model(state: Any) -> dict:
    """The tensors among what was saved; of a training's, those of its model."""
    if not isinstance(state, dict):
        raise ValueError("it holds more than tensors")
    model = state.get("model")
    return model if isinstance(model, dict) else state
