"""The file of answers: a JSON line for each as it comes, and how an interrupted run goes on.

In FILE.jsonl.settings.json beside it are the settings on which answers depend.
A kill loses the answers in the making, and a line that it tore is cut off when the run resumes.
Several processes add to one file, each a whole line at a time.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from nanogap.checks.output import check_file, unwritable, write_whole
from nanogap.checks.reading import read_documents, read_json
from nanogap.errors import NanogapError
from nanogap.fast.processes import joined


def settings_of(path: Path) -> Path:
    """Where the settings of a file of answers are."""
    return path.with_name(f"{path.name}.settings.json")


def check_out(path: Path, resume: bool) -> None:
    """Refuse a file that cannot be begun, or that was begun and shall not be continued."""
    check_file("--out", path)
    if resume and path.exists() and not settings_of(path).exists():
        raise NanogapError(f"--resume: {settings_of(path)} is not there, which says how {path} was "
                           "made; give a new file")
    if not resume and (path.exists() or settings_of(path).exists()):
        raise NanogapError(f"--out {path} exists; continue it with --resume, or give a new file")


def go_on(path: Path | None, settings: dict) -> tuple[list[dict], Callable[[dict], object]]:
    """Begin a file, or continue it: all answers in it, and what writes one more.

    raises: NanogapError where they were made otherwise, by the name of what differs
    """
    records: list[dict] = []
    if path is None:
        return records, lambda record: None
    if path.exists():
        made = read_json(settings_of(path))
        for key, value in made.items():            # a strategy of then may not be asked now
            if settings.get(key, value) != value:
                raise NanogapError(f"--resume: {path} was made with another {key}, {value} and not "
                                   f"{settings[key]}; give that one, or a new file")
        settings = made | settings
        records = earlier(path)
    rank, world = joined()
    if rank == 0:
        write_whole("--out", settings_of(path), (json.dumps(settings) + "\n").encode())
    if world > 1:
        dist.barrier()                             # all have read what there was
    file = open(path, "ab", buffering=0)           # a line is one write, which is not tried again

    def write(record: dict) -> None:
        line = (json.dumps(record) + "\n").encode()
        try:
            while line:
                line = line[file.write(line):]
        except OSError as error:
            raise unwritable("--out", path, error) from None

    return records, write


def earlier(path: Path) -> list[dict]:
    """The answers in a file, from which a line goes that a kill tore."""
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    records = []
    for where, record in read_documents(path, whole):
        if not isinstance(record, dict) or "iou" not in record:
            raise NanogapError(f"--resume: {where} is no answer; take it out")
        records.append(record)
    return records
