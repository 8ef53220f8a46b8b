"""The files beside config.json: how pictures become pixels, where an answer ends, what is asked.

In:  a checkpoint's folder.  Out: the settings in it that nanogap follows.

transformers reads more keys than are implemented here.  One that would change an answer is refused
by its name where it says anything else than what is done here; the others change nothing.
Source: transformers 5.23.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogap.checks.config import read_json, read_text, require, require_all
from nanogap.errors import NanogapError
from nanogap.image import CLIP_MEAN, CLIP_STD

NOTHING: tuple = (None, [], {})
# key -> the values that change nothing: greedy decoding, of all words alike, up to an end token
GENERATION = {
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
PIXELS = {
    "do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,),
    "resample": (3, "bicubic"), "do_reduce_labels": (False,), "do_flip_channel_order": (False,),
    "image_processor_type": tuple(family + kind for family in ("CLIP", "Llava")
                                  for kind in ("ImageProcessor", "ImageProcessorFast",
                                               "ImageProcessorPil", "FeatureExtractor")),
    "feature_extractor_type": ("CLIPFeatureExtractor", "CLIPImageProcessor")}
PROCESSOR = {"vision_feature_select_strategy": ("default",)}
TOKENIZER = {"add_bos_token": (True,), "add_eos_token": (False,)}


@dataclass(frozen=True)
class Pixels:
    """How a square becomes numbers: the mean and deviation of each colour."""

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


def optional(folder: Path, name: str) -> dict:
    """A JSON file that may be missing."""
    return read_json(folder / name) if (folder / name).exists() else {}


# ----- pixels -------------------------------------------------------------------------------------


def read_processor(folder: Path) -> tuple[str, dict]:
    """What says how pictures become pixels, and the file that it stands in.

    preprocessor_config.json, or what transformers 5 writes in its place
    """
    processor = optional(folder, "processor_config.json")
    file, found = "processor_config.json", processor.get("image_processor")
    if found is None:
        file, found = "preprocessor_config.json", optional(folder, "preprocessor_config.json")
    if not isinstance(found, dict):
        raise NanogapError(f"{file}: image_processor is not an object")
    return file, found


def read_pixels(folder: Path, image_size: int, patch_size: int,
                known: dict[str, tuple] = PIXELS) -> Pixels:
    """Mean and deviation from there; `known`: what else it may say: key -> values."""
    processor = optional(folder, "processor_config.json")
    require_all(processor, PROCESSOR | {"patch_size": (patch_size,)}, "processor_config.json")
    file, found = read_processor(folder)
    check_kind(folder, found, known["image_processor_type"], file)
    require_all(found, known, file)
    sides = ["size"]
    if found.get("do_center_crop") is not False:
        sides.append("crop_size")
    for key in sides:
        check_side(found, key, image_size, file)
    scale = found.get("rescale_factor")
    if scale is not None and not (isinstance(scale, float) and abs(scale * 255 - 1) < 1e-6):
        require(found, "rescale_factor", 1 / 255, file=file)
    return Pixels(triple(found, "image_mean", CLIP_MEAN, file, least=0.0),
                  triple(found, "image_std", CLIP_STD, file))


def check_kind(folder: Path, part: dict, kinds: tuple, file: str) -> None:
    """Refuse the image processor of another model than config.json is of."""
    found = part.get("image_processor_type")
    if found is not None and found not in kinds:
        model = optional(folder, "config.json").get("model_type")
        raise NanogapError(f"{file}: image_processor_type is {found!r:.80}, and a {model!r:.80} "
                           f"(config.json) has {kinds[0]!r}: the files belong to different "
                           "checkpoints")


def check_side(part: dict, key: str, image_size: int, file: str) -> None:
    """A square of the size that the tower reads, in each of its spellings."""
    found = part.get(key)
    sides = list(found.values()) if isinstance(found, dict) else [found]
    if any(side is not None and side != image_size for side in sides):
        raise NanogapError(f"{file}: {key} is {found!r:.80}, and the vision tower reads squares "
                           f"of {image_size} pixels")


def triple(part: dict, key: str, default: tuple[float, ...], file: str,
           least: float | None = None) -> tuple[float, ...]:
    """Three positive numbers, one for each colour; `least`: so low that it may be as well."""
    values = part.get(key)
    values = default if values is None else values
    kinds = [type(value) for value in values] if isinstance(values, (list, tuple)) else []
    if len(kinds) != 3 or not set(kinds) <= {int, float} or not all(
            0 < value < 1e6 or value == least for value in values):
        raise NanogapError(f"{file}: {key} is {values!r:.80}, not three positive numbers")
    return tuple(float(value) for value in values)


# ----- the end of an answer -----------------------------------------------------------------------


def read_ends(folder: Path, config: dict, text: dict, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer: any of them does; training says the first.

    source: transformers takes generation_config.json where there is one, or else config.json, the
            whole model's keys before those of the decoder
    """
    file, settings = "config.json", text | {k: v for k, v in config.items() if v is not None}
    if (folder / "generation_config.json").exists():
        file = "generation_config.json"
        settings = read_json(folder / file)
    require_all(settings, GENERATION, file)
    found = settings.get("eos_token_id")
    if found is None:
        file, found = "config.json", text.get("eos_token_id")
    found = 2 if found is None else found
    ends = found if isinstance(found, list) and found else [found]
    for end in ends:
        if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < vocab_size:
            raise NanogapError(f"{file}: eos_token_id is {end!r:.80}, not a whole number "
                               f"from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ends))


# ----- the question -------------------------------------------------------------------------------

# what any chat template says: names in Jinja are text in quotes as well
SAYS = {"user", "assistant", "system", "role", "content", "type", "text", "image", "default", "s"}
TAG = re.compile(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", re.DOTALL)
QUOTED = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", re.DOTALL)


@dataclass(frozen=True)
class Chat:
    """The chat template that a model was trained with, as far as others can be told from it."""

    name: str                  # whose it is
    turns: tuple[str, ...]     # the words that mark whose turn it is; the first must be there
    systems: tuple[str, ...] = ()   # one of these may stand before the first question, or none


VICUNAS = ("ASSISTANT", "USER")
MISTRAL = Chat("Mistral", ("INST", "SYS"))


def check_question(folder: Path, chat: Chat) -> None:
    """Refuse a checkpoint that was trained with another chat template than the model's."""
    require_all(optional(folder, "tokenizer_config.json"), TOKENIZER, "tokenizer_config.json")
    for file, template in templates(folder):
        said = spoken(template)
        for system in chat.systems:
            said = said.replace(system, " ")
        words = set(re.findall(r"[^\W\d_]+", said))
        if chat.turns[0] not in words or words - SAYS - set(chat.turns):
            raise NanogapError(
                f"{folder / file} holds another chat template than {chat.name}'s, and nanogap asks "
                "in that only: a model that was trained with another would answer worse; if this "
                "one was not, take the template away")
        return                               # the first is the one that transformers would take


def templates(folder: Path) -> Iterator[tuple[str, str]]:
    """The chat templates of a checkpoint, in the order in which transformers looks for them."""
    if (folder / "chat_template.jinja").exists():
        yield "chat_template.jinja", read_text(folder / "chat_template.jinja")
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = optional(folder, file).get("chat_template")
        if isinstance(found, list):          # several, by name
            found = {part.get("name"): part.get("template") for part in found
                     if isinstance(part, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            yield file, found


def spoken(template: str) -> str:
    """The text in a template: what stands outside its tags, and in quotes within them."""
    said = [TAG.sub(" ", template)]
    for tag in TAG.findall(template):
        speaks = tag.startswith("{{") and "raise_exception" not in tag
        if speaks or re.match(r"\{%-?\s*set\b", tag):
            said += [first or second for first, second in QUOTED.findall(tag)]
    return " ".join(said).replace("\\n", " ")
