"""What would load, and answer otherwise in silence: one table, and one call.

In:  a checkpoint's small files.  Out: nothing, or the key that nanogap does not follow.
transformers reads more keys than are implemented here.  One that would change an answer is refused
by its name where it says anything else than what is done here; the others change nothing.
Source: transformers 5.23.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from nanogap import weights
from nanogap.checks.reading import optional, read_bytes, read_json, text_of
from nanogap.clip import CLIPVisionConfig
from nanogap.errors import NanogapError
from nanogap.models import MODELS

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

# words of chat templates that no model here was trained with
OF_OTHERS = re.compile(r"<\|(im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant"
                       r"|system|end)\|>|<(start|end)_of_turn>")
ADAPTER = ("holds an adapter (LoRA), which is a change to another model's weights; merge it into "
           "its base with `merge_and_unload()` of peft, and save that with save_pretrained")
QUANTISED = ("holds quantised weights, and nanogap reads float32, bfloat16 and float16; give the "
             "checkpoint that they were made from, or save the `dequantize()` of transformers")
OTHER_CHAT = ("another chat template than the model's, and nanogap asks in that only: a model that "
              "was trained with another would answer worse")
OWN_LAYOUT = ("is in LLaVA's own layout, and nanogap reads that of llava-hf; convert it with "
              "`python -m nanogap.convert llava --base {folder} --clip DIR --out DIR`")


@dataclass(frozen=True)
class Family:
    """What a checkpoint of one `model_type` may say."""

    top: Table
    turns: dict[str, str]      # by the model_type of its decoder: a word of its chat template
    vision: Table
    pixels: Table


OF_1_5 = Family(LLAVA, {"llama": "ASSISTANT"}, VISION, PIXELS)
FAMILIES = {
    "llava": OF_1_5,
    "llava_next": Family(
        LLAVA | {"use_image_newline_parameter": (True,)},
        {"llama": "ASSISTANT", "mistral": "[INST]"}, VISION,
        PIXELS | {"aspect_ratio_setting": ("anyres",), "image_processor_type":
                  tuple(f"LlavaNext{kind}" for kind in KINDS[:3])}),
    "shikra": OF_1_5,
    "minigpt_v2": Family(
        {"auto_map": (None, {})}, {"llama": "[INST]"},
        {"model_type": ("eva_vit_g",), "hidden_act": ("gelu",), "num_channels": (3,)}, PIXELS)}


def silent(folder: Path) -> None:
    """Refuse what a checkpoint of one of MODELS says and nanogap does not follow.

    raises: NanogapError that names the file and the key
    """
    refuse_adapter(folder)
    config = read_json(folder / "config.json")
    refuse_quantised(folder, config)
    family = FAMILIES[config["model_type"]]
    text = config.get("text_config") or {}
    require(config, family.top)
    require(text, DECODER | {"model_type": tuple(family.turns)})
    require(config.get("vision_config") or {}, family.vision)
    check_rope(text)
    generation = optional(folder / "generation_config.json")
    file, processor = read_processor(folder)
    read = weights.read_config(folder, MODELS[config["model_type"]])
    check_image_token(config)
    check_layer(config, read.vision.num_hidden_layers)
    kind = text.get("model_type") or "llama"
    window = text.get("sliding_window")
    if kind == "mistral" and window is not None and window < read.text.max_position_embeddings:
        require(text, {"sliding_window": (None,)})
    require(optional(folder / "tokenizer_config.json"), TOKENIZER, "tokenizer_config.json")
    check_template(folder, family.turns[kind])
    check_ends(generation, config, text, read.text.vocab_size)
    check_pixels(file, processor, config, family.pixels, read.vision)
    require(optional(folder / "processor_config.json"),
            PROCESSOR | {"patch_size": (read.vision.patch_size,)}, "processor_config.json")


def say(folder: Path, text: str) -> str:
    """A text about a folder; the command in it can be pasted."""
    return f"{folder} {text.replace('{folder}', shlex.quote(str(folder)))}"


def refuse_adapter(folder: Path) -> None:
    """An adapter beside a model would change its answers, so it is not passed over."""
    if (folder / "adapter_config.json").is_file():
        raise NanogapError(f"{folder} {ADAPTER}")


def refuse_quantised(folder: Path, config: dict) -> None:
    """Weights in 4 or 8 bits are no tensors of the model's shapes."""
    for part in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                raise NanogapError(f"{folder} {QUANTISED} (config.json: {key})")


def wrong(file: str, key: str, value: object, why: str) -> NanogapError:
    """The mistake that the value of a key is."""
    return NanogapError(f"{file}: {key} is {value!r:.80}{why}")


