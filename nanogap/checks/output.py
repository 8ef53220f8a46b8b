"""What commands write: whole or not at all, and one writer at a time.

In:  the path that a flag gave.
Out: a file or a folder there; where that cannot be, one line that names the flag and the path.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from nanogap.checks.command import one_line
from nanogap.errors import NanogapError

try:
    import fcntl
except ImportError:                     # Windows has other locks
    fcntl = None                        # type: ignore[assignment]

CLAIM = ".claim.partial"                # the end of a lock's name


def unwritable(flag: str, path: Path, error: object) -> NanogapError:
    """The mistake that a failed write is."""
    why = getattr(error, "strerror", None) or one_line(error)
    return NanogapError(f"{flag} {path} cannot be written ({why}); give another path")


def check_file(flag: str, path: Path, what: str = "file") -> None:
    """Refuse a place where no file can be."""
    folder = path.absolute().parent
    if path.is_dir():
        raise NanogapError(f"{flag} {path} is a folder; give the path of a {what} to write")
    if not folder.is_dir():
        raise NanogapError(f"{flag} {path} would be in a folder that does not exist; "
                           f"make it with `mkdir -p {folder}`")
    check_folder(flag, folder)


def check_picture(flag: str, path: Path, *images: str | Path) -> None:
    """Refuse a picture that could not be written, or would take the place of one of the images."""
    check_file(flag, path, "picture")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise NanogapError(f"{flag} {path}: a picture cannot be written with that ending; "
                           "use .png or .jpg")
    if path.resolve() in {Path(image).resolve() for image in images}:
        raise NanogapError(f"{flag} {path} is a picture that is asked about; give another path")


def check_folder(flag: str, path: Path) -> None:
    """Make the folder to write to; NanogapError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(flag, path, error) from None
    if not os.access(path, os.W_OK):
        raise unwritable(flag, path, "permission denied")


@contextmanager
def claim(flag: str, path: Path) -> Iterator[None]:
    """Be the only one who writes to a file or a folder, as long as this lasts.

    The lock is the system's, so it ends with the process, however that ends.
    """
    lock = path / CLAIM if path.is_dir() else path.with_name(f".{path.name}{CLAIM}")
    with lock.open("a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NanogapError(f"{flag} {path} is being written by another process; wait for its "
                               "end, or give another path") from None
        try:
            yield
        finally:
            with suppress(OSError):      # Windows keeps what is open
                lock.unlink()


@contextmanager
def whole(flag: str, path: Path) -> Iterator[Path]:
    """A folder to write to: its files go to `path` at the end, or none does.

    path: a file, written under its name; or a folder, to which config.json comes last (without it
          a folder is no checkpoint), and from which goes what a process left that was killed here
    """
    folder = path if path.is_dir() else path.parent
    for left in path.glob(".*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        with TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as partial:
            yield Path(partial)
            written = Path(partial).iterdir()
            for file in sorted(written, key=lambda file: file.name == "config.json"):
                file.replace(folder / file.name)
    except NanogapError:
        raise
    except Exception as error:           # safetensors and tokenizers have their own for a full disk
        raise unwritable(flag, path, error) from None


@contextmanager
def new_folder(flag: str, path: Path) -> Iterator[Path]:
    """A folder to write to, whose files come into a new or empty one at the end, or none does."""
    check_folder(flag, path)
    with claim(flag, path):
        if any(file.suffix != ".partial" for file in path.iterdir()):
            raise NanogapError(f"{flag} {path} has files in it already, and they are not "
                               "overwritten; give a new folder, or move them away")
        with whole(flag, path) as partial:
            yield partial


def write_whole(flag: str, path: Path, data: bytes) -> None:
    """Write the whole file or nothing."""
    with whole(flag, path) as partial:
        (partial / path.name).write_bytes(data)


def save_picture(flag: str, path: Path, picture: Image.Image, **options: Any) -> None:
    """Write the whole picture or nothing; options: Pillow's, of that kind of picture.

    A PNG is packed in a third of the time that Pillow's own level takes, and is a tenth larger.
    """
    with whole(flag, path) as partial:
        picture.save(partial / path.name, compress_level=3, **options)
