"""What several test files ask."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import nanogap
from nanogap.models import VLM
from nanogap.prune import STRATEGIES
from tests.tiny import tiny_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def strategies_as_they_were() -> Iterator[None]:
    """Strategies that a test enters are gone after it."""
    before = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """A random LLaVA with 4 x 4 patches, written as a checkpoint and loaded from it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tiny_config())
    return nanogap.load(folder, device="cpu")


@pytest.fixture(scope="module")
def mini() -> VLM:
    """The small trained model."""
    return nanogap.load(ROOT / "weights/mini", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """60 x 40 pixels of noise."""
    generator = torch.Generator().manual_seed(4)
    levels = torch.randint(0, 256, (60 * 40 * 3,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (60, 40), bytes(levels.tolist()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that stays as it is."""
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed or broken."""
    return shutil.copytree(whole, tmp_path / "tiny")
