"""What would load, and answer otherwise in silence: one table, and one call.

In:  a checkpoint's folder.  Out: nothing, or the key that nanogap does not follow.

transformers reads more keys than are implemented here.  One that would change an answer is refused
by its name where it says anything else than what is done here; the others change nothing.  Only
the small files are read, so what is refused is refused before 14 GB are.
Source: transformers 5.23.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

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
    "penalty_alpha": (None, 0), "guidance_scale": (None, 1), "token_healing": (False,),
    "repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (None, 0),
    **dict.fromkeys((
        "dola_layers", "bad_words_ids", "force_words_ids", "constraints", "forced_bos_token_id",
        "forced_eos_token_id", "forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens",
        "sequence_bias", "exponential_decay_length_penalty", "watermarking_config",
        "stop_strings"), (None, [], {}))}
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
    refuse_quantised(folder, config)
    family = FAMILIES[config["model_type"]]
    text, vision = section(config, "text_config"), section(config, "vision_config")
    require(config, family.top)
    require(text, DECODER | {"model_type": tuple(family.chats)})
    require(vision, family.vision)
    check_numbers(text, LlamaConfig)
    check_numbers(vision, CLIPVisionConfig)
    check_rope(text)
    if config["model_type"] == "minigpt_v2":
        check_eva(vision)
    generation = optional(folder / "generation_config.json")
    file, processor = read_processor(folder)
    check_triple(file, processor, "image_mean", or_zero=True)
    check_triple(file, processor, "image_std")
    read = weights.read_config(folder, MODELS[config["model_type"]])
    check_parts(config, text, read)
    kind = text.get("model_type") or "llama"
    if kind == "mistral":
        window = text.get("sliding_window")
        if type(window) is not int or window < read.text.max_position_embeddings:
            require(text, {"sliding_window": (None,)})
    require(optional(folder / "tokenizer_config.json"), TOKENIZER, "tokenizer_config.json")
    check_template(folder, family.chats[kind])
    check_ends(generation, config, text, read.text.vocab_size)
    check_pixels(file, processor, config, family.pixels, read.vision)
    require(optional(folder / "processor_config.json"),
            PROCESSOR | {"patch_size": (read.vision.patch_size,)}, "processor_config.json")


def refuse_adapter(folder: Path) -> None:
    """An adapter beside a model would change its answers, so it is not passed over."""
    if (folder / "adapter_config.json").is_file():
        raise NanogapError(f"{folder} {ADAPTER}")


def refuse_quantised(folder: Path, config: dict) -> None:
    """Weights in 4 or 8 bits are no tensors of the model's shapes."""
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(key):
                raise NanogapError(f"{folder} {QUANTISED} (config.json: {key})")


# ----- one key ------------------------------------------------------------------------------------


def wrong(file: str, key: str, value: object, why: str) -> NanogapError:
    """The mistake that the value of a key is."""
    return NanogapError(f"{file}: {key} is {value!r:.80}{why}")


def section(config: dict, key: str) -> dict:
    """A part of config.json; empty where the key is missing or null."""
    part = config.get(key)
    if part is not None and not isinstance(part, dict):
        raise NanogapError(f"config.json: {key} is not an object")
    return part or {}


def require(part: dict, table: Table, file: str = "config.json") -> None:
    """Refuse what a table does not list; a key that is missing or null is as nanogap has it."""
    for key, values in table.items():
        found = part.get(key)
        if found is not None and found not in values:
            raise wrong(file, key, found, f"; nanogap implements {values[0]!r} only")


def check_integer(part: dict, key: str, high: int = WIDEST, low: int = 1) -> None:
    """A whole number from `low` to `high`, where there is one."""
    value = part.get(key)
    if value is not None and not (type(value) is int and low <= value <= high):
        raise wrong("config.json", key, value, f", not a whole number from {low} to {high}")


def check_numbers(part: dict, kind: type) -> None:
    """Every number that a configuration reads."""
    for one in fields(kind):
        value = part.get(one.name)
        if one.type is int:
            check_integer(part, one.name, HIGHEST.get(one.name, WIDEST))
        elif one.type is float and value is not None:
            if type(value) not in (int, float) or not 0 < value < 1e12:
                raise wrong("config.json", one.name, value, ", not a positive number")


# ----- config.json --------------------------------------------------------------------------------


