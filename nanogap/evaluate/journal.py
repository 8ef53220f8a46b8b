"""The file of answers: a JSON line for each as it comes, and how an interrupted run goes on.

In:  a path, and the settings on which answers depend.
Out: FILE.jsonl, and FILE.jsonl.settings.json beside it.

The settings are written first, then every line at once, so a kill loses at most the line in the
making; it is cut off when the run resumes.  Several processes write a part each, FILE.jsonl.part-0
and so on, which are put together in the end.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from nanogap.cli import NanogapError

KEYS = {"id", "image", "expression", "mode", "prune", "keep", "text", "box", "truth", "iou",
        "visual_tokens", "kept", "padding", "prefill_ms", "decode_ms"}


def beside(path: Path) -> tuple[Path, list[Path]]:
    """Where the settings of a file of answers are, and all its parts that there are."""
    parts = sorted(p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}.part-"))
    files = [path, *parts] if path.exists() else parts
    return path.with_name(f"{path.name}.settings.json"), files


def check_out(path: Path, resume: bool) -> None:
    """Refuse a file that cannot be begun, or that was begun and shall not be continued."""
    if not path.parent.is_dir():
        raise NanogapError(f"--out {path} would be in a folder that does not exist; "
                           f"make it with `mkdir -p {path.parent}`")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise NanogapError(f"--out {path} cannot be written; give the path of a new file")
    settings, files = beside(path)
    if files and resume and not settings.exists():
        raise NanogapError(f"--resume: {settings} is not there, which says how {path} was made; "
                           "give a new file")
    if (files or settings.exists()) and not resume:
        raise NanogapError(f"--out {path} exists; continue it with --resume, or give a new file")


def check_settings(path: Path, settings: dict) -> None:
    """Refuse to continue a file whose answers were made otherwise, by the name of what differs."""
    file = beside(path)[0]
    try:
        made = json.loads(file.read_text()) if file.exists() else settings
        differs = [key for key in settings if made.get(key) != settings[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise NanogapError(f"--resume: {file} cannot be read ({error}); give a new file") from None
    if differs:
        key = differs[0]
        raise NanogapError(f"--resume: {path} was made with another {key}, {made.get(key)} and "
                           f"not {settings[key]}; give that one, or a new file")


def read_lines(path: Path) -> list[dict]:
    """The answers in a file; a line that a kill tore is cut off it."""
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append(json.loads(line))
            if not KEYS <= set(records[-1]):
                raise ValueError("keys are lacking")
        except (ValueError, TypeError) as error:
            raise NanogapError(f"--resume: {path}, line {number} is no answer ({error}); "
                               "take the line out, or give a new file") from None
    return records


def earlier(path: Path | None, settings: dict) -> list[dict]:
    """All answers of the runs that this one continues; the same answer comes once."""
    if path is None:
        return []
    check_settings(path, settings)
    records = [record for file in beside(path)[1] for record in read_lines(file)]
    return list({name(record): record for record in records}.values())


def name(record: dict) -> tuple:
    """What an answer is the answer to."""
    return record["id"], record["prune"], record["keep"], record["mode"]


# ----- writing ------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what can go wrong into one line."""
    try:
        yield
    except OSError as error:
        raise NanogapError(f"--out {path} cannot be written ({error.strerror}); mend that and go "
                           "on with --resume, or give a new file") from None


def begin(path: Path | None, settings: dict, rank: int, world: int) -> Callable[[dict], None]:
    """Write the settings, and return what writes an answer."""
    if world > 1:
        dist.barrier()                             # all have read what there was
    if path is None:
        return lambda record: None
    with writing(path):
        if rank == 0:
            write_whole(beside(path)[0], json.dumps(settings) + "\n")
        file = open(path if world == 1 else path.with_name(f"{path.name}.part-{rank}"), "a")

    def write(record: dict) -> None:
        with writing(path):
            file.write(json.dumps(record) + "\n")
            file.flush()

    return write


def write_whole(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def put_together(path: Path | None, records: list[dict]) -> None:
    """All answers into one file, where there are parts of it."""
    if path is None:
        return
    parts = [file for file in beside(path)[1] if file != path]
    if parts:
        with writing(path):
            write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
            for part in parts:
                part.unlink()
