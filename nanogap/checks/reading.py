"""Text and JSON, in whatever encoding and spacing they come, or refused in one line.

In:  the path of a file that a person gave.
Out: the object in it, or the documents in it, each with its place.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanogap.checks.command import one_line
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
