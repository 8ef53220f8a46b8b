"""Checkpoints: a folder with config.json and safetensors becomes a model, strictly; and the way back.

In:  a folder in a published layout of one of nanogap/models.  Out: a model.

Every tensor on disk must be known and of the right shape, and none may be missing.  The model is built
without memory (meta device) and takes the memory-mapped tensors as they are: one copy, no more.
Source: the layouts and defaults that transformers 5.23 reads.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap.cli import NanogapError
from nanogap.clip import CLIP, TextGuide
from nanogap.config import one_line, read_clip_config, read_json, write_json
from nanogap.models import MODELS, VLM

HERE = Path(__file__).resolve().parent.parent / "weights"
REAL, MINI = HERE / "llava-1.5-7b-hf", HERE / "mini"
DOWNLOAD = MODELS["llava"].download
UNUSED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")       # in older files


def default_weights() -> Path:
    """The real ones where they are present, else those that ship; relative where that is short."""
    weights = REAL if REAL.is_dir() else MINI
    return weights.relative_to(Path.cwd()) if weights.is_relative_to(Path.cwd()) else weights


def our_name(name: str, rename: Sequence[tuple[str, str]]) -> str:
    """The module path of a published tensor name: `model.language_model.norm.weight` -> ..."""
    for pattern, replacement in rename:
        name = re.sub(pattern, replacement, name)
    return name


def load(folder: str | Path, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, clip: str | Path | None = None) -> VLM:
    """Load a checkpoint of any family in nanogap/models, ready to ground; config.json says which it is.

    folder: config.json, tokenizer.json and model.safetensors, or shards with their index
    device: None takes CUDA where there is one, else the CPU
    dtype:  None takes the checkpoint's own on a GPU; on a CPU float32, or bfloat16 for a model of more
            than two billion parameters; see `model.device` and `model.dtype` for what it came to
    clip:   folder of the CLIP that the vision tower comes from, for strategies that read the expression;
            None takes `clip_text` in the folder, if it is there
    raises: NanogapError where anything is missing, broken, unknown or of another shape
    """
    folder = Path(folder)
    family = family_of(folder)
    config = family.read_config(folder)
    with torch.device("meta"):
        model = family(config)
    device = pick_device(device)
    size = sum(p.numel() for p in model.parameters())
    dtype = pick_dtype(dtype, device, config.dtype, size)
    model.tokenizer = read_tokenizer(folder, config.text.vocab_size)
    check_image_token(folder, config, model.tokenizer)
    tied = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    fill(model, folder, device, dtype, DOWNLOAD, family.rename,
         tied if config.text.tie_word_embeddings else {})
    clip = clip or (folder / "clip_text" if os.path.isdir(folder / "clip_text") else None)
    if clip:
        model.text_guide = load_text_guide(Path(clip), model, device, dtype)
    return model


def family_of(folder: Path) -> type[VLM]:
    """Which of MODELS a folder holds, by the `model_type` in its config.json."""
    if not os.path.isfile(folder / "config.json"):
        what = ("has no config.json, so it is not a checkpoint" if os.path.isdir(folder)
                else "is not a folder")
        raise NanogapError(f"{folder} {what}; get the published weights with {DOWNLOAD}")
    found = read_json(folder / "config.json").get("model_type")
    if not isinstance(found, str) or found not in MODELS:
        raise NanogapError(f"{folder / 'config.json'} describes a {found!r:.80} model; "
                           f"nanogap loads {', '.join(map(repr, MODELS))} (in the layout of llava-hf)")
    return MODELS[found]


def load_text_guide(folder: Path, model: VLM, device: torch.device, dtype: torch.dtype) -> TextGuide:
    """The text tower and the projections of a CLIP in the layout of openai/clip-vit-large-patch14-336."""
    download = model.clip_download()
    if not os.path.isfile(folder / "config.json"):
        raise NanogapError(f"{folder} has no config.json, so it is no CLIP; get it with {download}")
    vision, text, width = read_clip_config(folder)
    if vision.hidden_size != model.config.vision.hidden_size:
        raise NanogapError(f"{folder} is a CLIP of {vision.hidden_size} channels, and the vision tower has "
                           f"{model.config.vision.hidden_size}: give the CLIP that it comes from")
    with torch.device("meta"):
        clip = CLIP(vision, text, width)
    del clip.vision_model, clip.logit_scale                                   # the model has its own eyes
    fill(clip, folder, device, dtype, download, unused=r"^vision_model\.|^logit_scale$")
    return TextGuide(clip, read_tokenizer(folder, text.vocab_size))


def fill(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype, download: str,
         rename: Sequence[tuple[str, str]] = (), tied: dict[str, str] | None = None,
         unused: str = "$^") -> None:
    """Give a model on the meta device the tensors of a checkpoint, all of them and no others.

    rename: patterns from names on disk to names of modules
    tied:   names that may be missing, and the tensors that they share
    unused: pattern of names on disk that are known and not a part of the model
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    tensors = read_tensors(folder, shapes, device, dtype, rename, re.compile(unused), download)
    for name, other in (tied or {}).items():
        tensors.setdefault(name, tensors.get(other))
    missing = [name for name in shapes if tensors.get(name) is None]
    if missing:
        raise NanogapError(f"{folder} lacks {len(missing)} of {len(shapes)} tensors, such as {missing[0]}; "
                           "download it again")
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(False).eval()


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    try:
        if torch.device(device).type in there:
            return torch.device(device)
    except RuntimeError:
        pass
    raise NanogapError(f"device {str(device):.80} is not available here; choose from {', '.join(there)}")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device, own: str,
               size: int) -> torch.dtype:
    """The precision asked for, or the best for this device and number of parameters."""
    if dtype is None:
        if device.type == "cpu":
            return torch.float32 if size <= 2e9 else torch.bfloat16
        return DTYPES.get(own, torch.float16)
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise NanogapError(f"unknown dtype {dtype}; choose from {', '.join(DTYPES)}")
    return DTYPES[name]


