"""What a folder is that could not be loaded: looked at afterwards, and said in one line.

In:  the folder, and whatever came of loading it.
Out: the mistake: what is wrong, and the next step.

A download that stopped is to go on, and that is said where bytes are missing.  A folder that is
whole and holds another thing (an adapter, quantised weights, a training's state) is told what it
is, and what makes a checkpoint of it.
"""

import fnmatch
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Size, nn

from nanogap import weights
from nanogap.checks.belongs import check_numbers, tensors_of
from nanogap.checks.command import lacks_memory
from nanogap.checks.reading import instead, one_line, printable, read_json, unreadable
from nanogap.checks.silent import ADAPTER, QUANTISED, refuse_adapter, refuse_quantised
from nanogap.clip import CLIPText, CLIPTextConfig, CLIPVisionConfig
from nanogap.errors import NanogapError
from nanogap.models import MODELS
from nanogap.models.saving import our_name

DOWNLOAD, CLIP_DOWNLOAD = MODELS["llava"].download, MODELS["llava"].clip_download
OWN_LAYOUT = ("is in LLaVA's own layout, and nanogap reads that of llava-hf; convert it with "
              "`python -m nanogap.convert llava --base {folder} --clip DIR --out DIR`")
DELTA = ("is Shikra as it is published, a difference to LLaMA-7B; add them with `python -m "
         "nanogap.convert shikra --base DIR --delta {folder} --clip DIR --out DIR`")
MINIGPT = ("is or holds one of the pieces in which MiniGPT-v2 is published; put them together with "
           "`python -m nanogap.convert minigpt-v2 --base DIR --vision eva_vit_g.pth "
           "--checkpoint minigptv2_checkpoint.pth --out DIR`")
TRAINING = ("holds the state of a training and no checkpoint yet; gather it into one with the "
            "library that wrote it (zero_to_fp32.py, accelerate merge-weights)")
STOPPED = "holds a download that stopped; run it again: it continues"
CONVERT = "save it for PyTorch with `from_pretrained(FOLDER, {})` and save_pretrained"
# what else may lie in a folder: a pattern of its name, and what that says
OTHERS = {
    "adapter_model.*": ADAPTER, "non_lora_trainables.bin": ADAPTER,
    "mm_projector.*": "holds a projector in LLaVA's own layout and not the rest of its model; give "
                      "the folder of all of it",
    "eva_vit_g*.pth": MINIGPT, "minigpt*.pth": MINIGPT,
    "*.gguf": "holds GGUF files, which are llama.cpp's; give the checkpoint that they were made "
              "from",
    "tf_model.h5": "holds weights of TensorFlow; " + CONVERT.format("from_tf=True"),
    "flax_model.msgpack": "holds weights of Flax; " + CONVERT.format("from_flax=True"),
    "*.distcp": TRAINING, "global_step*": TRAINING, "pytorch_model_fsdp*": TRAINING,
    **dict.fromkeys(("*.incomplete", "*.aria2", "*.part", "*.crdownload"), STOPPED)}
# names of tensors that tell what a file is
NAMES = {
    r"\blora_[AB]\b|^base_model\.model\.": ADAPTER,
    r"\bmm_projector\b|vision_tower\.vision_tower\.": OWN_LAYOUT,
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|weight_packed|weight_shape|\w*_scale|"
    r"\w*_scale_inv|\w*zero_point|quant_state\.\S+|nested_\w+)$": QUANTISED}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")


def explain(folder: Path, error: BaseException, clip: Path | None = None) -> NanogapError:
    """The mistake that it is when a folder could not be loaded, or the CLIP beside it."""
    if isinstance(error, PermissionError | MemoryError) or lacks_memory(error):
        return unreadable(Path(getattr(error, "filename", None) or folder), error)
    try:
        look_at(folder)
        weight_files(folder)
        if clip is not None:
            look_at_clip(clip)
            weight_files(clip)
        if isinstance(error, NanogapError):
            return error
        for one in (folder, clip):
            if one is not None:
                check_files(one)
    except NanogapError as found:
        return found
    except Exception as other:             # as broken as what came of loading it
        error = other
    return NanogapError(f"{folder} cannot be loaded ({one_line(error)}); download it again")


