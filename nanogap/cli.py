"""What the commands share: arguments that are checked, and mistakes that end in one line and status 2."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from nanogap.errors import NanogapError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        quotes = " (several words want quotes around them)" if message.startswith("unrecognized") else ""
        raise NanogapError(f"{message}{quotes}; see `{self.prog} --help`")


def whole_number(text: str) -> int:
    """A whole number from 0 on, such as a seed."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a whole number from 0 on")
    return int(text)


def keep_argument(text: str) -> str:
    """Check the form of --keep, "64" or "25%" or "auto"; its range is checked when the model is known."""
    number = text.removesuffix("%")
    if text == "auto":
        return text
    if not (number.isascii() and number.isdigit() and len(number) < 9 and int(number) > 0):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a number of visual tokens "
                                         "such as 64, nor a share such as 25%, nor \"auto\"")
    return text


def tokens_to_keep(keep: str, n_visual: int) -> int | None:
    """"64" or "25%" as a number of visual tokens; a share is rounded, but never to none.

    "auto" is None: the strategy finds its own budget (see ADAPTIVE in prune.py).
    """
    if keep == "auto":
        return None
    number = int(keep.removesuffix("%"))
    if number > (100 if keep.endswith("%") else n_visual):
        raise NanogapError(f"cannot keep {keep} of {n_visual} visual tokens: "
                           f"keep from 1 to {n_visual}, or 1% to 100%")
    return max(1, round(n_visual * number / 100)) if keep.endswith("%") else number


def answer_for(name: str, command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> int:
    """Run a command; its exit status: 2 after one line on stderr for a mistake of the user's."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")   # where it cannot show an expression
    try:
        command(argv)
        sys.stdout.flush()
    except NanogapError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:                              # `python run.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0
