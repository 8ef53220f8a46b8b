"""Load a model, and say in one line what is wrong where it cannot be: `nanogap.load`."""

from pathlib import Path

import torch

from nanogap import weights
from nanogap.models import VLM

PACKAGE = Path(__file__).resolve().parents[1]
# run.py, image.jpg and weights/ stand at the top level; in a wheel they are in nanogap/shipped
TOP = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent
HERE = TOP / "weights"
REAL = HERE / "llava-1.5-7b-hf"
MINI = HERE / "mini"


def default_weights() -> Path:
    """llava-1.5-7b-hf if it was downloaded, otherwise the mini weights that ship."""
    weights = REAL if REAL.is_dir() else MINI
    if weights.is_relative_to(Path.cwd()):
        return weights.relative_to(Path.cwd())
    return weights


def load(folder: str | Path, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, clip: str | Path | None = None, pack=None) -> VLM:
    """Load a checkpoint, ready to ground; the arguments are those of nanogap/weights.py's load.

    raises: NanogapError where anything is missing, broken, unknown, of another shape, or would
            change answers in silence
    """
    model = weights.load(folder, device, dtype, clip)
    assert isinstance(model, VLM)
    return model

def folder_of(name):
    return HERE / name if not Path(name).exists() and (HERE / name).is_dir() else Path(name)
