"""config.json: what the published files say, and what they leave out.

In:  a checkpoint's JSON.  Out: the sizes of the parts that models share, every value checked.

The published config of llava-1.5-7b-hf omits most of the decoder's keys, so the defaults are those
of transformers' configuration classes (5.23); what the file does say is read and never guessed.
A key that would change an answer is followed or refused by its name; the others change nothing.
"""

import json
import re
import stat
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nanogap.checks.command import lacks_memory
from nanogap.clip import CLIPTextConfig, CLIPVisionConfig
from nanogap.errors import NanogapError
from nanogap.llama import LlamaConfig

# the CLIPVisionConfig of transformers is a ViT-B/32; LLaVA's L/14-336 only without vision_config
VIT_B_32 = CLIPVisionConfig(768, 3072, 12, 12, 224, 32)
TEXT_B_32 = CLIPTextConfig(512, 2048, 12, 8)
CLIP_KEYS = {*asdict(VIT_B_32), *asdict(TEXT_B_32), "hidden_act"}
# far above any model, so that a broken file makes no model that nobody could hold
LAYERS = 1 << 8
WIDTH = 1 << 17
HUGE = 1 << 22
QUANTISED = ("holds quantised weights, and nanogap reads float32, bfloat16 and float16; give the "
             "checkpoint that they were made from, or save the `dequantize()` of transformers")
LONGEST = 1 << 26    # bytes of a JSON file; the largest tokenizer.json that is published has 2^25


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    raises: NanogapError where there is no such file, or where it holds no JSON, or no object
    """
    return parse_json(path, read_text(path))


def parse_json(path: Path, text: str) -> dict:
    """The object in a text that was read from a file."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        step = "download it again" if cut_off else "mend it there, or get it from where it was made"
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); {step}") from None
    except (ValueError, RecursionError) as error:        # a number, or lists in lists, without end
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); "
                           "get it from where it was made") from None
    if not isinstance(value, dict):
        raise NanogapError(f"{path} holds no JSON object but a {type(value).__name__}: "
                           "it is some other file under this name")
    return value


def read_text(path: Path) -> str:
    """The text of a file of a checkpoint: a regular file of a size that a person could look at."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise NanogapError(f"{path} is no regular file; put the checkpoint's own there")
        if found.st_size > LONGEST:
            raise NanogapError(f"{path} has {found.st_size} bytes, more than any file of that "
                               "kind: it is some other file under this name")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); "
                           "save it as UTF-8") from None
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: BaseException) -> NanogapError:
    """The mistake that it is when a file that may be whole cannot be opened or held in memory."""
    if lacks_memory(error):
        return NanogapError(f"there is no room in memory for {path} ({one_line(error)}); "
                            "end other programs, or choose another device or dtype")
    if isinstance(error, PermissionError):
        return NanogapError(f"{path} may not be read by this user; allow it with "
                            f"`chmod u+r {path}`, or run as its owner")
    if isinstance(error, FileNotFoundError):
        return NanogapError(f"{path} cannot be read ({error.strerror}); download it again")
    return NanogapError(f"{path} cannot be read ({one_line(error)}); mend that, and load it again")


def one_line(error: BaseException) -> str:
    """What an error says, as a part of one line."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def printable(text: str) -> str:
    """Text from a file, which may hold anything, so that it fits on one line of a message."""
    return ascii(text)[1:-1][:200]


def write_json(path: Path, value: dict) -> None:
    """A JSON file that a person can read."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def integer(part: dict, key: str, default: int, high: int = WIDTH, low: int = 1) -> int:
    """A whole number from `low` to `high`; the default where the key is missing or null."""
    value = part.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise NanogapError(f"config.json: {key} is {value!r:.80}, not a whole number "
                           f"from {low} to {high}")
    return value


def number(part: dict, key: str, default: float) -> float:
    """A positive number; the default where the key is missing or null."""
    value = part.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
        raise NanogapError(f"config.json: {key} is {value!r:.80}, not a positive number")
    return float(value)


def section(config: dict, key: str) -> dict:
    """A part of config.json; empty where the key is missing or null."""
    part = config.get(key)
    if part is not None and not isinstance(part, dict):
        raise NanogapError(f"config.json: {key} is not an object")
    return part or {}


def require(part: dict, key: str, *values: object, file: str = "config.json") -> None:
    """Refuse a variant that is not implemented here; the first of the values is the default."""
    found = part.get(key, values[0])
    if found is not None and found not in values:
        raise NanogapError(f"{file}: {key} is {found!r:.80}; nanogap implements {values[0]!r} only")


def require_all(part: dict, table: dict[str, tuple], file: str = "config.json") -> None:
    """The same for each key of a table: key -> the values that change nothing."""
    for key, values in table.items():
        require(part, key, *values, file=file)


def own_layout(config: dict) -> str | None:
    """The key that shows LLaVA's own layout, which those of the hub's LLaVAs do not have."""
    keys = [key for key in config if key.startswith("mm_")]
    classes = config.get("architectures")
    if isinstance(classes, list) and any(re.fullmatch(r"Llava\w*ForCausalLM", str(name))
                                         for name in classes):
        keys.append("architectures")
    if config.get("model_type") in ("llava_llama", "llava_mistral", "llava_mpt"):
        keys.append("model_type")
    return "mm_vision_tower" if "mm_vision_tower" in keys else next(iter(keys), None)


def refuse_quantised(folder: Path, *parts: dict) -> None:
    """Weights in 4 or 8 bits are no tensors of the model's shapes."""
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                raise NanogapError(f"{folder} {QUANTISED} (config.json: {key})")


