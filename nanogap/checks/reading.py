"""JSON in whatever encoding, pickles of plain data and files of tensors, or refused in one line.

In:  the path of a file that a person gave.
Out: what it holds, of many documents each with its place.  No code in a pickle is run.
"""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor

from nanogap.checks.command import lacks_memory, one_line
from nanogap.errors import NanogapError

# how a file may begin -> what it is then, and the next step: a pointer or a web page that came in
# the place of a file would only come again
INSTEAD = {
    rb"version https://git-lfs": "is a pointer of git-lfs and not the file itself; get it with "
                                 "`git lfs pull`, or download it from its page",
    rb"\s*<": "is a web page, or an error of the server, and not the file itself; open the link "
              "in a browser and download what it leads to",
    rb"PAR1": "is a parquet file; write its rows, without the images, as lines of JSON: pandas "
              "does it with to_json(orient='records', lines=True)"}


def unreadable(path: Path, why: object, step: str, where: str | None = None) -> NanogapError:
    """The mistake that a broken file is, or what it is instead, as its first bytes tell.

    why: an error, or what is wrong;  step: what to do next;  where: the place in the file
    """
    with path.open("rb") as file:
        start = file.read(256)
    for pattern, says in INSTEAD.items():
        if re.match(pattern, start):
            return NanogapError(f"{path} {says}")
    return NanogapError(f"{where or path} cannot be read ({one_line(why)}); {step}")


def parse(path: Path, text: str | bytes, where: str | None = None) -> Any:
    """One document of JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"broken JSON: {error}", "mend it there, or get it again",
                         where) from None


def read_json(path: Path) -> dict:
    """The object in a file of a checkpoint; NanogapError where it holds no JSON, or no object."""
    value = parse(path, path.read_bytes())
    if not isinstance(value, dict):
        raise NanogapError(f"{path} holds no JSON object but a {type(value).__name__}: "
                           "it is some other file under this name")
    return value


def read_documents(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    """Each document of JSON with its place: the entries of a list, or what stands on each line.

    data:   the bytes of the file: UTF-8, or UTF-16, as PowerShell's `>` writes it
    raises: NanogapError that names the place, where one is broken
    """
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise unreadable(path, error, "save it as UTF-8") from None
    if text.lstrip().startswith("["):
        for number, item in enumerate(parse(path, text), 1):
            yield f"{path}, entry {number}", item
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse(path, line, where)


class Plain(pickle.Unpickler):
    """Reads what needs no code, as the refer API's `refs(unc).p`."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise NanogapError(f"it names {module}.{name}, and what it should hold needs no code; get "
                           "it from where it was published")


def read_plain(path: Path) -> Any:
    """The lists, dicts, text and numbers in a pickle; NanogapError where it is no such pickle."""
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
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        except Exception as error:
            raise unreadable(path, error, "download it again") from None
    try:
        state = read_saved(path)
        state = state.get("model", state)
        if all(isinstance(tensor, Tensor) for tensor in state.values()):
            return state
    except Exception as error:               # an unpickler raises almost anything
        if lacks_memory(error):
            raise
    raise unreadable(path, "it is cut off, or holds more than tensors",
                     "download it again, or save it with `torch.save(model.state_dict(), PATH)`")
