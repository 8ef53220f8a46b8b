"""What the commands share: one error, a parser, and mistakes that end in one line and status 2.

In:  the words of a command line.  Out: arguments that are checked, and an exit status.
"""

import argparse
import errno
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TextIO

from nanogap.errors import NanogapError
from nanogap.prune import STRATEGIES

MISTAKE, INTERRUPTED, READER_LEFT = 2, 130, 141   # exit statuses; the shell's 128 + signal
# what takes less memory, by the flags of the command that ran out of it
LESS = {"--no-pack": "--no-pack", "--dtype": "another --dtype", "--device": "another --device",
        "--weights": "smaller --weights", "--keep": "a smaller --keep without mode full"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are NanogapErrors."""

    flags: ClassVar[set[str]] = set()      # of the command that runs

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        Parser.flags.update(names)
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        unknown = message.startswith("unrecognized")
        quotes = " (several words want quotes around them)" if unknown else ""
        raise NanogapError(f"{message}{quotes}; see `{self.prog} --help`")


def whole_number(text: str, least: int = 0) -> int:
    """A whole number, such as a seed."""
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a whole number from {least} on, of "
                                         "18 digits at most")
    return int(text)


def count_argument(text: str) -> int:
    """A whole number from 1 on, such as how many tokens an answer may have."""
    return whole_number(text, 1)


def keep_argument(text: str) -> str:
    """Check the form of --keep, "64" or "25%" or "auto"; its range depends on the model."""
    form = r"0*[1-9][0-9]{0,7}|(?=.*[1-9])[0-9]{1,3}(\.[0-9]{1,8})?%|auto"
    if not re.fullmatch(form, text):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a number of visual tokens such as "
                                         "64, nor a share such as 25% or 9.8%, nor \"auto\"")
    return text


def path_argument(text: str) -> Path:
    """A path; the empty one would stand for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path has no zero bytes")
    return Path(text)


class ListStrategies(argparse.Action):
    """--prune NAME ...; `--prune list` says a sentence on each strategy, and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: object, option: str | None = None) -> None:
        if values in ("list", ["list"]):
            width = max(map(len, STRATEGIES))
            for name, function in STRATEGIES.items():
                print(f"{name:{width}}  {(function.__doc__ or '').strip().partition(chr(10))[0]}")
            parser.exit()
        setattr(namespace, self.dest, values)


# ----- streams ------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """A text with line breaks and all else that does not print spelled out, as in "\\n".

    What stands in a file may move the cursor, or change colours, where it is told as it is.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """Anything that was given, in short, as a message shows it."""
    try:
        return visible(f"{value!r:.80}")
    except (ValueError, RecursionError):      # a number of 5,000 digits, lists in lists
        return f"of type {type(value).__name__}"


def tell(text: str) -> None:
    """Say on stderr how far the work is; it goes on where nobody can be told."""
    try:
        print(visible(text), file=sys.stderr, flush=True)
    except OSError:
        to_nowhere(sys.stderr)


def to_nowhere(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere, or Python would fail with it once more at the end.
    """
    with suppress(OSError):               # a stream of a test's has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def ready_streams() -> None:
    """Make sure that there is a stdout, and that nothing is opened under a stream's number.

    raises: NanogapError where stdout is closed, for nothing could be told
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                  # it takes the lowest number there is
    if sys.stderr is None:                                  # print would take stdout in its place
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
        raise NanogapError("stdout is closed, so nothing could be told; leave out `>&-`")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")   # where it cannot show an expression


# ----- a command ----------------------------------------------------------------------------------


NO_MEMORY = ("out of memory", "not enough memory", "cannot allocate memory",
             "can't allocate memory", "bad_alloc", "can't start new thread",
             "could not create a primitive",                      # oneDNN's
             os.strerror(errno.ENOMEM).lower())


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of any library says that memory ran out."""
    said = str(error).lower()
    return (isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
            or any(words in said for words in NO_MEMORY))


def on_interrupt(handler: Callable) -> None:
    """What Ctrl-C, and a request to end, do from now on."""
    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(one) != signal.SIG_IGN:                       # as `nohup` has it
                signal.signal(one, handler)


def answer_for(name: str, command: Callable[[Sequence[str] | None], None],
               argv: Sequence[str] | None) -> int:
    """Run a command; its exit status.

    0: done, and told;  2: a mistake, in one line on stderr;  130: Ctrl-C;  141: the reader left
    argv: None takes the process's own, whose interrupts are then handled as well
    """
    status, mistake = 0, ""
    Parser.flags.clear()
    try:
        if argv is None:
            on_interrupt(signal.default_int_handler)
            gc.freeze()     # what was imported stays; to look for garbage among all that torch
            gc.enable()     # has takes 0.1 s each time, at the end as well
        ready_streams()
        try:
            command(argv)
        finally:                                            # also after --help
            sys.stdout.flush()
    except NanogapError as error:
        mistake = " ".join(str(error).split())
    except (MemoryError, RuntimeError) as error:            # in a pass over tokens, say
        if not lacks_memory(error):
            raise
        first = " ".join(str(error).split()).partition(". ")[0]    # torch goes on about settings
        less = ", ".join(says for flag, says in LESS.items() if flag in Parser.flags)
        mistake = (f"memory ran out ({first[:200] or type(error).__name__}); end other programs"
                   f"{less and f', or take less at a time: {less}'}")
    except BrokenPipeError:                                 # `python run.py ... | head -1`
        to_nowhere(sys.stdout)
        status = READER_LEFT
    except OSError as error:
        to_nowhere(sys.stdout)
        where = error.filename or "stdout"                  # our own files name themselves
        mistake = f"{where}: {error.strerror or error}; mend that, and run it again"
    except KeyboardInterrupt:
        status = INTERRUPTED
    if mistake:
        tell(f"{name}: {mistake}")
        status = MISTAKE
    if argv is None:
        on_interrupt(lambda *_: os._exit(INTERRUPTED))      # all is done
    return status
