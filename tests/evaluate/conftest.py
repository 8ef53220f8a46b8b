"""Models for the tests of the evaluation, and what its command says."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.evaluate.asking import BOX, run, write_lines
from tests.tiny import lines_of, tiny_config, write_checkpoint, write_finder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, 16 visual tokens, and no text tower; they say nothing in particular."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_config())


@pytest.fixture(scope="session")
def finder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers every question with BOX, one token, and stops."""
    return write_finder(folder, tmp_path_factory.mktemp("finder"), BOX)


@pytest.fixture
def given(data: Path) -> Callable[..., list]:
    """A command that scores some lines as answers to `data`."""
    def asked(items: list, *flags: str) -> list:
        file = write_lines(data.with_name("given.jsonl"), items)
        return ["--score", file, "--data", data, *flags]

    return asked


@pytest.fixture
def printed(capsys) -> Callable[..., str]:
    """What a command prints that does all that it was asked."""
    def printed_by(*arguments: object) -> str:
        capsys.readouterr()
        assert run(*arguments) == 0
        return capsys.readouterr().out

    return printed_by


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """The one line that is said of a mistake, and nothing else is."""
    def said_of(*arguments: object) -> str:
        capsys.readouterr()
        assert run(*arguments) == 2
        heard = capsys.readouterr()
        assert lines_of(heard.err) == 1 and heard.out == ""
        return heard.err

    return said_of