# ----- reading ------------------------------------------------------------------------------------


def read_tokenizer(folder: Path, rows: int) -> Tokenizer:
    """tokenizer.json, refused where it is missing, broken, or too large for the embeddings."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NanogapError(f"{folder} has no tokenizer.json; download it again, whole")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:   # tokenizers raises bare Exceptions
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); download it again") from None
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise NanogapError(f"{path} has more tokens than the model has embeddings "
                           f"({rows}): it belongs to another checkpoint")
    return tokenizer


def check_image_token(folder: Path, config: Any, tokenizer: Tokenizer) -> None:
    """Refuse an image token that words could spell: a prompt might hold it twice."""
    image, taken = config.image_token, tokenizer.id_to_token(config.image_token)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if image == config.bos_token or taken and image not in special:
        raise NanogapError(f"config.json: image_token_index is {image}, which stands for {taken!r:.80} in "
                           f"{folder / 'tokenizer.json'}, so a prompt could hold it twice; "
                           "download both again")


def shards(folder: Path, download: str) -> list[Path]:
    """The files of a checkpoint's tensors: one, or those that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        for name in ("model.safetensors", "pytorch_model.bin"):               # OpenAI's CLIP has the latter
            if (folder / name).is_file():
                return [folder / name]
        raise NanogapError(f"{folder} holds no model.safetensors and no index of shards; "
                           f"get the weights with {download}")
    names = read_json(index).get("weight_map")
    names = sorted({str(n) for n in names.values()}) if isinstance(names, dict) else []
    if not names:
        raise NanogapError(f"{index} has no weight_map; download it again")
    for name in names:
        if Path(name).name != name or name in ("", "..") or "\\" in name or "\0" in name:
            raise NanogapError(f"{index} names {name!r:.200}, which is not a file of this folder; "
                               "do not trust it")
        if not os.path.isfile(folder / name):            # False for a name too long for any file
            raise NanogapError(f"{folder} lacks {spelled(name)}, which its index names; "
                               "run the download again: it continues where it stopped")
    return [folder / name for name in names]


def opened(path: Path, read: Callable) -> Any:
    """read(file) on an open safetensors file; its mapping lasts as long as any tensor taken from it."""
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise NanogapError(f"{path} is cut off or broken ({one_line(error)}); download it again") from None