def look_at(folder: Path) -> None:
    """Refuse a folder that is no checkpoint of one of MODELS, by what it is instead."""
    if not (folder / "config.json").exists():
        what = ("has no config.json, so it is not a checkpoint" if folder.is_dir() else
                "is not a folder")
        raise NanogapError(other_form(folder) or
                           f"{folder} {what}; get the published weights with {DOWNLOAD}, or take "
                           "some that come with nanogap, such as weights/mini")
    refuse_adapter(folder)
    config = read_json(folder / "config.json")
    found, own = config.get("model_type"), own_layout(config)
    if own and found == "shikra":
        raise NanogapError(say(folder, DELTA))
    if own and found != "minigpt_v2":
        raise NanogapError(f"{say(folder, OWN_LAYOUT)} (config.json has {own})")
    if not isinstance(found, str) or found not in MODELS:
        known = ", ".join(map(repr, MODELS))
        raise NanogapError(f"{folder / 'config.json'} describes a {found!r:.80} model; "
                           f"nanogap loads {known} (in the layout of llava-hf)")
    refuse_quantised(folder, config)


def look_at_clip(folder: Path, download: str = CLIP_DOWNLOAD) -> None:
    """The same for a CLIP; download: what gets it."""
    if not (folder / "config.json").exists():
        raise NanogapError(other_form(folder) or f"{folder} has no config.json, so it is no CLIP; "
                           f"get it with {download}")
    refuse_adapter(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise NanogapError(f"{folder / 'config.json'} describes a "
                           f"{config.get('model_type')!r:.80} model, not a 'clip'")
    refuse_quantised(folder, config)


def say(folder: Path, text: str) -> str:
    """One of the texts above, of a folder; its commands can be pasted."""
    return f"{folder} {text.replace('{folder}', shlex.quote(str(folder)))}"


def other_form(folder: Path) -> str | None:
    """What a folder holds that is no checkpoint, and what makes one of it."""
    names = [folder.name] if folder.is_file() else sorted(path.name for path in folder.glob("*"))
    for pattern, says in OTHERS.items():
        if fnmatch.filter(names, pattern):
            return say(folder, says)
    for cache in fnmatch.filter(names, "models--*"):
        return f"{folder} is the hub's cache; give a folder in it, such as {folder / cache}"
    return None


def own_layout(config: dict) -> str | None:
    """The key that shows LLaVA's own layout, which those of the hub's LLaVAs do not have."""
    for key in ("mm_vision_tower", *config):
        if key in config and key.startswith("mm_"):
            return key
    if re.search(r"'Llava\w*ForCausalLM'", str(config.get("architectures"))):
        return "architectures"
    if config.get("model_type") in ("llava_llama", "llava_mistral", "llava_mpt"):
        return "model_type"
    return None


# ----- its files ----------------------------------------------------------------------------------


def check_files(folder: Path) -> None:
    """Refuse weights that are missing, broken or another model's, and so a tokenizer."""
    model = empty(folder)
    of_clip = isinstance(model, CLIPText)
    passed_over = weights.UNUSED + (r"|^vision_model\.|^logit_scale$" if of_clip else "")
    found: set[str] = set()
    for path in weight_files(folder):
        check_readable(path)
        for name, shape, kind in tensors_of(path):
            if not re.search(passed_over, name):
                found.add(check_tensor(path, name, shape, kind, model))
    if not of_clip and model.config.text.tie_word_embeddings:
        found.add("language_model.lm_head.weight")
    missing = [name for name in model.state_dict() if name not in found]
    if missing:
        raise NanogapError(f"{folder} lacks {len(missing)} of {len(model.state_dict())} tensors, "
                           f"such as {missing[0]}; download it again")
    check_tokenizer(folder)


def empty(folder: Path) -> Any:
    """The model that config.json describes, without numbers."""
    config = weights.read_json(folder / "config.json")
    with torch.device("meta"):
        if config["model_type"] != "clip":
            family = MODELS[config["model_type"]]
            return family(weights.read_config(folder, family))        # type: ignore[arg-type]
        vision = weights.known(CLIPVisionConfig, config["vision_config"])
        text = weights.known(CLIPTextConfig, config["text_config"])
        return CLIPText(replace(weights.VIT_B_32, **vision), replace(weights.TEXT_B_32, **text),
                        config.get("projection_dim", 512))


def weight_files(folder: Path, download: str | None = None) -> list[Path]:
    """The files of a checkpoint's tensors, each of them there; download: what gets them."""
    if download is None:
        family = MODELS.get(read_json(folder / "config.json")["model_type"])
        download = family.download if family else CLIP_DOWNLOAD
    name = next((name for name in WEIGHTS if os.path.lexists(folder / name)), None)
    if name is None:
        raise NanogapError(other_form(folder) or
                           f"{folder} holds no model.safetensors and no index of shards; "
                           f"get the weights with {download}")
    if not name.endswith(".json"):
        return [folder / name]
    index = folder / name
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NanogapError(f"{index} has no weight_map; download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise NanogapError(f"{index} names {name!r:.200}, which is not a file of this folder; "
                               "do not trust it")
        if len(name) > 255 or not (folder / name).is_file():
            raise NanogapError(f"{folder} lacks {printable(name)}, which its index names; "
                               "run the download again: it continues where it stopped")
    return [folder / name for name in names]


def check_readable(path: Path) -> None:
    """Refuse a file of tensors that its library cannot read."""
    if not path.is_file():
        raise NanogapError(f"{path} is no regular file; put the checkpoint's own there")
    try:
        list(tensors_of(path))
    except Exception as error:               # an unpickler raises almost anything
        if isinstance(error, PermissionError) or lacks_memory(error):
            raise unreadable(path, error) from None
        raise broken(path, error) from None


def broken(path: Path, error: Exception) -> NanogapError:
    """What a file of tensors is that cannot be read, by its first bytes and its neighbours."""
    found = instead(path)
    if found:
        return NanogapError(found)
    start, saved = path.open("rb").read(4), path.suffix != ".safetensors"
    if not saved and start == b"PK\3\4":
        return NanogapError(f"{path} is a file of torch.save's under another name; call it "
                            "pytorch_model.bin")
    if not saved or not start or "PytorchStreamReader" in str(error):
        for left in path.parent.glob(f"{path.name}*"):
            if left != path:
                return NanogapError(f"{path} is cut off, and {left.name} beside it is of a "
                                    "download that stopped; run it again: it continues")
        what = "cannot be read" if saved else "is cut off or broken"
        return NanogapError(f"{path} {what} ({one_line(error)}); download it again")
    foreign = re.search(r"GLOBAL ([\w.]+) was not an allowed", str(error))    # torch's words
    why = f"it holds a {printable(foreign[1])}" if foreign else one_line(error)
    return NanogapError(f"{path} cannot be read ({why}); save it again with "
                        "`torch.save(model.state_dict(), PATH)`")


def check_tensor(path: Path, name: str, shape: Size, kind: str, model: nn.Module) -> str:
    """The name in the model of a tensor that is a part of it, and has its shape."""
    ours, expected = our_name(name, getattr(model, "rename", ())), model.state_dict()
    others = "the file and config.json belong to different checkpoints"
    if ours not in expected:
        for pattern, says in NAMES.items():
            if re.search(pattern, name):
                raise NanogapError(f"{say(path.parent, says)} ({path.name}: {printable(name)})")
        raise NanogapError(f"{path} holds {printable(name)}, which is not a part of this "
                           f"model: {others}")
    check_numbers(path, name, shape, kind)
    if shape != expected[ours].shape and not fits(model, ours, shape):
        raise NanogapError(f"{path}: {printable(name)} is torch.{kind} {list(shape)}, and "
                           f"config.json makes it {list(expected[ours].shape)}: {others}")
    return ours


def fits(model: nn.Module, name: str, shape: Size) -> bool:
    """Whether a model takes a tensor of that shape, as it is or by fitting it."""
    try:
        model.load_state_dict({name: torch.empty(shape, device="meta")}, strict=False, assign=True)
        return True
    except RuntimeError:
        return False


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer that is missing, or that the library does not read."""
    path = folder / "tokenizer.json"
    if not path.exists():
        step = "download it again, whole"
        for name in ("tokenizer.model", "vocab.json"):
            if (folder / name).exists():
                step = (f"it has an older library's {name}: write a new one from it with "
                        "`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` of "
                        "transformers")
        raise NanogapError(f"{folder} has no tokenizer.json; {step}")
    whole = read_json(path)
    if whole.get("version") != "1.0":
        raise NanogapError(f"{path} is of version {whole.get('version')!r:.20}, and only 1.0 is "
                           "read here: a newer library wrote it; give the tokenizer.json that the "
                           "checkpoint was published with")
    try:
        weights.read_tokenizer(folder)
    except BaseException as error:           # bare Exceptions, and panics, which are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); give the tokenizer.json "
                           "that the checkpoint was published with") from None
