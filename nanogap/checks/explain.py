"""What a folder is that is no checkpoint, or one of another form: one line with the next step."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from nanogap import weights
from nanogap.checks.command import one_line, shown
from nanogap.checks.reading import read_json, tensors_of, unreadable
from nanogap.errors import NanogapError
from nanogap.models import MODELS

# by `model_type` in config.json: how to get one
GET = {kind: f"get the published weights with {family.download}, or take some that come with "
             "nanogap, such as mini" for kind, family in MODELS.items()}
GET_CLIP = {"clip": f"get the CLIP with {MODELS['llava'].clip_download}"}
# patterns of a file's name, of a key of config.json, or of a tensor and its type -> what that says
FORMS = {
    r"^adapter_(config|model)\.|^non_lora_trainables\.bin$|\blora_[AB]\b|: base_model\.model\.":
        "holds an adapter (LoRA), which is a change to another model's weights; merge it into its "
        "base with `merge_and_unload()` of peft, and save that with save_pretrained",
    r"of shikra: mm_":
        "is Shikra as it is published, a difference to LLaMA-7B; add them with `python -m "
        "nanogap.convert shikra --base DIR --delta {folder} --clip DIR --out DIR`",
    r"^config\.json .*: mm_|\bmm_projector\b|vision_tower\.vision_tower\.":
        "is in LLaVA's own layout, and nanogap reads that of llava-hf; convert it with "
        "`python -m nanogap.convert llava --base {folder} --clip DIR --out DIR`",
    r": (quantization|compression)_config$|, torch\.(?!b?float(16|32|64)$)":
        "holds quantised weights, and nanogap reads float32, bfloat16 and float16; give the "
        "checkpoint that they were made from, or save the `dequantize()` of transformers",
    r"^(eva_vit_g|minigpt).*\.pth$":
        "is or holds one of the pieces in which MiniGPT-v2 is published; put them together with "
        "`python -m nanogap.convert minigpt-v2 --base DIR --vision eva_vit_g.pth "
        "--checkpoint minigptv2_checkpoint.pth --out DIR`",
    r"\.gguf$": "holds GGUF files, which are llama.cpp's; give the checkpoint that they were made "
                "from"}


def explain(folder: Path, error: BaseException, clip: Path | None) -> NanogapError:
    """The mistake that it is when a folder could not be loaded, or the CLIP beside it."""
    try:
        for part, get in ((folder, GET), (clip, GET_CLIP)):
            if part is not None:
                look_through(part, get)
                check_small_files(part)
    except NanogapError as found:
        return found
    if isinstance(error, NanogapError):
        return error
    kind = read_json(folder / "config.json")["model_type"]
    return NanogapError(f"{folder} cannot be loaded as {kind} ({one_line(error)}); get all of its "
                        "files again, of one checkpoint")


def look_through(folder: Path, get: dict[str, str]) -> None:
    """Refuse a folder that is no whole checkpoint of a model that nanogap reads.

    get: the models, by `model_type` in config.json, and how to get one
    """
    step = next(iter(get.values()))
    check_form(folder, (path.name for path in folder.glob("adapter_config.json")))
    if not (folder / "config.json").exists():
        check_form(folder, (path.name for path in (folder, *folder.glob("*"))))
        what = ("has no config.json, so it is not a checkpoint" if folder.is_dir() else
                "is not a folder")
        raise NanogapError(f"{folder} {what}; {step}")
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    keys = (*config, *(config.get("text_config") or {}))
    check_form(folder, (f"config.json of {kind}: {key}" for key in keys))
    if kind not in list(get):
        raise NanogapError(f"{folder / 'config.json'} describes a {kind!r:.80} model, not a "
                           f"{' or '.join(map(repr, get))}; {step}")
    for path in weight_files(folder, get[kind]):
        check_form(folder, (f"{path.name}: {name}, {tensor.dtype}"
                            for name, tensor in tensors_of(path).items()
                            if not re.search(weights.UNUSED, name)))


def check_form(folder: Path, signs: Iterable[str]) -> None:
    """Refuse a folder by what it has, in words that FORMS knows."""
    for sign in signs:
        for pattern, says in FORMS.items():
            if re.search(pattern, sign):
                text = says.replace("{folder}", shlex.quote(str(folder)))     # can be pasted
                raise NanogapError(f"{folder} {text} ({shown(sign)})")


def weight_files(folder: Path, step: str) -> list[Path]:
    """The files of a checkpoint's tensors, each of them there; step: how to get them."""
    for index in folder.glob("*.index.json"):
        read_json(index)
    try:
        files = weights.weight_files(folder)
    except NanogapError as error:
        check_form(folder, (path.name for path in (folder, *folder.glob("*"))))
        raise NanogapError(f"{error}; {step}") from None
    for path in files:
        if not path.is_file():
            raise NanogapError(f"{folder} lacks {path.name}, which its index names; run the "
                               "download again: it continues where it stopped")
    return files


def check_small_files(folder: Path) -> None:
    """Refuse JSON that is broken, and a tokenizer that is not there or of no use."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise NanogapError(f"{folder} has no tokenizer.json; download it, or write one from what "
                           "an older library wrote, with `AutoTokenizer.from_pretrained(FOLDER)"
                           ".save_pretrained(FOLDER)` of transformers")
    for file in (path, folder / "chat_template.json", *folder.glob("*config.json")):
        if file.exists():
            read_json(file)
    try:
        weights.read_tokenizer(folder)
    except BaseException as error:           # bare Exceptions, and panics, which are none
        raise unreadable(path, error, "give the tokenizer.json that the checkpoint was published "
                         "with") from None
