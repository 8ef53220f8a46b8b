"""The files of a checkpoint: which of them count, and what it is where it is something else.

In:  a folder.  Out: the files that hold its tensors, and each tensor, mapped into memory.

A download that stopped is to go on, and that is said where bytes are missing.  A folder that is
whole and holds another thing (an adapter, quantised weights, a training's state) is told what it
is, and what makes a checkpoint of it.
"""

import argparse
import fnmatch
import mmap
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogap.checks.command import lacks_memory
from nanogap.checks.config import (
    QUANTISED,
    one_line,
    printable,
    read_json,
    unreadable,
)
from nanogap.checks.pickles import look_through
from nanogap.errors import NanogapError

# single files before shards, as transformers has it: save_pretrained leaves an older index lying
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = ("holds an adapter (LoRA), which is a change to another model's weights; merge it into "
           "its base with `merge_and_unload()` of peft, and save that with save_pretrained")
OWN_LAYOUT = ("is in LLaVA's own layout, and nanogap reads that of llava-hf; convert it with "
              "`python -m nanogap.convert llava --base {folder} --clip DIR --out DIR`")
DELTA = ("is Shikra as it is published, a difference to LLaMA-7B; add them with `python -m "
         "nanogap.convert shikra --base DIR --delta {folder} --clip DIR --out DIR`")
MINIGPT = ("is or holds one of the pieces in which MiniGPT-v2 is published; put them together with "
           "`python -m nanogap.convert minigpt-v2 --base DIR --vision eva_vit_g.pth "
           "--checkpoint minigptv2_checkpoint.pth --out DIR`")
TRAINING = ("holds the state of a training and no checkpoint yet; gather it into one with the "
            "library that wrote it (zero_to_fp32.py, accelerate merge-weights)")
CONVERT = "save it for PyTorch with `from_pretrained(FOLDER, {})` and save_pretrained"
# what else may lie in a folder: a pattern of its name, and what that says
OTHERS = {
    "adapter_model.*": ADAPTER,
    "non_lora_trainables.bin": ADAPTER,
    "mm_projector.*": "holds a projector in LLaVA's own layout and not the rest of its model; give "
                      "the folder of all of it",
    "eva_vit_g*.pth": MINIGPT, "minigpt*.pth": MINIGPT,
    "*.gguf": "holds GGUF files, which are llama.cpp's; give the checkpoint that they were made "
              "from",
    "tf_model.h5": "holds weights of TensorFlow; " + CONVERT.format("from_tf=True"),
    "flax_model.msgpack": "holds weights of Flax; " + CONVERT.format("from_flax=True"),
    "*.distcp": TRAINING, "global_step*": TRAINING, "pytorch_model_fsdp*": TRAINING,
    "model.safetensors.*.incomplete": "holds a download that stopped; run it again: it continues"}
# names of tensors that tell what a file is
NAMES = {
    r"\blora_[AB]\b|^base_model\.model\.": ADAPTER,
    r"\bmm_projector\b|vision_tower\.vision_tower\.": OWN_LAYOUT,
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|weight_packed|weight_shape|\w*_scale|"
    r"\w*_scale_inv|\w*zero_point|quant_state\.\S+|nested_\w+)$": QUANTISED}


# ----- which folder -------------------------------------------------------------------------------


def checkpoint_folder(folder: Path) -> Path:
    """The folder itself, or the snapshot in a folder of the hub's cache, models--OWNER--NAME."""
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    if not os.path.isdir(snapshots) or os.path.isfile(folder / "config.json"):
        return folder
    there = sorted(path for path in snapshots.iterdir() if path.is_dir())
    main = snapshots.parent / "refs" / "main"
    wanted = main.read_bytes().decode(errors="replace").strip() if main.is_file() else ""
    named = [path for path in there if path.name == wanted]
    if not (named or len(there) == 1):
        found = ", ".join(path.name for path in there) or "none"
        raise NanogapError(f"{snapshots} holds {len(there)} snapshots ({found:.200}); "
                           "give the folder of one of them, or run the download again")
    return (named or there)[0]


def other_form(folder: Path) -> str | None:
    """What a folder holds that is no checkpoint, and what makes one of it."""
    names = [folder.name] if os.path.isfile(folder) else [path.name for path in folder.glob("*")]
    for pattern, says in OTHERS.items():
        if fnmatch.filter(names, pattern):
            return f"{folder} {says.format(folder=folder)}"
    caches = sorted(folder.glob("models--*"))
    if caches:
        return f"{folder} is the hub's cache; give a folder in it, such as {caches[0]}"
    return None


def refuse_adapter(folder: Path) -> None:
    """An adapter beside a model would change its answers, so it is not passed over."""
    if os.path.isfile(folder / "adapter_config.json"):
        raise NanogapError(f"{folder} {ADAPTER}")


def weight_files(folder: Path, download: str) -> list[Path]:
    """The files of a checkpoint's tensors: one, or those that its index names."""
    folder = checkpoint_folder(folder)
    for name in WEIGHTS:
        if os.path.exists(folder / name):
            if name.endswith(".json"):
                return shards(folder, folder / name)
            if not os.path.isfile(folder / name):
                raise NanogapError(f"{folder / name} is no regular file; put the checkpoint's own "
                                   "there")
            return [folder / name]
    raise NanogapError(other_form(folder) or
                       f"{folder} holds no model.safetensors and no index of shards; "
                       f"get the weights with {download}")


