"""tutorial.md runs: its Python in order, in one namespace; its outputs, quotations, tables.

    python -m tests.checks.test_tutorial               its outputs and its pictures, made again
    python -m tests.checks.test_tutorial models.txt    a table, by the command in its first line
"""

import ast
import contextlib
import difflib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

import nanogap
from nanogap.prune import STRATEGIES
from tests.markdown import (
    ROOT,
    Block,
    blocks,
    broken_links,
    commands,
    is_the_evaluators,
    misquoted,
    what_is_wrong_with,
)

TUTORIAL = ROOT / "tutorial.md"
FIGURES = ROOT / "nanogap" / "show" / "figures"
TEXT = TUTORIAL.read_text()
BLOCKS = blocks(TEXT)
RUN = [i for i, block in enumerate(BLOCKS) if block.info == "python"]
QUOTED = [block for block in BLOCKS if re.match("(python|text) .", block.info)]
TABLES = sorted(FIGURES.glob("*.txt"))
PICTURES = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)
NAMES = list(STRATEGIES)                    # without those that the session enters


def output(index: int) -> Block | None:
    """The block of output that belongs to a block of Python: the next, if nothing is between."""
    after = BLOCKS[index + 1:index + 2]
    between = TEXT.split("\n")[BLOCKS[index].end:after[0].line - 2] if after else ["nothing"]
    return after[0] if after and after[0].info == "text" and not "".join(between).strip() else None


class Session:
    """One Python session that reads the tutorial from the top."""

    def __init__(self) -> None:
        self.namespace: dict = {}
        self.printed: dict[int, str] = {}
        self.failed: int | None = None

    def run(self, index: int) -> str:
        """Run one block; what it printed."""
        block, said = BLOCKS[index], io.StringIO()
        tree = ast.increment_lineno(ast.parse(block.text), block.line - 1)
        with contextlib.redirect_stdout(said):
            exec(compile(tree, str(TUTORIAL), "exec"), self.namespace)
        return said.getvalue()

    def read_to(self, index: int) -> str:
        """Run all blocks up to one; what that one printed."""
        for i in (i for i in RUN if i <= index and i not in self.printed):
            if self.failed is not None:
                pytest.skip(f"tutorial.md:{self.failed} failed before")
            self.failed = BLOCKS[i].line
            self.printed[i] = self.run(i)
            self.failed = None
        return self.printed[index]


@contextlib.contextmanager
def reading() -> Iterator[Session]:
    """A session in the folder of README.md; the strategies that it enters end with it."""
    folder = Path.cwd()
    os.chdir(ROOT)
    try:
        with torch.enable_grad(), patch.dict(STRATEGIES):
            yield Session()
    finally:
        os.chdir(folder)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with reading() as session:
        yield session


def stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.rstrip().split("\n"))


@pytest.mark.parametrize("index", RUN, ids=lambda i: f"line-{BLOCKS[i].line}")
def test_every_python_block_runs_and_prints_what_stands_below_it(index: int, session: Session):
    printed, told = stripped(session.read_to(index)), output(index)
    if told is None:
        at = BLOCKS[index].line
        assert not printed, f"tutorial.md:{at} prints, and no text block follows:\n{printed}"
    elif printed != stripped(told.text):
        differ = "\n".join(difflib.ndiff(stripped(told.text).split("\n"), printed.split("\n")))
        pytest.fail(f"tutorial.md:{told.line} is not what is printed; `python -m "
                    f"tests.checks.test_tutorial` makes it again:\n{differ}", pytrace=False)


def test_any_block_can_be_run_again_at_the_end(session: Session):
    """No name is bound to something else further down: P, N, A, K and M least of all."""
    session.read_to(RUN[-1])
    letters = {letter: session.namespace.get(letter) for letter in "PNAKM"}
    for i in reversed(RUN):
        assert session.run(i) == session.printed[i], f"tutorial.md:{BLOCKS[i].line}"
    assert letters == {letter: session.namespace.get(letter) for letter in "PNAKM"}


