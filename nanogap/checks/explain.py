"""What a folder is that could not be loaded: looked at afterwards, and said in one line.

In:  the folder, and whatever came of loading it.
Out: the mistake: what is wrong, and the next step.
"""

import fnmatch
import re
from collections.abc import Collection
from pathlib import Path

from nanogap import weights
from nanogap.checks.belongs import check_tensors, tensors_of
from nanogap.checks.command import lacks_memory
from nanogap.checks.reading import instead, one_line, printable, read_json, unreadable
from nanogap.checks.silent import ADAPTER, OWN_LAYOUT, refuse_adapter, refuse_quantised, say
from nanogap.errors import NanogapError
from nanogap.models import MODELS

DOWNLOAD, CLIP_DOWNLOAD = MODELS["llava"].download, MODELS["llava"].clip_download
GET = (f"get the published weights with {DOWNLOAD}, or take some that come with nanogap, such as "
       "weights/mini")
DELTA = ("is Shikra as it is published, a difference to LLaMA-7B; add them with `python -m "
         "nanogap.convert shikra --base DIR --delta {folder} --clip DIR --out DIR`")
MINIGPT = ("is or holds one of the pieces in which MiniGPT-v2 is published; put them together with "
           "`python -m nanogap.convert minigpt-v2 --base DIR --vision eva_vit_g.pth "
           "--checkpoint minigptv2_checkpoint.pth --out DIR`")
# what a folder may hold in place of a checkpoint: patterns of a file's name, and what that says
OTHERS = {
    "adapter_model.*": ADAPTER,
    "non_lora_trainables.bin": ADAPTER,
    "mm_projector.*": "holds a projector in LLaVA's own layout and not the rest of its model; give "
                      "the folder of all of it",
    "eva_vit_g*.pth": MINIGPT,
    "minigpt*.pth": MINIGPT,
    "*.gguf": "holds GGUF files, which are llama.cpp's; give the checkpoint that they were made "
              "from",
    "models--*": "is the hub's cache; give a folder in it, such as {folder}/models--OWNER--NAME"}


def explain(folder: Path, error: BaseException, clip: Path | None) -> NanogapError:
    """The mistake that it is when a folder could not be loaded, or the CLIP beside it."""
    if lacks_memory(error):
        return unreadable(folder, error)
    try:
        config = look_at(folder, MODELS, GET)
        weight_files(folder, MODELS[config["model_type"]].download)
        if clip is not None:
            look_at_clip(clip)
            weight_files(clip, CLIP_DOWNLOAD)
        if isinstance(error, NanogapError):
            return error
        for part in filter(None, (folder, clip)):
            check_files(part)
    except NanogapError as found:
        return found
    return NanogapError(f"{folder} cannot be loaded ({one_line(error)}); get all of its files "
                        "again, of one checkpoint")


def look_at(folder: Path, known: Collection[str], step: str) -> dict:
    """config.json of a checkpoint of a known `model_type`; or what the folder is instead.

    step: how to get one that is
    """
    if not (folder / "config.json").exists():
        what = ("has no config.json, so it is not a checkpoint" if folder.is_dir() else
                "is not a folder")
        raise NanogapError(other_form(folder) or f"{folder} {what}; {step}")
    refuse_adapter(folder)
    config = read_json(folder / "config.json")
    found = config.get("model_type")
    own = next((key for key in config if key.startswith("mm_")), None)
    if own and found == "shikra":
        raise NanogapError(say(folder, DELTA))
    if own and found != "minigpt_v2":
        raise NanogapError(f"{say(folder, OWN_LAYOUT)} (config.json has {own})")
    if found not in list(known):
        raise NanogapError(f"{folder / 'config.json'} describes a {found!r:.80} model, not a "
                           f"{' or '.join(map(repr, known))}; {step}")
    refuse_quantised(folder, config)
    return config


def look_at_clip(folder: Path, download: str = CLIP_DOWNLOAD) -> None:
    """The same for a CLIP; download: what gets it."""
    look_at(folder, ["clip"], f"get the CLIP with {download}")


def other_form(folder: Path) -> str | None:
    """What a folder holds that is no checkpoint, and what makes one of it."""
    names = [folder.name] if folder.is_file() else [path.name for path in folder.glob("*")]
    for pattern, says in OTHERS.items():
        if fnmatch.filter(names, pattern):
            return say(folder, says)
    return None


def check_files(folder: Path) -> None:
    """Refuse weights that are broken or of another form, and so a tokenizer."""
    for path in weights.weight_files(folder):
        check_readable(path)
    check_tensors(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise NanogapError(f"{folder} has no tokenizer.json; download it, or write one from what "
                           "an older library wrote, with `AutoTokenizer.from_pretrained(FOLDER)"
                           ".save_pretrained(FOLDER)` of transformers")
    read_json(path)
    try:
        weights.read_tokenizer(folder)
    except BaseException as error:           # bare Exceptions, and panics, which are none
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); give the tokenizer.json "
                           "that the checkpoint was published with") from None


def weight_files(folder: Path, download: str) -> list[Path]:
    """The files of a checkpoint's tensors, each of them there; download: what gets them."""
    for index in folder.glob("*.index.json"):
        read_json(index)
    try:
        files = weights.weight_files(folder)
    except NanogapError as error:
        raise NanogapError(other_form(folder) or f"{error}; get the weights with "
                           f"{download}") from None
    for path in files:
        if not path.is_file():
            raise NanogapError(f"{folder} lacks {printable(path.name)}, which its index names; "
                               "run the download again: it continues where it stopped")
    return files


def check_readable(path: Path) -> None:
    """Refuse a file of tensors that its library cannot read."""
    try:
        list(tensors_of(path))
    except Exception as error:               # an unpickler raises almost anything
        if isinstance(error, OSError) or lacks_memory(error):
            raise unreadable(path, error) from None
        foreign = re.search(r"GLOBAL ([\w.]+) was not an allowed", str(error))    # torch's words
        why = f"it holds a {printable(foreign[1])}" if foreign else one_line(error)
        step = "download it again"
        if foreign or "more than tensors" in why:
            step = "save it again with `torch.save(model.state_dict(), PATH)`"
        raise NanogapError(instead(path) or f"{path} cannot be read ({why}); {step}") from None
