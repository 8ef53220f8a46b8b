"""Text and JSON, in whatever encoding and spacing they come, or refused in one line.

In:  the path of a file that a person gave.
Out: the object in it, or the documents in it, each with its place.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanogap.checks.command import lacks_memory
from nanogap.errors import NanogapError

LONGEST = 1 << 26     # bytes of a checkpoint's JSON; the largest tokenizer.json published has 2^25
# how a file may begin -> what it is then, and the next step: a pointer or a web page that came in
# the place of a file would only come again
INSTEAD = {
    rb"version https://git-lfs": "is a pointer of git-lfs and not the file itself; get it with "
                                 "`git lfs pull`, or download it from its page",
    rb"\s*<": "is a web page, or an error of the server, and not the file itself; open the link "
              "in a browser and download what it leads to",
    rb"\x1f\x8b|\xfd7zXZ|BZh|7z\xbc\xaf|Rar!": "is compressed; unpack it, and give what was in it",
    rb"PAR1": "is a parquet file; write its rows, without the images, as lines of JSON: pandas "
             "does it with to_json(orient='records', lines=True)",
    rb"GGUF": "is a GGUF file, which is llama.cpp's; give the checkpoint that it was made from"}
SOMETHING = re.compile(r"\S")


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
    return NanogapError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); "
                        "put it there, and allow this user to read it")


def read_bytes(path: Path, most: int = LONGEST) -> bytes:
    """All of a file of a size that a person could look at."""
    try:
        if path.stat().st_size > most:
            raise NanogapError(f"{path} has {path.stat().st_size} bytes, more than any file of "
                               "that kind: it is some other file under this name")
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from None


def text_of(path: Path, data: bytes) -> str:
    """The text in a file: UTF-8, or UTF-16 with a mark, as PowerShell's `>` writes it."""
    coding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(coding)
    except UnicodeDecodeError as error:
        raise NanogapError(instead(path) or f"{path} cannot be read ({one_line(error)}); "
                           "save it as UTF-8") from None


def read_json(path: Path, most: int = LONGEST) -> dict:
    """The object in a file of a checkpoint, in UTF-8; most: bytes that it may have.

    raises: NanogapError where there is no such file, or where it holds no JSON, or no object
    """
    data = read_bytes(path, most)
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise broken_json(path, str(path), error) from None
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
    text, end, line = text_of(path, data), 0, 1
    while found := SOMETHING.search(text, end):
        begin = found.start()
        line += text.count("\n", end, begin)
        where = f"{path}, line {line}"
        try:
            value, after = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError) as error:      # or lists in lists without end
            raise broken_json(path, where, error) from None
        if isinstance(value, list) and end == 0 and not SOMETHING.search(text, after):
            yield from ((f"{path}, entry {i}", item) for i, item in enumerate(value, 1))
        else:
            yield where, value
        line += text.count("\n", begin, after)
        end = after


def broken_json(path: Path, where: str, error: Exception) -> NanogapError:
    """The mistake that broken JSON is; where: the file, and the line in it."""
    return NanogapError(instead(path) or f"{where} cannot be read (broken JSON: "
                        f"{one_line(error)}); mend it there, or get it again")