@pytest.mark.parametrize("block", QUOTED, ids=lambda block: f"line-{block.line}")
def test_what_is_quoted_from_a_file_stands_there(block: Block):
    wrong = misquoted(block)
    assert not wrong, f"tutorial.md:{block.line}: {wrong}"


def test_every_strategy_has_a_row_in_one_of_two_tables():
    named = set(re.findall(r"^\| \*\*(\w+)\*\*", TEXT, re.MULTILINE))
    assert named == set(NAMES)


def test_chapter_9_says_what_its_table_says():
    measured = dict(re.findall(r"^\w+ +\d+ +\d+  (.*?) +(0\.\d{3}) ",
                               (FIGURES / "order_or_value.txt").read_text(), re.MULTILINE))
    assert measured == dict(re.findall(r"^\| ([^|]+) \| (0\.\d{3}) \|", TEXT, re.MULTILINE))


def test_every_command_is_real():
    wrong = [f"tutorial.md:{line}: {command}: {what_is_wrong_with(command)}"
             for line, command in commands(TEXT) if what_is_wrong_with(command)]
    assert not wrong, "\n".join(wrong)


def test_every_link_leads_somewhere():
    assert [f"tutorial.md:{line}: {link}" for line, link in broken_links(TEXT)] == []


def test_it_is_at_most_1300_lines_and_says_each_thing_once():
    assert TEXT.count("\n") <= 1300
    sentences = re.findall(r"[A-Z][^.!?|`]{60,}[.!?]", TEXT)
    assert len(sentences) == len(set(sentences))


# ----- tables and pictures ------------------------------------------------------------------------


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_every_table_says_the_command_that_makes_it_and_is_linked(path: Path):
    """It is not run here: 500 expressions take minutes."""
    first, rest = path.read_text().split("\n", 1)
    assert first.startswith("$ python -m nanogap.") and not what_is_wrong_with(first[2:])
    assert f"(nanogap/show/figures/{path.name})" in TEXT
    assert is_the_evaluators(rest) or "nanogap.evaluate" not in first


def test_every_picture_is_named_with_the_command_that_makes_it():
    from nanogap.show import figures
    assert {f"nanogap/show/figures/{name}.png" for name in figures.FIGURES} <= set(PICTURES)
    for name in figures.FIGURES:
        assert f"`python -m nanogap.show.figures {name}`" in TEXT


def test_the_pictures_are_those_that_the_commands_make(tmp_path: Path):
    """But for how another version of Pillow may smooth an edge or place a letter."""
    from nanogap.show import figures
    model = nanogap.load(ROOT / "weights" / "mini", "cpu", "float32")
    for path in figures.make(list(figures.FIGURES), model, tmp_path):
        ours, theirs = (Image.open(p).convert("RGB") for p in (path, FIGURES / path.name))
        assert ours.size == theirs.size, path.name
        far = max(ImageStat.Stat(ImageChops.difference(ours, theirs)).mean)
        assert far < 2, f"`python -m nanogap.show.figures {path.stem}` draws another picture"


# ----- making it again ----------------------------------------------------------------------------


def make_again() -> None:
    """Write what each block prints into the block below it, and draw the pictures."""
    lines = TEXT.split("\n")
    with reading() as session:
        session.read_to(RUN[-1])
    for i in reversed(RUN):
        told = output(i)
        if told:
            lines[told.line - 1:told.end - 1] = stripped(session.printed[i]).split("\n")
    TUTORIAL.write_text("\n".join(lines))


def make_table(path: Path) -> None:
    """Run the command in a table's first line, and write what it prints below it."""
    first = path.read_text().split("\n", 1)[0]
    done = subprocess.run([sys.executable, *shlex.split(first)[2:]], cwd=ROOT, check=True,
                          stdout=subprocess.PIPE, text=True)
    path.write_text(f"{first}\n{done.stdout}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        from nanogap.show import figures
        make_again()
        figures.command([])
    for name in sys.argv[1:]:
        make_table(FIGURES / name)
