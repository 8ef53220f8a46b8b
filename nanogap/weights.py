"""Checkpoints: from a folder with config.json and safetensors to a model, strictly, and back.

In:  a folder in a published layout of one of nanogap/models.  Out: a model.

Every tensor on disk must be known and of the right shape, and none may be missing.  The model is
built without memory (meta device) and takes the memory-mapped tensors as they are: one copy in all.
Source: the layouts and defaults that transformers 5.23 reads.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import TensorSpec, serialize_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap.checks.checkpoint import (
    Shard,
    checkpoint_folder,
    other_form,
    printable,
    refuse_adapter,
    refuse_other_form,
    weight_files,
)
from nanogap.checks.command import NanogapError, shown
from nanogap.checks.config import (
    one_line,
    own_layout,
    read_clip_config,
    read_json,
    section,
    write_json,
)
from nanogap.checks.tokenizer import check_clip_ends, check_image_token, read_tokenizer
from nanogap.clip import CLIP, CLIPVisionConfig, TextGuide
from nanogap.fast.packed import pack
from nanogap.models import MODELS, VLM, plainly

HERE = Path(__file__).resolve().parent.parent / "weights"
REAL = HERE / "llava-1.5-7b-hf"
MINI = HERE / "mini"
DOWNLOAD = MODELS["llava"].download
SAMPLE = 1024        # numbers of each matrix by which two vision towers are compared
FARTHEST = 0.3       # of the sum of their norms; those of two trainings are 0.7 apart
UNUSED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")       # in older files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_weights() -> Path:
    """The real ones where they are present, else those that ship; relative where that is short."""
    weights = REAL if REAL.is_dir() else MINI
    if weights.is_relative_to(Path.cwd()):
        return weights.relative_to(Path.cwd())
    return weights


def our_name(name: str, rename: Sequence[tuple[str, str]]) -> str:
    """The module path of a published tensor name, `model.language_model.norm.weight`; or back."""
    for pattern, replacement in rename:
        name = re.sub(pattern, replacement, name)
    return name


@plainly
def load(folder: str | Path, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, clip: str | Path | None = None,
         packed: bool = False) -> VLM:
    """Load a checkpoint, ready to ground; config.json says which family of nanogap/models it is.

    folder: config.json, tokenizer.json and model.safetensors, or shards with their index
    device: None takes CUDA where there is one, else the CPU
    dtype:  None takes the checkpoint's own on a GPU; on a CPU float32, or bfloat16 for a model of
            more than two billion parameters; `model.device` and `model.dtype` say which it was
    clip:   folder of the CLIP that the vision tower comes from, for strategies that read the
            expression; None takes `clip_text` in the folder, if it is there
    packed: faster on a CPU, for twice the memory (packed.py)
    raises: NanogapError where anything is missing, broken, unknown or of another shape
    """
    folder = checkpoint_folder(as_path(folder))
    refuse_adapter(folder)
    family = family_of(folder)
    config = family.read_config(folder)
    with torch.device("meta"):
        model = family(config)
    device = pick_device(device)
    size = sum(p.numel() for p in model.parameters())
    dtype = pick_dtype(dtype, device, config.dtype, size)
    model.tokenizer = read_tokenizer(folder, config.text.vocab_size)
    check_image_token(folder / "tokenizer.json", model.tokenizer, config.image_token,
                      config.bos_token)
    tied = {}
    if config.text.tie_word_embeddings:
        tied["language_model.lm_head.weight"] = "language_model.model.embed_tokens.weight"
    load_into(model, folder, device, dtype, family.download, family.rename, tied,
              fitted=family.fitted)
    if packed:
        pack(model)
    if clip is None and os.path.isdir(folder / "clip_text"):
        clip = folder / "clip_text"
    if clip is not None:
        model.text_guide = load_text_guide(as_path(clip), model, device, dtype)
    return model


def as_path(folder: str | Path) -> Path:
    """A path, whatever stands there."""
    if not isinstance(folder, str | Path) or folder == "":
        raise NanogapError(f"a checkpoint is a folder, and {shown(folder)} names none: give its "
                           f"path, such as {MINI}")
    try:
        Path(folder).exists()
    except (OSError, ValueError) as error:   # no folder can have that name
        raise NanogapError(f"{folder!s:.80} cannot be read ({one_line(error):.80}); give the path "
                           f"of a folder, such as {MINI}") from None
    return Path(folder)


def family_of(folder: Path) -> type[VLM]:
    """Which of MODELS a folder holds, by the `model_type` in its config.json."""
    if not os.path.exists(folder / "config.json"):
        what = "is not a folder"
        if os.path.isdir(folder):
            what = "has no config.json, so it is not a checkpoint"
        raise NanogapError(other_form(folder) or
                           f"{folder} {what}; get the published weights with {DOWNLOAD}, or take "
                           "some that come with nanogap, such as weights/mini")
    config = read_json(folder / "config.json")
    found = config.get("model_type")
    if own_layout(config) and found not in MODELS:   # LLaVA's own has other names as well
        found = "llava"
    if not isinstance(found, str) or found not in MODELS:
        known = ", ".join(map(repr, MODELS))
        raise NanogapError(f"{folder / 'config.json'} describes a {found!r:.80} model; "
                           f"nanogap loads {known} (in the layout of llava-hf)")
    return MODELS[found]


def load_text_guide(folder: Path, model: VLM, device: torch.device,
                    dtype: torch.dtype) -> TextGuide:
    """Text tower and projections of a CLIP, in the layout of openai/clip-vit-large-patch14-336."""
    folder, download = checkpoint_folder(folder), model.clip_download()
    refuse_adapter(folder)
    if not os.path.exists(folder / "config.json"):
        raise NanogapError(other_form(folder) or
                           f"{folder} has no config.json, so it is no CLIP; get it with {download}")
    vision, text, width = read_clip_config(folder)
    check_sizes(folder, vision, model.config.vision)
    tokenizer = read_tokenizer(folder, text.vocab_size)
    ends = section(read_json(folder / "config.json"), "text_config")
    check_clip_ends(folder / "tokenizer.json", tokenizer, ends.get("eos_token_id"))
    with torch.device("meta"):
        clip = CLIP(vision, text, width)
    del clip.vision_model, clip.logit_scale             # the model has a vision tower of its own
    load_into(clip, folder, device, dtype, download, unused=r"^vision_model\.|^logit_scale$")
    check_tower(folder, model, download)
    return TextGuide(clip, tokenizer)


def check_sizes(folder: Path, found: CLIPVisionConfig, expected: CLIPVisionConfig) -> None:
    """A CLIP of another size is not the one that the vision tower comes from."""
    for field in fields(expected):
        theirs, ours = getattr(found, field.name), getattr(expected, field.name)
        if theirs != ours:
            raise NanogapError(f"{folder} is a CLIP of {field.name} {theirs}, and the vision "
                               f"tower has {ours}: give the CLIP that it comes from")


def check_tower(folder: Path, model: VLM, download: str) -> None:
    """Nor is one of other weights: the beginning of each of the tower's matrices is compared.

    Precisions may differ, and the tower may have been trained a little with the rest.
    """
    tower = model.get_submodule("vision_tower")
    ours = {f"vision_model.{name}": value for name, value in tower.named_parameters()
            if value.dim() > 1}
    for path in weight_files(folder, download):
        shard = Shard(path, torch.device("cpu"))
        for name in set(shard.names()) & set(ours):
            a = shard.get(name).flatten()[:SAMPLE].float()
            b = ours.pop(name).flatten()[:SAMPLE].cpu().float()
            near = len(a) == len(b) and (a - b).norm() <= FARTHEST * (a.norm() + b.norm())
            if not near:
                raise NanogapError(f"{folder} is a CLIP of other weights than the vision tower's "
                                   f"({path.name}: {name}); get the one that it comes from with "
                                   f"{download}")
    if ours:
        raise NanogapError(f"{folder} lacks {len(ours)} matrices of CLIP's vision tower, by which "
                           f"it would be known again; get it whole with {download}")


def load_into(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype,
              download: str, rename: Sequence[tuple[str, str]] = (),
              tied: dict[str, str] | None = None, unused: str = "$^",
              fitted: Callable[[str, Tensor, torch.Size], Tensor] = VLM.fitted) -> None:
    """Give a model on the meta device the tensors of a checkpoint, all of them and no others.

    download: the command that gets the checkpoint, for errors
    rename:   patterns from names on disk to names of modules
    tied:     names that may be missing, and the tensors that they share
    unused:   pattern of names on disk that are known and not a part of the model
    fitted:   a tensor of another shape as the model holds it, if that can be
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    tensors = tensors_of(folder, shapes, device, dtype, rename, re.compile(unused), download,
                         fitted)
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
    except (RuntimeError, TypeError, ValueError):   # torch knows no device of that name
        pass
    raise NanogapError(f"device {printable(str(device)):.80} is not available here; "
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
        raise NanogapError(f"unknown dtype {printable(str(dtype)):.80}; choose from "
                           f"{', '.join(DTYPES)}")
    return DTYPES[name]


# ----- reading ------------------------------------------------------------------------------------


def tensors_of(folder: Path, shapes: dict[str, torch.Size], device: torch.device,
               dtype: torch.dtype, rename: Sequence[tuple[str, str]], unused: re.Pattern[str],
               download: str,
               fitted: Callable[[str, Tensor, torch.Size], Tensor]) -> dict[str, Tensor]:
    """All tensors of a checkpoint under our names, each of the shape that the model expects."""
    tensors: dict[str, Tensor] = {}
    others = "the file and config.json belong to different checkpoints"
    for path in weight_files(folder, download):
        shard = Shard(path, device, dtype)
        for name in shard.names():
            if UNUSED.search(name) or unused.search(name):
                continue
            ours = our_name(name, rename)
            if ours not in shapes:
                refuse_other_form(path, name, shard.get(name))
                raise NanogapError(f"{path} holds {printable(name)}, which is not a part of this "
                                   f"model: {others}")
            if ours in tensors:
                raise NanogapError(f"{path} holds {printable(name)}, which was there before under "
                                   "another name")
            tensor = shard.get(name)
            if tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool:
                refuse_other_form(path, name, tensor)
            if tensor.is_floating_point():
                tensor = fitted(ours, tensor, shapes[ours])
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


def save_tensors(path: Path, module: nn.Module, dtype: torch.dtype,
                 rename: Sequence[tuple[str, str]] = ()) -> None:
    """Write a module's tensors; rename: patterns from names of modules to names on disk."""
    state = {our_name(name, rename): value.detach().to("cpu", dtype)
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
    save_tensors(folder / "model.safetensors", model, dtype, model.on_disk)


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