def check_rope(text: dict) -> None:
    """Scaled positions are refused, in each of their spellings."""
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = section(text, key)
    kind = rope.get("rope_type", rope.get("type"))
    require({"rope_type": kind}, {"rope_type": ("default", "linear")})
    scaled = rope.get("factor") not in (None, 1) and kind != "default"
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if scaled or by_layer:
        require(text, {key: (None,)})
    require(rope, {"partial_rotary_factor": (1,)})
    check_numbers(rope, LlamaConfig)


def check_eva(vision: dict) -> None:
    """Of a tower of other sizes than the published one nothing can be guessed."""
    sizes = {key: value for key, value in asdict(VIT_G_14).items() if key != "layer_norm_eps"}
    missing = [key for key in sizes if vision.get(key) is None]
    if missing and any(vision.get(key, value) != value for key, value in sizes.items()):
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
    from_below = layer if layer >= 0 else layer + layers + 1
    if "vision_feature_layer" in config and not 0 < from_below < layers:
        raise wrong("config.json", "vision_feature_layer", layer,
                    f"; it must leave a layer before and after the features, of {layers}")
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
    require(settings, GENERATION, file)
    found = settings.get("eos_token_id")
    if found is None:
        return
    for end in found if isinstance(found, list) and found else [found]:
        if type(end) is not int or not 0 <= end < rows:
            raise wrong(file, "eos_token_id", end, f", not a whole number from 0 to {rows - 1}")


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
    model, kinds = config["model_type"], known["image_processor_type"]
    kind = found.get("image_processor_type")
    if kind is not None and kind not in kinds:
        raise wrong(file, "image_processor_type", kind,
                    f", and a {model!r:.80} (config.json) has {kinds[0]!r}: the files belong to "
                    "different checkpoints")
    require(found, known, file)
    for key in ("size", "crop_size")[:1 if found.get("do_center_crop") is False else 2]:
        sides = found.get(key)
        for side in sides.values() if isinstance(sides, dict) else [sides]:
            if side is not None and side != vision.image_size:
                raise wrong(file, key, sides, ", and the vision tower reads squares of "
                                              f"{vision.image_size} pixels")
    scale = found.get("rescale_factor")
    if not (isinstance(scale, float) and abs(scale * 255 - 1) < 1e-6):
        require(found, {"rescale_factor": (1 / 255,)}, file)
    if model == "llava_next":
        check_pinpoints(config, "config.json", vision.image_size)
        check_pinpoints(found, file, vision.image_size)
        theirs, ours = found.get("image_grid_pinpoints"), config.get("image_grid_pinpoints")
        if theirs is not None and ours is not None and theirs != ours:
            raise NanogapError(f"{file}: image_grid_pinpoints are {theirs!r:.80}, and config.json "
                               f"has {ours!r:.80}; one of them is another checkpoint's")


def check_triple(file: str, processor: dict, key: str, or_zero: bool = False) -> None:
    """Three positive numbers, one for each colour."""
    values = processor.get(key)
    if values is not None and not (isinstance(values, list) and len(values) == 3 and all(
            type(value) in (int, float) and (0 < value < 1e6 or or_zero and value == 0)
            for value in values)):
        raise wrong(file, key, values, ", not three positive numbers")


def check_pinpoints(part: dict, file: str, size: int) -> None:
    """(height, width) of canvases: whole squares of `size` pixels, at most ten."""
    found = part.get("image_grid_pinpoints")
    if found is not None and not (isinstance(found, list) and found and all(
            isinstance(pair, list) and [type(side) for side in pair] == [int, int]
            and all(0 < side <= 10 * size and side % size == 0 for side in pair)
            for pair in found)):
        raise wrong(file, "image_grid_pinpoints", found, ", and it must be pairs [height, width] "
                    f"of canvases, multiples of {size} pixels")


# ----- a CLIP -------------------------------------------------------------------------------------


def check_clip(folder: Path) -> None:
    """The same of a CLIP whose text tower reads expressions."""
    config = read_json(folder / "config.json")
    for key, kind in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
        part = section(config, key)
        require(part, {"hidden_act": ("quick_gelu",)})
        check_numbers(part, kind)
        again = section(config, f"{key}_dict")              # older files say all of it twice
        keys = ("hidden_act", *(one.name for one in fields(kind)))
        require(again, {name: (part[name],) for name in keys if name in part})
    check_integer(config, "projection_dim")