# ----- the parts of a model -----------------------------------------------------------------------

# what would change an answer and is not implemented: key -> the values that change nothing
DECODER = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
           "partial_rotary_factor": (1,)}
# what they leave out, by model_type: a Mistral is a LLaMA with other numbers, and a window
DECODERS: dict[str, dict] = {
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {"intermediate_size": 14336, "max_position_embeddings": 131072,
                "num_key_value_heads": 8}}
WINDOW = 4096        # positions that a token of a Mistral sees where sliding_window is left out
VISION = {"model_type": ("clip_vision_model",), "hidden_act": ("quick_gelu",),
          "num_channels": (3,)}


def read_rope(text: dict) -> float:
    """theta, in each of its spellings; scaled positions are refused.

    source: transformers 5.23, where rope_scaling goes before rope_parameters, and either before
            what stands beside them
    """
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = section(text, key)
    kind = rope.get("rope_type", rope.get("type"))
    require({"rope_type": kind}, "rope_type", "default", "linear")
    factor = rope.get("factor")
    scaled = factor is not None and factor != 1 and kind != "default"
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if scaled or by_layer:
        raise NanogapError(f"config.json: {key} is {rope!r:.80}; nanogap implements None only")
    require(rope, "partial_rotary_factor", 1)
    return number(rope, "rope_theta", number(text, "rope_theta", 10000.0))


def within_window(text: dict, longest: int) -> int:
    """How many positions a Mistral can be asked about: a window that hides some is not implemented.

    null means that there is none; where the key is missing transformers has one of 4096, and a
    prompt that is no longer than that does not meet it.
    """
    if "sliding_window" not in text:
        return min(longest, WINDOW)
    window = text["sliding_window"]
    if window is not None and not (isinstance(window, int) and window >= longest):
        require(text, "sliding_window", None)
    return longest


def read_decoder(text: dict, kinds: Sequence[str] = ("llama",)) -> LlamaConfig:
    """The language model's part of config.json.

    kinds: the model_type that it may have, of DECODERS; the first where it says none
    """
    require(text, "model_type", *kinds)
    require_all(text, DECODER)
    kind = text.get("model_type") or kinds[0]
    text = DECODERS[kind] | text
    hidden = integer(text, "hidden_size", 4096)
    heads = integer(text, "num_attention_heads", 32)
    longest = integer(text, "max_position_embeddings", 2048, HUGE)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=integer(text, "intermediate_size", 11008),
        num_hidden_layers=integer(text, "num_hidden_layers", 32, LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=integer(text, "num_key_value_heads", heads),
        head_dim=integer(text, "head_dim", max(hidden // heads, 1)),
        vocab_size=integer(text, "vocab_size", 32000, HUGE),
        rms_norm_eps=number(text, "rms_norm_eps", 1e-6),
        rope_theta=read_rope(text),
        max_position_embeddings=within_window(text, longest) if kind == "mistral" else longest,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)))
    if heads % config.num_key_value_heads or config.head_dim % 2:
        raise NanogapError(f"config.json: {heads} attention heads of {config.head_dim} channels do "
                           f"not go with {config.num_key_value_heads} key-value heads and RoPE")
    return config


def sizes(part: dict, default: CLIPVisionConfig | CLIPTextConfig,
          high: dict[str, int]) -> dict[str, int]:
    """All whole numbers of a tower; `high`: the highest that some of them may be."""
    return {key: integer(part, key, value, high.get(key, WIDTH))
            for key, value in asdict(default).items() if key != "layer_norm_eps"}


def read_vision(config: dict) -> CLIPVisionConfig:
    """The vision tower's part of config.json."""
    default = VIT_B_32 if "vision_config" in config else CLIPVisionConfig()
    return read_tower(section(config, "vision_config"), VISION, default)


def read_tower(vision: dict, required: dict[str, tuple],
               default: CLIPVisionConfig) -> CLIPVisionConfig:
    """The sizes of a vision tower; what is missing is the default's."""
    require_all(vision, required)
    high = {"num_hidden_layers": LAYERS, "image_size": 1 << 12, "patch_size": 1 << 12}
    read = CLIPVisionConfig(**sizes(vision, default, high),
                            layer_norm_eps=number(vision, "layer_norm_eps",
                                                  default.layer_norm_eps))
    if read.hidden_size % read.num_attention_heads or read.image_size < read.patch_size:
        raise NanogapError(f"config.json: vision_config makes no sense: {read}")
    return read


def read_clip_config(folder: Path) -> tuple[CLIPVisionConfig, CLIPTextConfig, int]:
    """A CLIP's config.json: both towers, and the width of the space that they share."""
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type != "clip":
        raise NanogapError(f"{folder / 'config.json'} describes a {model_type!r:.80} model, "
                           "not a 'clip'")
    text = section(config, "text_config")
    refuse_quantised(folder, config, text)
    require(text, "hidden_act", "quick_gelu")
    for key in ("text_config", "vision_config"):            # older files say all of it twice
        again = section(config, f"{key}_dict")
        require_all(again, {name: (value,) for name, value in section(config, key).items()
                            if again.get(name) is not None and name in CLIP_KEYS})
    high = {"num_hidden_layers": LAYERS, "vocab_size": HUGE}
    tower = CLIPTextConfig(**sizes(text, TEXT_B_32, high),
                           layer_norm_eps=number(text, "layer_norm_eps", 1e-5))
    if tower.hidden_size % tower.num_attention_heads:
        raise NanogapError(f"config.json: text_config makes no sense: {tower}")
    return read_vision(config), tower, integer(config, "projection_dim", 512)
