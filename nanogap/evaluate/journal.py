"""The file of answers: a JSON line for each as it comes, and how an interrupted run goes on.

In:  a path, and the settings on which answers depend.
Out: FILE.jsonl, and FILE.jsonl.settings.json beside it.

The settings are written first, then every line as soon as there is an answer, so a kill loses the
answers in the making, those about one image in one run; a line that it tore is cut off when the run
resumes.  Several processes write a part each, FILE.jsonl.part-0 and so on, which are put together
in the end.  All of them are one run, and no other may write.
A strategy of one's own that was edited loses its own answers: they are asked again.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from nanogap.checks.command import tell
from nanogap.checks.output import check_file, write_whole
from nanogap.errors import NanogapError

KEYS = {"id", "image", "expression", "mode", "prune", "keep", "text", "box", "truth", "iou",
        "cut_off", "visual_tokens", "kept", "padding", "prefill_ms", "decode_ms"}


# ----- reading ------------------------------------------------------------------------------------


def settings_of(path: Path) -> Path:
    """Where the settings of a file of answers are."""
    return path.with_name(f"{path.name}.settings.json")


def parts_of(path: Path) -> list[Path]:
    """A file of answers and all its parts, those that there are."""
    parts = sorted(p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}.part-"))
    return [path, *parts] if path.exists() else parts


def check_out(path: Path, resume: bool) -> None:
    """Refuse a file that cannot be begun, or that was begun and shall not be continued."""
    check_file("--out", path)
    settings, files = settings_of(path), parts_of(path)
    check_file("--out", settings)
    for file in (path, settings, *files):
        if file.is_symlink() or file.exists() and not file.is_file():
            raise NanogapError(f"--out {path}: {file} is a link, or no regular file; give a new "
                               "file")
    if files and resume and not settings.exists():
        raise NanogapError(f"--resume: {settings} is not there, which says how {path} was made; "
                           "give a new file")
    if (files or settings.exists()) and not resume:
        raise NanogapError(f"--out {path} exists; continue it with --resume, or give a new file")


def check_settings(path: Path, settings: dict) -> set[str]:
    """Refuse to continue a file whose answers were made otherwise, by the name of what differs.

    settings: take the digests of strategies that are not asked now
    returns:  the strategies that were edited since
    """
    file = settings_of(path)
    try:
        made = json.loads(file.read_bytes()) if file.exists() else settings
        differs = [key for key in settings
                   if key != "strategies" and made.get(key) != settings[key]]
        before = made.get("strategies", {})
        edited = {name for name, digest in settings.get("strategies", {}).items()
                  if before.get(name, digest) != digest}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise NanogapError(f"--resume: {file} cannot be read ({error}); give a new file") from None
    if differs:
        key = differs[0]
        raise NanogapError(f"--resume: {path} was made with another {key}, {made.get(key)!s:.80} "
                           f"and not {settings[key]}; give that one, or a new file")
    if before:
        settings["strategies"] = before | settings.get("strategies", {})
    return edited


def read_lines(path: Path) -> list[dict]:
    """The answers in a file; a line that a kill tore is cut off it."""
    records = []
    with reading(path):
        data = path.read_bytes()
        whole = data[:data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
            if not isinstance(records[-1], dict) or not KEYS <= records[-1].keys():
                raise ValueError("keys are lacking")
        except (ValueError, RecursionError) as error:
            raise NanogapError(f"--resume: {path}, line {number} is no answer ({error!s:.80}); "
                               "take the line out, or give a new file") from None
    return records


def earlier(path: Path | None, settings: dict) -> tuple[list[dict], set[str]]:
    """All answers of the runs that this one continues, each once; the strategies that were edited.

    The answers of these are left out, and `begin` takes them out of the file.
    """
    if path is None:
        return [], set()
    edited = check_settings(path, settings)
    records = {name(record): record for file in parts_of(path) for record in read_lines(file)}
    return [record for record in records.values() if record["prune"] not in edited], edited


def name(record: dict) -> tuple:
    """What an answer is the answer to."""
    return record["id"], record["prune"], record["keep"], record["mode"]


# ----- writing ------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path, flag: str = "--resume:", otherwise: str = "read") -> Iterator[None]:
    """Turn what can go wrong with a file into one line."""
    try:
        yield
    except OSError as error:
        raise NanogapError(f"{flag} {path} cannot be {otherwise} ({error.strerror}); mend that "
                           "and go on with --resume, or give a new file") from None


def begin(path: Path | None, settings: dict, rank: int, world: int,
          edited: Collection[str] = ()) -> Callable[[dict], None]:
    """Write the settings, and return what writes an answer.

    edited: strategies whose answers do not stay
    """
    if world > 1:
        dist.barrier()                             # all have read what there was
    if path is None:
        return lambda record: None
    with reading(path, "--out", "written"):
        if rank == 0:
            if edited:
                forget(path, edited)
            write_whole("--out", settings_of(path), (json.dumps(settings) + "\n").encode())
        if world > 1:
            dist.barrier()
        part = path if world == 1 else path.with_name(f"{path.name}.part-{rank}")
        file = open(part, "ab", buffering=0)       # what fails is not tried again at the end

    def write(record: dict) -> None:
        line = (json.dumps(record) + "\n").encode()
        with reading(path, "--out", "written"):
            while line:
                line = line[file.write(line):]

    return write


def forget(path: Path, edited: Collection[str]) -> None:
    """Take the answers of some strategies out of the files."""
    for file in parts_of(path):
        records = read_lines(file)
        kept = [record for record in records if record["prune"] not in edited]
        if len(kept) < len(records):
            tell(f"{', '.join(sorted(edited))} was edited: {len(records) - len(kept)} answers are "
                 "asked again ...")
            write_lines(file, kept)


def write_lines(path: Path, records: list[dict]) -> None:
    """A whole file of answers."""
    write_whole("--out", path, "".join(json.dumps(record) + "\n" for record in records).encode())


def put_together(path: Path | None, records: list[dict]) -> None:
    """All answers into one file, where there are parts of it."""
    if path is None:
        return
    parts = [file for file in parts_of(path) if file != path]
    if parts:
        write_lines(path, records)
        with reading(path, "--out", "written"):
            for part in parts:
                part.unlink()
