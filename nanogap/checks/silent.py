"""What would load, and answer otherwise in silence: one table, and one call.

In:  a checkpoint's folder.  Out: nothing, or the key that nanogap does not follow.

transformers reads more keys than are implemented here.  One that would change an answer is refused
by its name where it says anything else than what is done here; the others change nothing.  Only
the small files are read, so what is refused is refused before 14 GB are.
Source: transformers 5.23.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nanogap import weights
from nanogap.checks.reading import optional, read_json
from nanogap.checks.template import Chat, check_template
from nanogap.clip import CLIPTextConfig, CLIPVisionConfig
from nanogap.errors import NanogapError
from nanogap.llama import LlamaConfig
from nanogap.llava import SYSTEM, LlavaConfig
from nanogap.models import MODELS
from nanogap.models.eva import VIT_G_14

Table = dict[str, tuple]        # key -> the values that change nothing; the first is what is done
NOTHING: tuple = (None, [], {})
KINDS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
DECODER: Table = {
    "model_type": ("llama",), "hidden_act": ("silu", "swish"), "attention_bias": (False,),
    "mlp_bias": (False,), "partial_rotary_factor": (1,)}
VISION: Table = {"model_type": ("clip_vision_model",), "hidden_act": ("quick_gelu",),
                 "num_channels": (3,)}
LLAVA: Table = {"projector_hidden_act": ("gelu",), "vision_feature_select_strategy": ("default",),
                "auto_map": (None, {})}
# greedy decoding, of all words alike, up to an end token
GENERATION: Table = {
    "do_sample": (False,), "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0,),
    "penalty_alpha": (None, 0), "dola_layers": NOTHING, "guidance_scale": (None, 1),
    "repetition_penalty": (1,), "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": NOTHING, "force_words_ids": NOTHING, "constraints": NOTHING,
    "forced_bos_token_id": NOTHING, "forced_eos_token_id": NOTHING,
    "forced_decoder_ids": NOTHING, "suppress_tokens": NOTHING, "begin_suppress_tokens": NOTHING,
    "sequence_bias": NOTHING, "exponential_decay_length_penalty": NOTHING,
    "watermarking_config": NOTHING, "stop_strings": NOTHING, "token_healing": (False,),
    "min_length": (0,), "min_new_tokens": (None, 0)}
# a picture is padded to a square, so the crop that follows in transformers takes nothing away
PIXELS: Table = {
    "do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,),
    "resample": (3, "bicubic"), "do_reduce_labels": (False,), "do_flip_channel_order": (False,),
    "image_processor_type": tuple(f"{name}{kind}" for name in ("CLIP", "Llava") for kind in KINDS),
    "feature_extractor_type": ("CLIPFeatureExtractor", "CLIPImageProcessor")}
TOKENIZER: Table = {"add_bos_token": (True,), "add_eos_token": (False,)}
PROCESSOR: Table = {"vision_feature_select_strategy": ("default",)}

ADAPTER = ("holds an adapter (LoRA), which is a change to another model's weights; merge it into "
           "its base with `merge_and_unload()` of peft, and save that with save_pretrained")
QUANTISED = ("holds quantised weights, and nanogap reads float32, bfloat16 and float16; give the "
             "checkpoint that they were made from, or save the `dequantize()` of transformers")


@dataclass(frozen=True)
class Family:
    """What a checkpoint of one `model_type` may say."""

    top: Table
    chats: dict[str, Chat]     # by the model_type of its decoder
    vision: Table
    pixels: Table


OF_1_6 = MODELS["llava_next"].template.before.removesuffix(" USER: ")
VICUNA = Chat("Vicuna", ("ASSISTANT", "USER"), (SYSTEM, OF_1_6))
OF_1_5 = Family(LLAVA, {"llama": VICUNA}, VISION, PIXELS)
FAMILIES = {
    "llava": OF_1_5,
    "llava_next": Family(
        LLAVA | {"use_image_newline_parameter": (True,)},
        {"llama": VICUNA, "mistral": Chat("Mistral", ("INST", "SYS"))}, VISION,
        PIXELS | {"aspect_ratio_setting": ("anyres",), "image_processor_type":
                  tuple(f"LlavaNext{kind}" for kind in KINDS[:3])}),
    "shikra": OF_1_5,
    "minigpt_v2": Family(
        {"auto_map": (None, {})}, {"llama": Chat("Llama-2", ("INST", "SYS", "Img"))},
        {"model_type": ("eva_vit_g",), "hidden_act": ("gelu",), "num_channels": (3,)}, PIXELS)}
# far above any model, so that a broken number makes no model that nobody could hold
HIGHEST = {"num_hidden_layers": 1 << 8, "image_size": 1 << 12, "patch_size": 1 << 12,
           "vocab_size": 1 << 22, "max_position_embeddings": 1 << 22}
WIDEST, LAYERS, HUGE = 1 << 17, 1 << 8, 1 << 22


def silent(folder: Path) -> None:
    """Refuse what a checkpoint of one of MODELS says and nanogap does not follow.

    raises: NanogapError that names the file and the key, or the file that cannot be read
    """
    refuse_adapter(folder)
    config = read_json(folder / "config.json")
    refuse_quantised(folder, config, config.get("text_config"))
    family = FAMILIES[config["model_type"]]
    text, vision = section(config, "text_config"), section(config, "vision_config")
    kind = text.get("model_type")
    require_all(config, family.top)
    require_all(text, DECODER | {"model_type": tuple(family.chats)})
    require_all(vision, family.vision)
    check_numbers(text, LlamaConfig)
    check_numbers(vision, CLIPVisionConfig)
    check_rope(text)
    if config["model_type"] == "minigpt_v2":
        check_eva(vision)
    generation = optional(folder / "generation_config.json")
    file, processor = read_processor(folder)
    for key, least in (("image_mean", 0.0), ("image_std", None)):
        check_triple(processor.get(key), f"{file}: {key}", least)
    read = weights.read_config(folder, MODELS[config["model_type"]])
    check_parts(config, text, read)
    if kind == "mistral" and text.get("sliding_window") is not None:
        window, longest = text["sliding_window"], read.text.max_position_embeddings
        if not (isinstance(window, int) and window >= longest):
            require("config.json", text, "sliding_window", None)
    if kind in family.chats or kind is None:
        require_all(optional(folder / "tokenizer_config.json"), TOKENIZER, "tokenizer_config.json")
        check_template(folder, family.chats[kind or "llama"])
    check_ends(generation, config, text, read.text.vocab_size)
    check_pixels(file, processor, config, family.pixels, read.vision)
    require_all(optional(folder / "processor_config.json"),
                PROCESSOR | {"patch_size": (read.vision.patch_size,)}, "processor_config.json")


def refuse_adapter(folder: Path) -> None:
    """An adapter beside a model would change its answers, so it is not passed over."""
    if (folder / "adapter_config.json").is_file():
        raise NanogapError(f"{folder} {ADAPTER}")


def refuse_quantised(folder: Path, *parts: Any) -> None:
    """Weights in 4 or 8 bits are no tensors of the model's shapes."""
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(key):
                raise NanogapError(f"{folder} {QUANTISED} (config.json: {key})")


