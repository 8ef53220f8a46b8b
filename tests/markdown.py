"""What README.md and tutorial.md are made of, for the tests that hold them to what they say."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch

from nanogap.gap import MODES
from nanogap.prune import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("python", "torchrun", "pip", "hf", "bash")


@dataclass(frozen=True)
class Block:
    """A fenced block: the words behind its fence, its text, and its first line (from 1)."""

    info: str
    text: str
    line: int

    @property
    def end(self) -> int:
        """The line of the closing fence."""
        return self.line + self.text.count("\n")


def blocks(markdown: str) -> list[Block]:
    found = re.finditer(r"^```([^\n`]*)\n(.*?)^```$", markdown, re.DOTALL | re.MULTILINE)
    return [Block(m[1].strip(), m[2], markdown.count("\n", 0, m.start(2)) + 1) for m in found]


def commands(markdown: str) -> list[tuple[int, str]]:
    """Every command with its line: of blocks that are not Python or output, and in backticks."""
    found = [(block.line + i, line) for block in blocks(markdown) if block.info in ("", "sh")
             for i, line in enumerate(block.text.replace("\\\n", "  ").split("\n"))]
    without = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), markdown,
                     flags=re.DOTALL | re.MULTILINE)
    found += [(without.count("\n", 0, m.start()) + 1, " ".join(m[1].split()))
              for m in re.finditer(r"`([^`]+)`", without)]
    return [(line, part.strip()) for line, text in sorted(found) for part in text.split("&&")
            if part.split() and part.split()[0] in PROGRAMS and len(part.split()) > 1]


@functools.cache
def help_of(target: str, *recipe: str) -> str:
    """What a script, or `-m module`, prints for --help; also that of one of its recipes."""
    said = io.StringIO()
    with patch.object(sys, "argv", [target, *recipe, "--help"]), contextlib.redirect_stdout(said), \
            contextlib.suppress(SystemExit), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")                       # that it was imported before
        if target.endswith(".py"):
            runpy.run_path(str(ROOT / target), run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    return said.getvalue()


def what_is_wrong_with(command: str) -> str | None:
    """Why a command cannot be meant: no such file, flag, strategy or mode."""
    program, *words = shlex.split(command)
    if program == "hf":
        return None if find_spec("huggingface_hub") else "hf does not come with the requirements"
    for word in words:
        if re.search(r"^(tests|\.ci)/|\.(py|txt)$", word) and not (ROOT / word).exists():
            return f"there is no {word}"
    if "-m" in words:
        words = words[words.index("-m") + 1:]
    if program not in ("python", "torchrun") or words[0].startswith(("pytest", "tests.")):
        return None
    recipe = words[1:2] if words[0] == "nanogap.convert" else []
    flags = re.findall(r"--[\w-]+", help_of(words[0], *recipe))
    flag, choices = None, {"--prune": STRATEGIES, "--mode": MODES}
    for word in words[1:]:
        if word.startswith("--"):
            flag = word
            if flag not in flags:
                return f"{words[0]} has no {flag}"
            continue
        name = word.split("(")[0]                  # name(setting=value), FILE.py:NAME
        if ":" not in name and name not in choices.get(flag, [name]):
            return f"{flag} has no {word}"
    return None


def anchors(markdown: str) -> set[str]:
    """The names under which the headings can be linked to."""
    titles = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(markdown: str) -> list[tuple[int, str]]:
    """Relative links that lead nowhere, with their lines."""
    found = [(markdown.count("\n", 0, m.start()) + 1, m[1])
             for m in re.finditer(r"\]\((?!https?:)([^)\s]+)\)", markdown)]
    there = anchors(markdown)
    return [(line, link) for line, link in found
            if link not in there and (link[0] == "#" or not (ROOT / link.split("#")[0]).exists())]


def misquoted(block: Block) -> str | None:
    """What a block `python FILE` or `text FILE` says that does not stand there, in this order.

    `...` on a line of its own leaves something out; a line of a table may be quoted alone.
    """
    kind, name = block.info.split()
    source, at = (ROOT / name).read_text(), 0
    pieces = re.split(r"^ *\.\.\.\n", block.text, flags=re.MULTILINE)
    if kind == "text":
        pieces = [line for piece in pieces for line in piece.splitlines(keepends=True)]
    for piece in pieces:
        at = source.find(piece, at)
        if at < 0:
            return f"{name} does not say (any more, or not here):\n{piece}"
    return None


def is_the_evaluators(text: str) -> bool:
    """Whether output begins as `nanogap.evaluate` does: on what, how counted, which columns.

    Of several models only the comparison may stand here.
    """
    several = (r"Acc@0\.5 with 95 % intervals; no box: .*", r"model +prune +keep +all tokens .*")
    one = (r"weights/\S+, .+, \d+ expressions, seed \d+, \w+, \w+", r"\w+: .+, IoU >= 0\.5",
           r"prune +keep +tokens +mode +Acc@0\.5 +95 % +mean IoU +no box +padding"
           r"( +prefill +decode)?")
    return any(all(map(re.fullmatch, form, text.split("\n"))) for form in (several, one))
