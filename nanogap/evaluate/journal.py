"""The file of answers: a JSON line for each as it comes, and how an interrupted run goes on.

In:  a path, and the settings on which answers depend.
Out: FILE.jsonl, and FILE.jsonl.settings.json beside it.
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

KEYS = {"id", "image", "expression", "mode", "prune", "keep", "text", "box", "truth", "iou",
        "cut_off", "visual_tokens", "kept", "padding", "prefill_ms", "decode_ms"}


def settings_of(path: Path) -> Path:
    """Where the settings of a file of answers are."""
    return path.with_name(f"{path.name}.settings.json")


def check_out(path: Path, resume: bool) -> None:
    """Refuse a file that cannot be begun, or that was begun and shall not be continued."""
    check_file("--out", path)
    settings = settings_of(path)
    if resume and path.exists() and not settings.exists():
        raise NanogapError(f"--resume: {settings} is not there, which says how {path} was made; "
                           "give a new file")
    if not resume and (path.exists() or settings.exists()):
        raise NanogapError(f"--out {path} exists; continue it with --resume, or give a new file")


def earlier(path: Path | None, settings: dict) -> list[dict]:
    """All answers of the runs that this one continues.

    settings: take the digests of strategies that are not asked now
    raises:   NanogapError where answers were made otherwise
    """
    if path is None or not path.exists():
        return []
    check_settings(path, settings)
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))              # a line that a kill tore
    records = []
    for where, record in read_documents(path, whole):
        if not isinstance(record, dict) or not KEYS <= record.keys():
            raise NanogapError(f"--resume: {where} is no answer; take the line out")
        records.append(record)
    return records


def check_settings(path: Path, settings: dict) -> None:
    """Refuse to continue a file whose answers were made otherwise, by the name of what differs."""
    made = read_json(settings_of(path))
    before, own = made.get("strategies", {}), settings.get("strategies", {})
    then = {key: made.get(key) for key in settings if key != "strategies"} | before
    now = settings | before | own                  # a strategy that was not asked then may be new
    for key, value in then.items():
        if value != now[key]:
            raise NanogapError(f"--resume: {path} was made with another {key}, {value} and not "
                               f"{now[key]}; give that one, or a new file")
    if before:
        settings["strategies"] = before | own


def name(record: dict) -> tuple:
    """What an answer is the answer to."""
    return record["id"], record["prune"], record["keep"], record["mode"]


def begin(path: Path | None, settings: dict, rank: int, world: int) -> Callable[[dict], None]:
    """Write the settings, and return what writes an answer."""
    if path is None:
        return lambda record: None
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

    return write


def put_together(path: Path | None, records: list[dict]) -> None:
    """All answers into the file in the end; what several machines add to one may be torn."""
    if path is not None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_whole("--out", path, lines.encode())