# ----- one key ------------------------------------------------------------------------------------


def section(config: dict, key: str) -> dict:
    """A part of config.json; empty where the key is missing or null."""
    part = config.get(key)
    if part is not None and not isinstance(part, dict):
        raise NanogapError(f"config.json: {key} is not an object")
    return part or {}


def require(file: str, part: dict, key: str, *values: object) -> None:
    """Refuse a variant that is not implemented here; the first of the values is the default."""
    found = part.get(key, values[0])
    if found is not None and found not in values:
        raise NanogapError(f"{file}: {key} is {found!r:.80}; nanogap implements {values[0]!r} only")


def require_all(part: dict, table: Table, file: str = "config.json") -> None:
    """The same for each key of a table."""
    for key, values in table.items():
        require(file, part, key, *values)


def check_integer(part: dict, key: str, high: int = WIDEST, low: int = 1) -> None:
    """A whole number from `low` to `high`, where there is one."""
    value = part.get(key)
    if value is not None and not (type(value) is int and low <= value <= high):
        raise NanogapError(f"config.json: {key} is {value!r:.80}, not a whole number "
                           f"from {low} to {high}")


def check_numbers(part: dict, kind: type) -> None:
    """Every number that a configuration reads."""
    for one in fields(kind):
        value = part.get(one.name)
        if one.type is int:
            check_integer(part, one.name, HIGHEST.get(one.name, WIDEST))
        elif one.type is float and value is not None:
            if type(value) not in (int, float) or not 0 < value < 1e12:
                raise NanogapError(f"config.json: {one.name} is {value!r:.80}, not a positive "
                                   "number")