def stored(path: Path, device: torch.device, dtype: torch.dtype) -> list[tuple[str, Callable[[], Tensor]]]:
    """The tensors of a file: their names, and how to map each into memory."""
    if path.suffix == ".bin":
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not all(map(torch.is_tensor, state.values())):
                raise ValueError("it holds more than tensors")
            return [(str(name), partial(state.get, name)) for name in state]
        except Exception as error:   # whatever an unpickler comes upon
            raise NanogapError(f"{path} cannot be read ({one_line(error)}); download it again") from None
    # Those that will stay as they are share one mapping.  One that will be converted gets its own, which
    # ends with it and gives its pages back: there is one copy in memory, never two.
    tensors = opened(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})
    staying = {name: tensor for name, tensor in tensors.items()
               if (tensor.device, tensor.dtype) == (device, dtype)}

    def get(name: str) -> Tensor:
        return staying[name] if name in staying else opened(path, methodcaller("get_tensor", name))

    return [(name, partial(get, name)) for name in tensors]


def spelled(name: str) -> str:
    """A name from a file that nobody vouches for: one line, and no more than fits on it."""
    return ascii(name)[1:-1][:200]


def read_tensors(folder: Path, shapes: dict[str, torch.Size], device: torch.device, dtype: torch.dtype,
                 rename: Sequence[tuple[str, str]], unused: re.Pattern[str], download: str) -> dict[str, Tensor]:
    """All tensors under our names, each of the shape that the model expects."""
    tensors: dict[str, Tensor] = {}
    others = "the file and config.json belong to different checkpoints"
    for path in shards(folder, download):
        for name, get in stored(path, device, dtype):
            ours = our_name(name, rename)
            if UNUSED.search(name) or unused.search(name):
                continue
            if ours not in shapes:
                raise NanogapError(f"{path} holds {spelled(name)}, which is not a part of this "
                                   f"model: {others}")
            if ours in tensors:
                raise NanogapError(f"{path} holds {spelled(name)}, which was there before under another name")
            tensor = get()
            if tensor.shape != shapes[ours] or not tensor.is_floating_point():
                raise NanogapError(f"{path}: {spelled(name)} is {tensor.dtype} {list(tensor.shape)}, and "
                                   f"config.json makes it {list(shapes[ours])}: {others}")
            try:
                tensors[ours] = tensor.to(device, dtype)
            except RuntimeError as error:   # torch.OutOfMemoryError is one
                raise NanogapError(f"{device} has no room for the model in {dtype} ({one_line(error)}); "
                                   "choose another device or dtype") from None
    return tensors


# ----- writing ------------------------------------------------------------------------------------


def save_tensors(path: Path, module: nn.Module, dtype: torch.dtype) -> None:
    """Write a module's tensors, `vision_tower.` with the published `vision_model.` behind it."""
    state = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): value.detach().to("cpu", dtype)
             for name, value in module.state_dict().items()}
    # safetensors.torch.save_file would need numpy for what these pointers do
    specs = {name: TensorSpec(dtype=str(dtype).removeprefix("torch."), shape=list(value.shape),
                              data_ptr=value.data_ptr(), data_len=value.nbytes)
             for name, value in state.items()}
    partial = path.with_suffix(".partial")
    serialize_file(specs, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(path)


def save(folder: Path, model: VLM, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model in its published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    model.write_config(folder, str(dtype).removeprefix("torch."))
    model.tokenizer.save(str(folder / "tokenizer.json"))
    save_tensors(folder / "model.safetensors", model, dtype)


def save_clip(folder: Path, clip: CLIP, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write both towers in the layout of openai/clip-vit-large-patch14-336."""
    folder.mkdir(parents=True, exist_ok=True)
    vision, text = clip.vision_model.config, clip.text_model.config
    end = tokenizer.token_to_id("<|endoftext|>")
    start = tokenizer.token_to_id("<|startoftext|>")
    tokens = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    width = {"projection_dim": clip.visual_projection.out_features, "hidden_act": "quick_gelu"}
    write_json(folder / "config.json", {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width["projection_dim"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "text_config": asdict(text) | width | tokens | {"model_type": "clip_text_model"},
        "vision_config": asdict(vision) | width | {"model_type": "clip_vision_model"}})
    tokenizer.save(str(folder / "tokenizer.json"))
    save_tensors(folder / "model.safetensors", clip, dtype)