def require(part: dict, table: Table, file: str = "config.json") -> None:
    """Refuse what a table does not list; a key that is missing or null is as nanogap has it."""
    for key, values in table.items():
        found = part.get(key)
        if found is not None and found not in values:
            raise wrong(file, key, found, f"; nanogap implements {values[0]!r} only")


# ----- config.json --------------------------------------------------------------------------------


def check_rope(text: dict) -> None:
    """Scaled positions are refused, in each of their spellings."""
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = text.get(key) or {}
    kind = rope.get("rope_type", rope.get("type"))
    require({"rope_type": kind}, {"rope_type": ("default", "linear")})
    scaled = rope.get("factor") not in (None, 1) and kind != "default"
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if scaled or by_layer:
        require(text, {key: (None,)})
    require(rope, {"partial_rotary_factor": (1,)})


def check_image_token(config: dict) -> None:
    """It is the ID of a token; LLaVA's own code has -200."""
    for key in ("image_token_index", "image_token_id"):
        if config.get(key) is not None and config[key] not in range(1 << 22):
            raise wrong("config.json", key, config[key], ", not the ID of a token")


def check_layer(config: dict, layers: int) -> None:
    """The tower's layer whose features are taken: neither the first nor the last."""
    layer = config.get("vision_feature_layer")
    if layer is not None and layer not in (*range(-layers, -1), *range(1, layers)):
        raise wrong("config.json", "vision_feature_layer", layer,
                    f"; it must leave a layer before and after the features, of {layers}")


def check_ends(generation: dict, config: dict, text: dict, rows: int) -> None:
    """What changes words, and the tokens that end an answer.

    source: transformers takes generation_config.json where there is one, or else config.json, the
            whole model's keys before those of the decoder
    """
    file, settings = "generation_config.json", generation
    if not generation:
        file = "config.json"
        settings = text | {key: value for key, value in config.items() if value is not None}
    require(settings, GENERATION, file)
    ends = settings.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and end not in range(rows):
            raise wrong(file, "eos_token_id", end, f", not a whole number from 0 to {rows - 1}")


def check_template(folder: Path, turn: str) -> None:
    """Refuse another chat template than the model's, where transformers would find one.

    turn: a word of the model's own
    """
    path = folder / "chat_template.jinja"
    template = text_of(path, read_bytes(path)) if path.exists() else ""
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if not template:
            path = folder / name
            template = str(optional(path).get("chat_template") or "")     # of several, all of them
    if template and (turn not in template or OF_OTHERS.search(template)):
        raise NanogapError(f"{path} holds {OTHER_CHAT}; if this one was not, take the template "
                           "away")


# ----- pixels -------------------------------------------------------------------------------------


def read_processor(folder: Path) -> tuple[str, dict]:
    """preprocessor_config.json, or what transformers 5 has in its place; and where that stands."""
    file = "processor_config.json"
    found = optional(folder / file).get("image_processor")
    if not found:
        file = "preprocessor_config.json"
        found = optional(folder / file)
    return file, found


def check_pixels(file: str, found: dict, config: dict, known: Table,
                 vision: CLIPVisionConfig) -> None:
    """How pictures become pixels."""
    kind, kinds = found.get("image_processor_type"), known["image_processor_type"]
    if kind is not None and kind not in kinds:
        raise wrong(file, "image_processor_type", kind,
                    f", and a {config['model_type']} (config.json) has {kinds[0]}: the files "
                    "belong to different checkpoints")
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
    if config["model_type"] == "llava_next":
        check_pinpoints(config, file, found, vision.image_size)


def check_pinpoints(config: dict, file: str, processor: dict, size: int) -> None:
    """(height, width) of canvases: whole squares of `size` pixels, the same in both files."""
    key = "image_grid_pinpoints"
    theirs, ours = processor.get(key), config.get(key)
    for where, pairs in (("config.json", ours), (file, theirs)):
        for side in (side for pair in pairs or () for side in pair):
            if side not in range(size, 11 * size, size):
                raise wrong(where, key, pairs, ", and it must be pairs [height, width] of "
                            f"canvases, multiples of {size} pixels")
    if theirs is not None and ours is not None and theirs != ours:
        raise wrong(file, key, theirs, f", and config.json has {ours!r:.80}; one of them is "
                    "another checkpoint's")


def check_clip(folder: Path) -> None:
    """The same of a CLIP whose text tower reads expressions."""
    config = read_json(folder / "config.json")
    for key in ("text_config", "vision_config", "text_config_dict", "vision_config_dict"):
        require(config.get(key) or {}, {"hidden_act": ("quick_gelu",)})
