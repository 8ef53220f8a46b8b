"""What the commands share: one error, a parser, and mistakes that end in one line and status 2.

In:  the words of a command line.  Out: arguments that are checked, and an exit status.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class NanogapError(ValueError):
    """A mistake that the user can mend; commands print its text on one line and exit with 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are NanogapErrors."""

    def error(self, message: str) -> NoReturn:
        quotes = ""
        if message.startswith("unrecognized"):
            quotes = " (several words want quotes around them)"
        raise NanogapError(f"{message}{quotes}; see `{self.prog} --help`")


def whole_number(text: str) -> int:
    """A whole number from 0 on, such as a seed."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a whole number from 0 on")
    return int(text)


def keep_argument(text: str) -> str:
    """Check the form of --keep, "64" or "25%" or "auto"; its range depends on the model."""
    number = text.removesuffix("%")
    if text == "auto":
        return text
    if not (number.isascii() and number.isdigit() and len(number) < 9 and int(number) > 0):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a number of visual tokens "
                                         "such as 64, nor a share such as 25%, nor \"auto\"")
    return text


def answer_for(name: str, command: Callable[[Sequence[str] | None], None],
               argv: Sequence[str] | None) -> int:
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
