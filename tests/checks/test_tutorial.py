"""tutorial.md runs: its Python in order, in one namespace; its outputs, quotations, commands.

After new weights, `python -m tests.checks.test_tutorial` makes its output blocks and its pictures again.
"""

import ast
import contextlib
import difflib
import io
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

import nanogap
from nanogap.prune import STRATEGIES
from nanogap.show import figures
from tests.markdown import (
    ROOT,
    Block,
    blocks,
    broken_links,
    commands,
    is_the_evaluators,
    what_is_wrong_with,
)

TUTORIAL = ROOT / "tutorial.md"
TEXT = TUTORIAL.read_text()
BLOCKS = blocks(TEXT)
RUN = [i for i, block in enumerate(BLOCKS) if block.info == "python"]
QUOTED = [block for block in BLOCKS if block.info.startswith("python ")]
PICTURES = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)


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

    def read_to(self, index: int) -> str:
        """Run all blocks up to one; what that one printed."""
        for i in (i for i in RUN if i <= index and i not in self.printed):
            if self.failed is not None:
                pytest.skip(f"tutorial.md:{self.failed} failed before")
            self.failed, said = BLOCKS[i].line, io.StringIO()
            tree = ast.increment_lineno(ast.parse(BLOCKS[i].text), BLOCKS[i].line - 1)
            with contextlib.redirect_stdout(said), patch.dict(STRATEGIES):   # as before, afterwards
                exec(compile(tree, str(TUTORIAL), "exec"), self.namespace)
            self.failed, self.printed[i] = None, said.getvalue()
        return self.printed[index]


@contextlib.contextmanager
def reading() -> Iterator[Session]:
    """A session in the folder of README.md; what it makes of gradients ends with it."""
    folder = Path.cwd()
    os.chdir(ROOT)
    try:
        with torch.enable_grad():
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
        pytest.fail(f"tutorial.md:{told.line} is not what is printed; "
                    f"`python -m tests.checks.test_tutorial` makes it again:\n{differ}", pytrace=False)


@pytest.mark.parametrize("block", QUOTED, ids=lambda block: f"line-{block.line}")
def test_what_is_quoted_from_a_source_file_stands_there(block: Block):
    """`...` on a line of its own leaves something out."""
    name = block.info.split()[1]
    source, at, line = (ROOT / name).read_text(), 0, block.line
    for piece in re.split(r"^ *\.\.\.\n", block.text, flags=re.MULTILINE):
        at = source.find(piece, at)
        assert at >= 0, f"tutorial.md:{line} does not stand (any more) in {name}:\n{piece}"
        line += piece.count("\n") + 1


def test_every_strategy_has_its_function_quoted():
    quoted = "".join(block.text for block in QUOTED)
    assert [name for name in STRATEGIES if f"def {name}(" not in quoted] == []


def test_every_command_is_real():
    wrong = [f"tutorial.md:{line}: {command}: {what_is_wrong_with(command)}"
             for line, command in commands(TEXT) if what_is_wrong_with(command)]
    assert not wrong, "\n".join(wrong)


def test_output_below_a_command_of_the_evaluator_looks_like_its_own():
    """It is pasted, not run: 500 expressions take minutes."""
    for before, block in pairwise(BLOCKS):
        if before.info == "sh" and "nanogap.evaluate" in before.text and block.info == "text":
            assert is_the_evaluators(block.text), f"tutorial.md:{block.line} is not the evaluator's"


def test_every_link_leads_somewhere():
    assert [f"tutorial.md:{line}: {link}" for line, link in broken_links(TEXT)] == []


def test_nothing_is_left_to_be_filled_in():
    lines = enumerate(TEXT.split("\n"), 1)
    left = [i for i, line in lines if re.search("<!-- (paste|check)", line)]
    assert not left, f"tutorial.md: lines {left} wait to be checked or filled in"


# ----- pictures -----------------------------------------------------------------------------------


def test_every_picture_is_named_with_the_command_that_makes_it():
    made = {f"nanogap/show/figures/{name}.png" for name in figures.FIGURES}
    assert made <= set(PICTURES)
    for name in figures.FIGURES:
        assert f"`python -m nanogap.show.figures {name}`" in TEXT
    assert sum(path.stat().st_size for path in (ROOT / "nanogap" / "show" / "figures").iterdir()) < 2 ** 20


def test_the_pictures_are_those_that_the_commands_make(tmp_path: Path):
    """But for how another version of Pillow may smooth an edge or place a letter."""
    model = nanogap.load(ROOT / "weights" / "mini", "cpu", "float32")
    for path in figures.make(list(figures.FIGURES), model, tmp_path):
        shipped = ROOT / "nanogap" / "show" / "figures" / path.name
        ours, theirs = (Image.open(p).convert("RGB") for p in (path, shipped))
        assert ours.size == theirs.size, path.name
        far = max(ImageStat.Stat(ImageChops.difference(ours, theirs)).mean)
        assert far < 2, f"{path.name} is not what `python -m nanogap.show.figures {path.stem}` draws"


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
    figures.command([])


if __name__ == "__main__":
    make_again()
