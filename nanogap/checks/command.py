"""What the commands share: a parser, and mistakes that end in one line and status 2.

In:  the words of a command line.  Out: arguments that are checked, and an exit status.
"""

import argparse
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from nanogap.errors import NanogapError
from nanogap.ground import MAX_NEW_TOKENS
from nanogap.prune import STRATEGIES
from nanogap.weights import DTYPES

# how libraries say that memory ran out; the last one is oneDNN
NO_MEMORY = re.compile("out of memory|not enough memory|allocate memory|bad_alloc|new thread|"
                       "create a primitive", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are NanogapErrors."""

    def error(self, message: str) -> NoReturn:
        unknown = message.startswith("unrecognized")
        quotes = " (several words want quotes around them)" if unknown else ""
        raise NanogapError(f"{message}{quotes}; see `{self.prog} --help`")


def whole_number(text: str, least: int = 0) -> int:
    """A whole number, such as a seed."""
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a whole number from {least} on, "
                                         "of 18 digits at most")
    return int(text)


count_argument = partial(whole_number, least=1)     # such as how many tokens an answer may have


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


def add_model_arguments(parser: Parser) -> None:
    """What run.py and the evaluation let a person say of a model and its answers."""
    add = parser.add_argument
    add("--clip", metavar="DIR", type=path_argument,
        help="the CLIP that the vision tower comes from, for strategies that read the expression "
             "(default: clip_text beside the weights)")
    add("--max-new-tokens", metavar="N", type=count_argument, default=MAX_NEW_TOKENS,
        help="an answer is cut off there (default: %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="default: auto, cuda where there is one")
    add("--dtype", choices=["auto", *DTYPES], default="auto",
        help="default: auto, the checkpoint's on a GPU, float32 or for large models bfloat16 on a "
             "CPU")
    add("--no-pack", dest="pack", action="store_false",
        help="on a CPU: half the memory for weights, and slower")
    add("--seed", metavar="N", type=whole_number, default=0,
        help="for strategies that draw lots (default: %(default)s)")


def visible(text: str) -> str:
    """A text with line breaks and all else that does not print spelled out, as in "\\n".

    What stands in a file may move the cursor, or change colours, where it is told as it is.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """Anything that was given, in short, as a message shows it."""
    return visible(f"{value!r:.80}")


def one_line(error: object) -> str:
    """What an error says, as a part of one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else f"{said[:200]}..."


def tell(text: str) -> None:
    """Say on stderr how far the work is; it goes on where nobody can be told."""
    with suppress(OSError):
        print(visible(text), file=sys.stderr, flush=True)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of any library says that memory ran out."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


def answer_for(name: str, command: Callable[[Sequence[str] | None], None],
               argv: Sequence[str] | None) -> int:
    """Run a command; its exit status, which after Ctrl-C and the like is the shell's 128 + signal.

    0: done, and told;  2: a mistake, in one line on stderr;  130: Ctrl-C;  141: the reader left
    argv: None takes the process's own, which is then made ready as well
    """
    try:
        if argv is None:
            for request in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(request) != signal.SIG_IGN:                # as `nohup` has it
                    signal.signal(request, signal.default_int_handler)
            gc.freeze()    # to look for garbage in what was imported takes 0.1 s each time
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):                # it may not know all letters
                stream.reconfigure(errors="backslashreplace")
        command(argv)
        print(end="", flush=True)                            # nobody may listen
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                                   # `python run.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # Python flushes again
        return 141
    except NanogapError as error:
        mistake = str(error)
    except (OSError, MemoryError, RuntimeError) as error:     # in a pass over tokens, say
        if lacks_memory(error):
            first = one_line(error).partition(". ")[0]        # torch goes on about settings
            mistake = (f"memory ran out ({first}); end other programs, or take smaller weights or "
                       "another --dtype")
        elif isinstance(error, OSError):
            mistake = f"{one_line(error)}; see that it is there, and that this user may use it"
        else:
            raise
    tell(f"{name}: {' '.join(mistake.split())}")
    return 2
