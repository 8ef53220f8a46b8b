"""The file of answers: a JSON line for each as it comes, and how an interrupted run goes on.

In:  a path, and the settings on which answers depend.
Out: FILE.jsonl, and FILE.jsonl.settings.json beside it.

The settings are written first, then every line as soon as there is an answer, so a kill loses the
answers in the making, those about one image in one run; a line that it tore is cut off when the run
resumes.  Several processes write a part each, FILE.jsonl.part-0 and so on, which are put together
in the end.  All of them are one run, and no other may write.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch.distributed as dist

from nanogap.checks.output import check_file, claim, write_whole
from nanogap.errors import NanogapError


def is_text(value: object) -> bool:
    """A string."""
    return isinstance(value, str)


def is_number(value: object) -> bool:
    """A finite number."""
    return type(value) in (int, float) and math.isfinite(value)   # type: ignore[arg-type]


def is_yes_or_no(value: object) -> bool:
    """True or false."""
    return type(value) is bool


def is_time(value: object) -> bool:
    """A number; None in the cases of --ablate that take no times."""
    return value is None or is_number(value)


def is_budget(value: object) -> bool:
    """A number of visual tokens, or a share such as "25%"; None is the strategy's own."""
    share = isinstance(value, str) and value.endswith("%") and value[:-1].isdecimal()
    return value is None or type(value) is int or share


def are_numbers(value: object) -> bool:
    """A list of finite numbers."""
    return isinstance(value, list) and all(map(is_number, value))


def is_box(value: object) -> bool:
    """Four numbers."""
    return are_numbers(value) and len(value) == 4                 # type: ignore[arg-type]


def is_box_or_none(value: object) -> bool:
    """What was answered."""
    return value is None or is_box(value)


FIELDS: dict[str, Callable[[object], bool]] = {
    "id": is_text, "image": is_text, "expression": is_text, "mode": is_text, "prune": is_text,
    "keep": is_budget, "text": is_text, "box": is_box_or_none, "truth": is_box, "iou": is_number,
    "cut_off": is_yes_or_no, "visual_tokens": is_number, "kept": are_numbers, "padding": is_number,
    "prefill_ms": is_time, "decode_ms": is_time}
KEYS = set(FIELDS)


# ----- reading ------------------------------------------------------------------------------------


def beside(path: Path) -> tuple[Path, list[Path]]:
    """Where the settings of a file of answers are, and all its parts that there are."""
    parts = sorted(p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}.part-"))
    files = [path, *parts] if path.exists() else parts
    return path.with_name(f"{path.name}.settings.json"), files


def check_out(path: Path, resume: bool) -> None:
    """Refuse a file that cannot be begun, or that was begun and shall not be continued."""
    check_file("--out", path)
    settings, files = beside(path)
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


def check_settings(path: Path, settings: dict) -> None:
    """Refuse to continue a file whose answers were made otherwise, by the name of what differs."""
    file = beside(path)[0]
    try:
        made = json.loads(file.read_bytes()) if file.exists() else settings
        differs = [key for key in settings if made.get(key) != settings[key]]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise NanogapError(f"--resume: {file} cannot be read ({error}); give a new file") from None
    if differs:
        key = differs[0]
        raise NanogapError(f"--resume: {path} was made with another {key}, {made.get(key)!s:.80} "
                           f"and not {settings[key]}; give that one, or a new file")


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
            check_record(records[-1])
        except (ValueError, RecursionError) as error:
            raise NanogapError(f"--resume: {path}, line {number} is no answer ({error!s:.80}); "
                               "take the line out, or give a new file") from None
    return records


def check_record(record: object) -> None:
    """Refuse with ValueError what no run has written: each field is asked once, here."""
    if not isinstance(record, dict) or not FIELDS.keys() <= record.keys():
        raise ValueError("keys are lacking")
    for key, is_right in FIELDS.items():
        if not is_right(record[key]):
            raise ValueError(f"{key} is {record[key]!r:.40}")


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
def reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong into one line."""
    try:
        yield
    except OSError as error:
        raise NanogapError(f"--resume: {path} cannot be read ({error.strerror}); mend that, or "
                           "give a new file") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The same for what is written."""
    try:
        yield
    except OSError as error:
        raise NanogapError(f"--out {path} cannot be written ({error.strerror}); mend that and go "
                           "on with --resume, or give a new file") from None


def own(path: Path | None) -> AbstractContextManager[None]:
    """Be the only run that writes to a file of answers; the first of its processes asks for all."""
    return nullcontext() if path is None else claim("--out", path)


def begin(path: Path | None, settings: dict, rank: int, world: int) -> Callable[[dict], None]:
    """Write the settings, and return what writes an answer."""
    if world > 1:
        dist.barrier()                             # all have read what there was
    if path is None:
        return lambda record: None
    with writing(path):
        if rank == 0:
            write_whole("--out", beside(path)[0], (json.dumps(settings) + "\n").encode())
        part = path if world == 1 else path.with_name(f"{path.name}.part-{rank}")
        file = open(part, "ab", buffering=0)       # what fails is not tried again at the end

    def write(record: dict) -> None:
        line = (json.dumps(record) + "\n").encode()
        with writing(path):
            while line:
                line = line[file.write(line):]

    return write


def put_together(path: Path | None, records: list[dict]) -> None:
    """All answers into one file, where there are parts of it."""
    if path is None:
        return
    parts = [file for file in beside(path)[1] if file != path]
    if parts:
        write_whole("--out", path,
                    "".join(json.dumps(record) + "\n" for record in records).encode())
        with writing(path):
            for part in parts:
                part.unlink()
