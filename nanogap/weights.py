"""Checkpoints: from a folder with config.json and safetensors to a model, strictly, and back.

In:  a folder in a published layout of one of nanogap/models.  Out: a model.

Every tensor on disk must be known and of the right shape, and none may be missing.  The model is
built without memory (meta device) and takes the memory-mapped tensors as they are: one copy in all.
Source: the layouts and defaults that transformers 5.23 reads.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
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
REAL = HERE / "llava-1.5-7b-hf"
MINI = HERE / "mini"
DOWNLOAD = MODELS["llava"].download
UNUSED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")       # in older files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_weights() -> Path:
    """The real ones where they are present, else those that ship; relative where that is short."""
    weights = REAL if REAL.is_dir() else MINI
    if weights.is_relative_to(Path.cwd()):
        return weights.relative_to(Path.cwd())
    return weights


def our_name(name: str, rename: Sequence[tuple[str, str]]) -> str:
    """The module path of a published tensor name: `model.language_model.norm.weight` -> ..."""
    for pattern, replacement in rename:
        name = re.sub(pattern, replacement, name)
    return name


def load(folder: str | Path, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, clip: str | Path | None = None) -> VLM:
    """Load a checkpoint, ready to ground; config.json says which family of nanogap/models it is.

    folder: config.json, tokenizer.json and model.safetensors, or shards with their index
    device: None takes CUDA where there is one, else the CPU
    dtype:  None takes the checkpoint's own on a GPU; on a CPU float32, or bfloat16 for a model of
            more than two billion parameters; `model.device` and `model.dtype` say which it was
    clip:   folder of the CLIP that the vision tower comes from, for strategies that read the
            expression; None takes `clip_text` in the folder, if it is there
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
    tied = {}
    if config.text.tie_word_embeddings:
        tied["language_model.lm_head.weight"] = "language_model.model.embed_tokens.weight"
    load_into(model, folder, device, dtype, DOWNLOAD, family.rename, tied)
    if not clip and os.path.isdir(folder / "clip_text"):
        clip = folder / "clip_text"
    if clip:
        model.text_guide = load_text_guide(Path(clip), model, device, dtype)
    return model


def family_of(folder: Path) -> type[VLM]:
    """Which of MODELS a folder holds, by the `model_type` in its config.json."""
    if not os.path.isfile(folder / "config.json"):
        what = "is not a folder"
        if os.path.isdir(folder):
            what = "has no config.json, so it is not a checkpoint"
        raise NanogapError(f"{folder} {what}; get the published weights with {DOWNLOAD}")
    config = read_json(folder / "config.json")
    found = config.get("model_type")
    if "mm_vision_tower" in config:        # in LLaVA's own layout the type has other names as well
        found = "llava"
    if not isinstance(found, str) or found not in MODELS:
        known = ", ".join(map(repr, MODELS))
        raise NanogapError(f"{folder / 'config.json'} describes a {found!r:.80} model; "
                           f"nanogap loads {known} (in the layout of llava-hf)")
    return MODELS[found]


def load_text_guide(folder: Path, model: VLM, device: torch.device,
                    dtype: torch.dtype) -> TextGuide:
    """Text tower and projections of a CLIP, in the layout of openai/clip-vit-large-patch14-336."""
    download = model.clip_download()
    if not os.path.isfile(folder / "config.json"):
        raise NanogapError(f"{folder} has no config.json, so it is no CLIP; get it with {download}")
    vision, text, width = read_clip_config(folder)
    channels = model.config.vision.hidden_size
    if vision.hidden_size != channels:
        raise NanogapError(f"{folder} is a CLIP of {vision.hidden_size} channels, and the vision "
                           f"tower has {channels}: give the CLIP that it comes from")
    with torch.device("meta"):
        clip = CLIP(vision, text, width)
    del clip.vision_model, clip.logit_scale             # the model has a vision tower of its own
    load_into(clip, folder, device, dtype, download, unused=r"^vision_model\.|^logit_scale$")
    return TextGuide(clip, read_tokenizer(folder, text.vocab_size))


