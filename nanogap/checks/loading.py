"""Load a model, and say in one line what is wrong where it cannot be: `nanogap.load`."""

from pathlib import Path

import torch

from nanogap import weights
from nanogap.checks.command import lacks_memory
from nanogap.checks.explain import GET, explain, look_through
from nanogap.checks.silent import check_clip, check_parts, silent
from nanogap.errors import NanogapError
from nanogap.fast.packed import pack as pack_matrices
from nanogap.models import VLM

PACKAGE = Path(__file__).resolve().parents[1]
# run.py, image.jpg and weights/ stand at the top level; in a wheel they are in nanogap/shipped
TOP = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent
HERE = TOP / "weights"
REAL = HERE / "llava-1.5-7b-hf"
MINI = HERE / "mini"


def load(folder: str | Path, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, clip: str | Path | None = None,
         pack: bool = True) -> VLM:
    """Load a checkpoint, ready to ground; the arguments are those of nanogap/weights.py's load.

    folder: its path, a folder of the hub's cache, or the name of one that ships, such as "mini"
    pack:   let a CPU multiply faster (fast/packed.py); answers may differ in last digits
    raises: NanogapError where anything is missing, broken, unknown, of another shape, or would
            change answers in silence; a lack of memory is raised as it is
    """
    folder = folder_of(folder)
    guide = None if clip is None else folder_of(clip)
    if clip is None and (folder / "clip_text").is_dir():
        guide = folder / "clip_text"
    check_place(device, dtype)
    try:
        silent(folder)
        if guide is not None:
            check_clip(guide)
        model = weights.load(folder, device, dtype, guide)
        check_parts(folder, model, guide)
        look_through(folder, GET)      # an adapter, or whole numbers as weights
    except BaseException as error:     # the tokenizers library panics with what is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit) or lacks_memory(error):
            raise
        raise explain(folder, error, guide) from None
    assert isinstance(model, VLM)
    tokenizers = [model.tokenizer, *([model.text_guide.tokenizer] if model.text_guide else [])]
    for tokenizer in tokenizers:
        tokenizer.no_padding()             # left over from training: a question is one text
        tokenizer.no_truncation()
    if pack:
        pack_matrices(model)
    return model


def default_weights() -> Path:
    """llava-1.5-7b-hf if it was downloaded, otherwise the mini weights that ship."""
    weights = REAL if REAL.is_dir() else MINI
    if weights.is_relative_to(Path.cwd()):
        return weights.relative_to(Path.cwd())
    return weights


def folder_of(name: str | Path) -> Path:
    """The folder that is meant: a path, the name of what ships, or a snapshot of the hub's."""
    folder = Path(name)
    if not folder.exists() and len(folder.parts) == 1 and (HERE / folder / "config.json").is_file():
        return HERE / folder
    return snapshot(folder)


def snapshot(folder: Path) -> Path:
    """The folder itself, or what is current in a folder of the hub's cache, models--OWNER--NAME."""
    main = folder / "refs" / "main"
    return folder / "snapshots" / main.read_text().strip() if main.is_file() else folder


def check_place(device: str | torch.device | None, dtype: str | torch.dtype | None) -> None:
    """Refuse a device that is not here, and a precision that is none."""
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else []),
             *(["mps"] if torch.backends.mps.is_available() else [])]
    if device is not None and str(device).partition(":")[0] not in there:
        raise NanogapError(f"device {device} is not available here; "
                           f"choose from {', '.join(there)}")
    if dtype is not None and str(dtype).removeprefix("torch.") not in weights.DTYPES:
        raise NanogapError(f"unknown dtype {dtype}; choose from {', '.join(weights.DTYPES)}")
