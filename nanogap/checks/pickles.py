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

from nanogap.checks.reading import instead, one_line
from nanogap.errors import NanogapError


class Plain(pickle.Unpickler):
    """Reads what needs no code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and needs no code")


def read_plain(path: Path, data: bytes) -> Any:
    """The lists, dicts, text and numbers in a pickle; data: the bytes of the file.

    raises: NanogapError where it is none, or names anything that would be run
    """
    try:
        return Plain(io.BytesIO(data), encoding="latin1").load()   # Python 2 wrote the published
    except Exception as error:                                # a broken one raises almost anything
        raise NanogapError(instead(path) or f"{path} is no JSON, and no whole pickle of plain data "
                           f"({one_line(error)}); get it from where it was published") from None


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