def load_into(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype,
              download: str, rename: Sequence[tuple[str, str]] = (),
              tied: dict[str, str] | None = None, unused: str = "$^") -> None:
    """Give a model on the meta device the tensors of a checkpoint, all of them and no others.

    download: the command that gets the checkpoint, for errors
    rename:   patterns from names on disk to names of modules
    tied:     names that may be missing, and the tensors that they share
    unused:   pattern of names on disk that are known and not a part of the model
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    tensors = tensors_of(folder, shapes, device, dtype, rename, re.compile(unused), download)
    for name, other in (tied or {}).items():
        if name not in tensors and other in tensors:
            tensors[name] = tensors[other]
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise NanogapError(f"{folder} lacks {len(missing)} of {len(shapes)} tensors, such as "
                           f"{missing[0]}; download it again")
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(False).eval()


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu"]
    if torch.cuda.is_available():
        there.append("cuda")
    if torch.backends.mps.is_available():
        there.append("mps")
    try:
        if torch.device(device).type in there:
            return torch.device(device)
    except RuntimeError:   # torch knows no device of that name
        pass
    raise NanogapError(f"device {str(device):.80} is not available here; "
                       f"choose from {', '.join(there)}")


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
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); "
                           "download it again") from None
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise NanogapError(f"{path} has more tokens than the model has embeddings "
                           f"({rows}): it belongs to another checkpoint")
    return tokenizer


def check_image_token(folder: Path, config: Any, tokenizer: Tokenizer) -> None:
    """Refuse an image token that words could spell: a prompt might hold it twice."""
    image = config.image_token
    taken = tokenizer.id_to_token(image)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if image == config.bos_token or (taken and image not in special):
        raise NanogapError(f"config.json: image_token_index is {image}, which stands for "
                           f"{taken!r:.80} in {folder / 'tokenizer.json'}, so a prompt could hold "
                           "it twice; download both again")


def shards(folder: Path, download: str) -> list[Path]:
    """The files of a checkpoint's tensors: one, or those that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        for name in ("model.safetensors", "pytorch_model.bin"):   # OpenAI's CLIP has the latter
            if (folder / name).is_file():
                return [folder / name]
        raise NanogapError(f"{folder} holds no model.safetensors and no index of shards; "
                           f"get the weights with {download}")
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


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file; its mapping lasts as long as any tensor that was taken from it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise NanogapError(f"{path} is cut off or broken ({one_line(error)}); "
                           "download it again") from None


def unpickle(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that torch.save wrote, mapped into memory; no code in it is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(map(torch.is_tensor, state.values())):
            raise ValueError("it holds more than tensors")
        return {str(name): tensor for name, tensor in state.items()}
    except Exception as error:   # an unpickler raises almost anything
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); "
                           "download it again") from None


class Shard:
    """One file of a checkpoint: the names of its tensors, and each tensor, mapped into memory.

    Tensors that stay as they are share one mapping.  One that will be converted gets its own, which
    ends with it and gives its pages back: there is one copy in memory, never two.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.path = path
        self.shared: dict[str, Tensor] = {}
        if path.suffix == ".bin":
            self.shared = unpickle(path)
            self.all = list(self.shared)
            return
        with open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        self.all = list(tensors)
        for name, tensor in tensors.items():
            if (tensor.device, tensor.dtype) == (device, dtype):
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


def printable(name: str) -> str:
    """A name from a file, which may hold anything, so that it fits on one line of a message."""
    return ascii(name)[1:-1][:200]


def tensors_of(folder: Path, shapes: dict[str, torch.Size], device: torch.device,
               dtype: torch.dtype, rename: Sequence[tuple[str, str]], unused: re.Pattern[str],
               download: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint under our names, each of the shape that the model expects."""
    tensors: dict[str, Tensor] = {}
    others = "the file and config.json belong to different checkpoints"
    for path in shards(folder, download):
        shard = Shard(path, device, dtype)
        for name in shard.names():
            if UNUSED.search(name) or unused.search(name):
                continue
            ours = our_name(name, rename)
            if ours not in shapes:
                raise NanogapError(f"{path} holds {printable(name)}, which is not a part of this "
                                   f"model: {others}")
            if ours in tensors:
                raise NanogapError(f"{path} holds {printable(name)}, which was there before under "
                                   "another name")
            tensor = shard.get(name)
            if tensor.shape != shapes[ours] or not tensor.is_floating_point():
                raise NanogapError(f"{path}: {printable(name)} is {tensor.dtype} "
                                   f"{list(tensor.shape)}, and config.json makes it "
                                   f"{list(shapes[ours])}: {others}")
            tensors[ours] = moved(tensor, device, dtype)
    return tensors


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor on the device of the model, in its precision; as it is where it has both."""
    try:
        return tensor.to(device, dtype)
    except RuntimeError as error:   # torch.OutOfMemoryError is one
        raise NanogapError(f"{device} has no room for the model in {dtype} ({one_line(error)}); "
                           "choose another device or dtype") from None


# ----- writing ------------------------------------------------------------------------------------


def save_tensors(path: Path, module: nn.Module, dtype: torch.dtype) -> None:
    """Write a module's tensors, `vision_tower.` with the published `vision_model.` behind it."""
    state = {}
    for name, value in module.state_dict().items():
        published = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
        state[published] = value.detach().to("cpu", dtype)
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


def save_clip(folder: Path, clip: CLIP, tokenizer: Tokenizer,
              dtype: torch.dtype = torch.bfloat16) -> None:
    """Write both towers in the layout of openai/clip-vit-large-patch14-336."""
    folder.mkdir(parents=True, exist_ok=True)
    start = tokenizer.token_to_id("<|startoftext|>")
    end = tokenizer.token_to_id("<|endoftext|>")
    width = clip.visual_projection.out_features
    shared = {"projection_dim": width, "hidden_act": "quick_gelu"}
    tokens = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    text = asdict(clip.text_model.config) | shared | tokens
    vision = asdict(clip.vision_model.config) | shared
    write_json(folder / "config.json", {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "text_config": text | {"model_type": "clip_text_model"},
        "vision_config": vision | {"model_type": "clip_vision_model"}})
    tokenizer.save(str(folder / "tokenizer.json"))
    save_tensors(folder / "model.safetensors", clip, dtype)