# ----- config.json --------------------------------------------------------------------------------


def check_rope(text: dict) -> None:
    """Scaled positions are refused, in each of their spellings."""
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = section(text, key)
    kind = rope.get("rope_type", rope.get("type"))
    require("config.json", {"rope_type": kind}, "rope_type", "default", "linear")
    factor = rope.get("factor")
    scaled = factor is not None and factor != 1 and kind != "default"
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if scaled or by_layer:
        raise NanogapError(f"config.json: {key} is {rope!r:.80}; nanogap implements None only")
    require("config.json", rope, "partial_rotary_factor", 1)
    check_numbers(rope, LlamaConfig)


def check_eva(vision: dict) -> None:
    """Of a tower of other sizes than the published one nothing can be guessed."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "image_size", "patch_size")
    if any(vision.get(key, getattr(VIT_G_14, key)) != getattr(VIT_G_14, key) for key in sizes):
        missing = [key for key in sizes if vision.get(key) is None]
        if missing:
            raise NanogapError(f"config.json: vision_config has no {missing[0]}, and other sizes "
                               "than MiniGPT-v2's tower; write it there, or convert the pieces "
                               "again with `python -m nanogap.convert minigpt-v2`")


def check_parts(config: dict, text: dict, read: LlavaConfig) -> None:
    """Parts of config.json that do not go together."""
    heads, of_values, width = (read.text.num_attention_heads, read.text.num_key_value_heads,
                               read.text.head_dim)
    if heads % of_values or width % 2 or not width:
        raise NanogapError(f"config.json: {heads} attention heads of {width} channels do "
                           f"not go with {of_values} key-value heads and RoPE")
    vision = read.vision
    if vision.hidden_size % vision.num_attention_heads or vision.grid < 1:
        raise NanogapError(f"config.json: vision_config makes no sense: {vision}")
    check_integer(config, "vision_feature_layer", LAYERS, -LAYERS)
    layer, layers = read.vision_feature_layer, vision.num_hidden_layers
    if "vision_feature_layer" in config and not (
            0 < (layer if layer >= 0 else layer + layers + 1) < layers):
        raise NanogapError(f"config.json: vision_feature_layer is {layer}; it must leave a "
                           f"layer before and after the features, of {layers}")
    tokens = {key: config[key] for key in ("image_token_index", "image_token_id")
              if config.get(key) is not None}
    for key in tokens:
        check_integer(config, key, HUGE, 0)
    if len(set(tokens.values())) > 1:
        raise NanogapError(f"config.json: {tokens} name two image tokens; leave one of them")
    check_integer(text, "bos_token_id", read.text.vocab_size - 1, 0)


def check_ends(generation: dict, config: dict, text: dict, rows: int) -> None:
    """What changes words, and the tokens that end an answer.

    source: transformers takes generation_config.json where there is one, or else config.json, the
            whole model's keys before those of the decoder
    """
    file, settings = "config.json", text | {k: v for k, v in config.items() if v is not None}
    if generation:
        file, settings = "generation_config.json", generation
    require_all(settings, GENERATION, file)
    found = settings.get("eos_token_id")
    for end in [] if found is None else found if isinstance(found, list) and found else [found]:
        if type(end) is not int or not 0 <= end < rows:
            raise NanogapError(f"{file}: eos_token_id is {end!r:.80}, not a whole number "
                               f"from 0 to {rows - 1}")


# ----- pixels -------------------------------------------------------------------------------------


def read_processor(folder: Path) -> tuple[str, dict]:
    """preprocessor_config.json, or what transformers 5 has in its place; and where that stands."""
    file = "processor_config.json"
    found = optional(folder / file).get("image_processor")
    if found is None:
        file = "preprocessor_config.json"
        found = optional(folder / file)
    if not isinstance(found, dict):
        raise NanogapError(f"{file}: image_processor is not an object")
    return file, found


def check_pixels(file: str, found: dict, config: dict, known: Table,
                 vision: CLIPVisionConfig) -> None:
    """How pictures become pixels."""
    model = config["model_type"]
    kind, kinds = found.get("image_processor_type"), known["image_processor_type"]
    if kind is not None and kind not in kinds:
        raise NanogapError(f"{file}: image_processor_type is {kind!r:.80}, and a {model!r:.80} "
                           f"(config.json) has {kinds[0]!r}: the files belong to different "
                           "checkpoints")
    require_all(found, known, file)
    for key in ("size", "crop_size")[:1 if found.get("do_center_crop") is False else 2]:
        sides = found.get(key)
        for side in sides.values() if isinstance(sides, dict) else [sides]:
            if side is not None and side != vision.image_size:
                raise NanogapError(f"{file}: {key} is {sides!r:.80}, and the vision tower reads "
                                   f"squares of {vision.image_size} pixels")
    scale = found.get("rescale_factor")
    if scale is not None and not (isinstance(scale, float) and abs(scale * 255 - 1) < 1e-6):
        require(file, found, "rescale_factor", 1 / 255)
    if model == "llava_next":
        check_pinpoints(config, "config.json", vision.image_size)
        check_pinpoints(found, file, vision.image_size)
        theirs, ours = found.get("image_grid_pinpoints"), config.get("image_grid_pinpoints")
        if theirs is not None and ours is not None and theirs != ours:
            raise NanogapError(f"{file}: image_grid_pinpoints are {theirs!r:.80}, and config.json "
                               f"has {ours!r:.80}; one of them is another checkpoint's")


def check_triple(values: Any, where: str, least: float | None) -> None:
    """Three positive numbers, one for each colour; `least`: so low that it may be as well."""
    kinds = {type(value) for value in values} if isinstance(values, list) else set()
    if values is not None and not (kinds and kinds <= {int, float} and len(values) == 3 and all(
            0 < value < 1e6 or value == least for value in values)):
        raise NanogapError(f"{where} is {values!r:.80}, not three positive numbers")


def check_pinpoints(part: dict, file: str, size: int) -> None:
    """(height, width) of canvases: whole squares of `size` pixels, at most ten."""
    found = part.get("image_grid_pinpoints")
    pairs = found if isinstance(found, list) else [found]
    if found is not None and not (found and all(
            isinstance(pair, list) and [type(side) for side in pair] == [int, int]
            and all(0 < side <= 10 * size and side % size == 0 for side in pair)
            for pair in pairs)):
        raise NanogapError(f"{file}: image_grid_pinpoints is {found!r:.80}, and it must be pairs "
                           f"[height, width] of canvases, multiples of {size} pixels")


# ----- a CLIP -------------------------------------------------------------------------------------


def check_clip(folder: Path) -> None:
    """The same of a CLIP whose text tower reads expressions."""
    config = read_json(folder / "config.json")
    for key, kind in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
        part = section(config, key)
        require_all(part, {"hidden_act": ("quick_gelu",)})
        check_numbers(part, kind)
        again = section(config, f"{key}_dict")              # older files say all of it twice
        keys = {one.name for one in fields(kind)} | {"hidden_act"}
        require_all(again, {name: (value,) for name, value in part.items()
                            if name in keys and again.get(name) is not None})
    check_integer(config, "projection_dim")
