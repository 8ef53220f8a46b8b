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
MORE = ("it holds more than tensors", "save it again with `torch.save(model.state_dict(), PATH)`")
SOMETHING = re.compile(r"\S")


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


def broken_json(path: Path, error: Exception, where: str | None = None) -> NanogapError:
    return unreadable(path, f"broken JSON: {error}", "mend it there, or get it again", where)


def read_json(path: Path) -> dict:
    """The object in a file of a checkpoint, in UTF-8.

    raises: NanogapError where it holds no JSON, or no object
    """
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise broken_json(path, error) from None
    if not isinstance(value, dict):
        raise NanogapError(f"{path} holds no JSON object but a {type(value).__name__}: "
                           "it is some other file under this name")
    return value


def read_documents(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    """Each document of JSON with its place: the entries of a list, or objects one behind another.

    They may stand a line each, or over several lines, or several on one.
    data:   the bytes of the file: UTF-8, or UTF-16 with a mark, as PowerShell's `>` writes it
    raises: NanogapError that names the place, where one is broken
    """
    try:
        marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise unreadable(path, error, "save it as UTF-8") from None
    end, line = 0, 1
    while found := SOMETHING.search(text, end):
        begin = found.start()
        line += text.count("\n", end, begin)
        where = f"{path}, line {line}"
        try:
            value, after = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError) as error:      # or lists in lists without end
            raise broken_json(path, error, where) from None
        if isinstance(value, list) and end == 0 and not SOMETHING.search(text, after):
            yield from ((f"{path}, entry {i}", item) for i, item in enumerate(value, 1))
        else:
            yield where, value
        line += text.count("\n", begin, after)
        end = after


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