def shards(folder: Path, index: Path) -> list[Path]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NanogapError(f"{index} has no weight_map; download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or name in ("", "..") or "\\" in name or "\0" in name:
            raise NanogapError(f"{index} names {name!r:.200}, which is not a file of this folder; "
                               "do not trust it")
        if not os.path.isfile(folder / name):            # False for a name too long for any file
            raise NanogapError(f"{folder} lacks {printable(name)}, which its index names; "
                               "run the download again: it continues where it stopped")
    return [folder / name for name in names]


# ----- one file -----------------------------------------------------------------------------------


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file; its mapping lasts as long as any tensor that was taken from it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        if isinstance(error, (PermissionError, FileNotFoundError)) or lacks_memory(error):
            raise unreadable(path, error) from None
        if path.open("rb").read(4) == b"PK\3\4":
            raise NanogapError(f"{path} is a file of torch.save's under another name; call it "
                               "pytorch_model.bin") from None
        raise NanogapError(f"{path} is cut off or broken ({one_line(error)}); "
                           "download it again") from None


# torch before 1.6 wrote pickles one behind the other; this is the first of them, a magic number
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
FOREIGN = re.compile(r"GLOBAL ([\w.]+) was not an allowed")       # torch's words for a class
NO_PICKLE = "save it again with `torch.save(model.state_dict(), PATH)`"


def unpickle(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that torch.save wrote; of a training's, those of its model."""
    state = read_pickle(path)
    model = state.get("model")
    tensors = model if isinstance(model, dict) else state
    if not all(map(plain, tensors.values())):
        raise NanogapError(f"{path} cannot be read (it holds more than tensors); {NO_PICKLE}")
    return {str(name): tensor for name, tensor in tensors.items()}


def read_pickle(path: Path) -> dict:
    """What torch.save wrote: tensors, numbers, texts, and collections of them; no code is run.

    Tensors are mapped into memory, but for the format of torch before 1.6, which is read.  Of all
    classes only argparse.Namespace is taken, which holds a training's settings.
    """
    try:
        archive = look_into(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        if not isinstance(state, dict):
            raise ValueError("it holds more than tensors")
        return state
    except CutOff as error:
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); "
                           "download it again") from None
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from None
    except Exception as error:   # an unpickler raises almost anything
        if lacks_memory(error):
            raise unreadable(path, error) from None
        foreign = FOREIGN.search(str(error))
        why = f"it holds a {printable(foreign[1])}" if foreign else one_line(error)
        raise NanogapError(f"{path} cannot be read ({why}); {NO_PICKLE}") from None


class CutOff(ValueError):
    """Bytes are missing."""


def plain(tensor: object) -> bool:
    """Whether it is a tensor of numbers in rows: not sparse, not quantised, not without data."""
    return (isinstance(tensor, Tensor) and tensor.layout == torch.strided
            and not tensor.is_quantized and tensor.device.type == "cpu")


def look_into(path: Path) -> bool:
    """Refuse what torch.load would take too much memory for; whether it is today's format.

    raises: CutOff where bytes are missing, ValueError for anything else
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
        if start == LEGACY:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for _ in range(5):            # magic number, protocol, machine, tensors, storages
                    look_through(data)        # type: ignore[arg-type]
            return False
    if not start:
        raise CutOff("it is empty")
    if not start.startswith(b"PK\3\4"):
        raise ValueError("it is no file of torch.save's")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise CutOff(str(error)) from None
    with archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is compressed, as torch.save's files never are")
        names = archive.namelist()
        if sum(part.file_size for part in parts) > size or len(names) > len(set(names)):
            raise ValueError("its parts are larger than it is, or two have one name")
        for part in parts:
            if part.filename.endswith("data.pkl"):
                look_through(BytesIO(archive.read(part)))
    return True


PICKLES = (".bin", ".pth", ".pt")


class Shard:
    """One file of a checkpoint: the names of its tensors, and each tensor, mapped into memory.

    Tensors that stay as they are (all of them, where no dtype is asked for) share one mapping.  One
    that will be converted gets its own, which ends with it and gives its pages back: there is one
    copy in memory, never two.
    """

    def __init__(self, path: Path, device: torch.device,
                 dtype: torch.dtype | None = None) -> None:
        self.path = path
        self.shared: dict[str, Tensor] = {}
        if path.suffix in PICKLES:
            self.shared = unpickle(path)
            self.all = list(self.shared)
            return
        with open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        self.all = list(tensors)
        for name, tensor in tensors.items():
            if tensor.device == device and dtype in (None, tensor.dtype):
                self.shared[name] = tensor

    def names(self) -> list[str]:
        """The names of its tensors."""
        return self.all

    def get(self, name: str) -> Tensor:
        """The tensor of that name."""
        if name in self.shared:
            return self.shared[name]
        with open_safetensors(self.path) as file:
            return file.get_tensor(name)


def refuse_other_form(path: Path, name: str, tensor: Tensor) -> None:
    """What a tensor's name or numbers tell: the file is whole, and something else."""
    for pattern, says in NAMES.items():
        if re.search(pattern, name):
            raise NanogapError(f"{path.parent} {says.format(folder=path.parent)} "
                               f"({path.name}: {printable(name)})")
    if tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool:   # numbers of 8 bits
        raise NanogapError(f"{path.parent} {QUANTISED} ({path.name}: {printable(name)} is "
                           f"{tensor.dtype})")
