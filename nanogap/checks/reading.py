"""Text and JSON: read in whatever encoding and spacing they come, or refused in one line.

In:  the path of a file that a person gave.
Out: its text, the object in it, or the documents in it, each with its place.

A file that cannot be read is looked at before anything is said of it: a pointer or a web page that
came in its place would only come again.
"""

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanogap.checks.command import lacks_memory
from nanogap.errors import NanogapError

LONGEST = 1 << 26     # bytes of a checkpoint's JSON; the largest tokenizer.json published has 2^25
# how a file may begin -> what it is then, and the next step
INSTEAD = {
    rb"version https://git-lfs": "is a pointer of git-lfs and not the file itself; get it with "
                                 "`git lfs pull`, or download it from its page",
    rb"\s*<": "is a web page, or an error of the server, and not the file itself; open the link "
              "in a browser and download what it leads to",
    rb"\x1f\x8b|\xfd7zXZ|BZh|7z\xbc\xaf|Rar!": "is compressed; unpack it, and give what was in it",
    rb"GGUF": "is a GGUF file, which is llama.cpp's; give the checkpoint that it was made from",
    rb"\x89HDF": "is a file of TensorFlow's or of h5py's; give one of PyTorch's"}
SOMETHING = re.compile(r"\S")
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


def instead(path: Path) -> str | None:
    """What a file is in place of what it should be, as its first bytes tell, and the next step."""
    with path.open("rb") as file:
        start = file.read(256)
    for pattern, says in INSTEAD.items():
        if re.match(pattern, start):
            return f"{path} {says}"
    return None


def one_line(error: BaseException) -> str:
    """What an error says, as a part of one line."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def printable(text: str) -> str:
    """Text from a file, which may hold anything, so that it fits on one line of a message."""
    return ascii(text)[1:-1][:200]


def unreadable(path: Path, error: BaseException) -> NanogapError:
    """The mistake that it is when a file cannot be opened, or held in memory."""
    if lacks_memory(error):
        return NanogapError(f"there is no room in memory for {path} ({one_line(error)}); "
                            "end other programs, or choose another device or dtype")
    if isinstance(error, PermissionError):
        return NanogapError(f"{path} may not be read by this user; allow it with "
                            f"`chmod u+r {path}`, or run as its owner")
    return NanogapError(f"{path} cannot be read ({one_line(error)}); download it again")


# ----- text ---------------------------------------------------------------------------------------


def read_bytes(path: Path, most: int = LONGEST) -> bytes:
    """All of a regular file of a size that a person could look at."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise NanogapError(f"{path} is no regular file; put the right one there")
        if found.st_size > most:
            raise NanogapError(f"{path} has {found.st_size} bytes, more than any file of that "
                               "kind: it is some other file under this name")
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from None


def text_of(path: Path, data: bytes) -> str:
    """The text in a file: UTF-8, or UTF-16 with a mark, as PowerShell's `>` writes it."""
    coding = next((MARKS[mark] for mark in MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(coding)
    except UnicodeDecodeError as error:
        raise NanogapError(instead(path) or f"{path} cannot be read ({one_line(error)}); "
                           "save it as UTF-8") from None


# ----- JSON ---------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """The object in a file of a checkpoint, in UTF-8.

    raises: NanogapError where there is no such file, or where it holds no JSON, or no object
    """
    data = read_bytes(path)
    if any(data.startswith(mark) for mark in MARKS):
        raise NanogapError(f"{path} cannot be read (it begins with a mark of its encoding, as "
                           "UTF-16 does); save it as UTF-8 without one")
    value = parse(path, str(path), text_of(path, data))[0]
    if not isinstance(value, dict):
        raise NanogapError(f"{path} holds no JSON object but a {type(value).__name__}: "
                           "it is some other file under this name")
    return value


def optional(path: Path) -> dict:
    """The same of a file that may be missing."""
    return read_json(path) if path.exists() else {}


def read_documents(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    """Each document of JSON with its place: the entries of a list, or objects one behind another.

    They may stand a line each, or over several lines, or several on one.
    data:   the bytes of the file
    raises: NanogapError that names the place, where one is broken
    """
    text = text_of(path, data)
    first = at = after_space(text, 0)
    line = 1 + text.count("\n", 0, at)
    while at < len(text):
        value, end = parse(path, f"{path}, line {line}", text, at)
        end = after_space(text, end)
        if isinstance(value, list) and at == first and end == len(text):
            yield from ((f"{path}, entry {i}", item) for i, item in enumerate(value, 1))
        else:
            yield f"{path}, line {line}", value
        line += text.count("\n", at, end)
        at = end


def after_space(text: str, at: int) -> int:
    """Where something stands again, or the text ends."""
    found = SOMETHING.search(text, at)
    return found.start() if found else len(text)


def parse(path: Path, where: str, text: str, at: int | None = None) -> tuple[Any, int]:
    """The document that begins at a place, and where it ends; None: there is nothing else."""
    try:
        if at is None:
            return json.loads(text), len(text)
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        step = "download it again" if cut_off else "mend it there, or get it from where it was made"
        raise NanogapError(instead(path) or f"{where} cannot be read (broken JSON: "
                           f"{one_line(error)}); {step}") from None
    except (ValueError, RecursionError) as error:      # a number, or lists in lists, without end
        raise NanogapError(f"{where} cannot be read ({one_line(error)}); "
                           "get it from where it was made") from None


def write_json(path: Path, value: dict) -> None:
    """A JSON file that a person can read."""
    path.write_text(json.dumps(value, indent=2) + "\n")
