"""Pictures on disk: refused before any work is done where they cannot be written; whole, or not at all.

In:  the flag that named a path, the path, and a picture.  Out: a file, or one line that says why not.
"""

import errno
import io
import os
from contextlib import suppress
from pathlib import Path

from PIL import Image

from nanogap.errors import NanogapError


def check_picture(flag: str, path: Path, image: str | None = None) -> None:
    """Refuse a picture that could not be written, or would take the place of the image it shows."""
    try:
        Image.init()
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.EXTENSION[path.suffix.lower()])
    except Exception:   # Pillow only reads that kind, or has no colours in it
        raise NanogapError(f"{flag} {path}: a picture cannot be written with that ending; "
                           "use .png or .jpg") from None
    folder = path.absolute().parent
    try:
        if path.is_dir():
            raise NanogapError(f"{flag} {path} is a folder; give the path of a picture to write")
        if not folder.is_dir():
            raise NanogapError(f"{flag} {path} would be in a folder that does not exist; "
                               f"make it with `mkdir -p {folder}`")
        if image is not None and path.exists() and path.samefile(image):
            raise NanogapError(f"{flag} {path} is the image itself; give another path")
        for there in (folder, path):
            if there.exists() and not os.access(there, os.W_OK):
                raise PermissionError(errno.EACCES, "permission denied")
    except OSError as error:
        raise unwritable(flag, path, error) from None


def unwritable(flag: str, path: Path, error: OSError) -> NanogapError:
    why = error.strerror or error
    return NanogapError(f"{flag} {path} cannot be written ({why}); give another path")


def save_picture(flag: str, path: Path, picture: Image.Image) -> None:
    """Write the whole picture or nothing."""
    partial = path.with_name(path.name + ".partial")
    try:
        data = io.BytesIO()
        picture.save(data, Image.EXTENSION[path.suffix.lower()])
        partial.write_bytes(data.getvalue())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise unwritable(flag, path, error) from None
