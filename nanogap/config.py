"""config.json: what the published files say, and what they leave out.

In:  a checkpoint's JSON.  Out: the sizes of the parts that models share, every value checked.

The published config of llava-1.5-7b-hf omits most of the decoder's keys, so the defaults are those
of transformers' configuration classes (5.23); what the file does say is read and never guessed.
"""

import json
from dataclasses import asdict
from pathlib import Path

from nanogap.cli import NanogapError
from nanogap.clip import CLIPTextConfig, CLIPVisionConfig
from nanogap.llama import LlamaConfig

# the CLIPVisionConfig of transformers is a ViT-B/32; LLaVA's L/14-336 only without vision_config
VIT_B_32 = CLIPVisionConfig(768, 3072, 12, 12, 224, 32)
TEXT_B_32 = CLIPTextConfig(512, 2048, 12, 8)
# far above any model, so that a broken file makes no model that nobody could hold
LAYERS = 1 << 8
WIDTH = 1 << 17
HUGE = 1 << 22


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    raises: NanogapError where there is no file, or where it holds no JSON, or no object
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); "
                           "download it again") from None
    if not isinstance(value, dict):
        raise NanogapError(f"{path} does not hold a JSON object; download it again")
    return value


def one_line(error: Exception) -> str:
    """What an error says, as a part of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


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


def require(part: dict, key: str, *values: object) -> None:
    """Refuse a variant that is not implemented here; the first of the values is the default."""
    found = part.get(key, values[0])
    if found is not None and found not in values:
        raise NanogapError(f"config.json: {key} is {found!r:.80}; "
                           f"nanogap implements {values[0]!r} only")


def read_decoder(text: dict) -> LlamaConfig:
    """The language model's part of config.json."""
    require(text, "model_type", "llama")
    require(text, "hidden_act", "silu")
    require(text, "attention_bias", False)
    require(text, "mlp_bias", False)
    require(text, "rope_scaling", None)
    rope = section(text, "rope_parameters")                                   # transformers 5
    require(rope, "rope_type", "default")
    hidden = integer(text, "hidden_size", 4096)
    heads = integer(text, "num_attention_heads", 32)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=integer(text, "intermediate_size", 11008),
        num_hidden_layers=integer(text, "num_hidden_layers", 32, LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=integer(text, "num_key_value_heads", heads),
        head_dim=integer(text, "head_dim", max(hidden // heads, 1)),
        vocab_size=integer(text, "vocab_size", 32000, HUGE),
        rms_norm_eps=number(text, "rms_norm_eps", 1e-6),
        rope_theta=number(rope, "rope_theta", number(text, "rope_theta", 10000.0)),
        max_position_embeddings=integer(text, "max_position_embeddings", 2048, HUGE),
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
    vision = section(config, "vision_config")
    require(vision, "model_type", "clip_vision_model")
    require(vision, "hidden_act", "quick_gelu")
    require(vision, "num_channels", 3)
    default = VIT_B_32 if "vision_config" in config else CLIPVisionConfig()
    high = {"num_hidden_layers": LAYERS, "image_size": 1 << 12, "patch_size": 1 << 12}
    read = CLIPVisionConfig(**sizes(vision, default, high),
                            layer_norm_eps=number(vision, "layer_norm_eps", 1e-5))
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
    require(text, "hidden_act", "quick_gelu")
    high = {"num_hidden_layers": LAYERS, "vocab_size": HUGE}
    tower = CLIPTextConfig(**sizes(text, TEXT_B_32, high),
                           layer_norm_eps=number(text, "layer_norm_eps", 1e-5))
    if tower.hidden_size % tower.num_attention_heads:
        raise NanogapError(f"config.json: text_config makes no sense: {tower}")
    return read_vision(config), tower, integer(config, "projection_dim", 512)


def triple(part: dict, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """Three positive numbers, one per colour."""
    values = part.get(key) or default
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise NanogapError(f"preprocessor_config.json: {key} is {values!r:.80}, not three numbers")
    return tuple(number({key: value}, key, 1.0) for value in values)
