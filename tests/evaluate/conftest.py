"""Models for the tests of the evaluation: one that always says the same box, and a random one."""

from pathlib import Path

import pytest

from tests.tiny import tiny_config, write_checkpoint, write_finder

BOX = "[0.10, 0.25, 0.50, 0.60]"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, 16 visual tokens, and no text tower; they say nothing in particular."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_config())


@pytest.fixture(scope="session")
def finder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers every question with BOX, one token, and stops."""
    return write_finder(folder, tmp_path_factory.mktemp("finder"), BOX)
