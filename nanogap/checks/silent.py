"""What would load, and answer otherwise in silence: one table, and one call.

In:  a checkpoint's small files.  Out: nothing, or the key that nanogap does not follow.
transformers reads more keys than are implemented here.  One that would change an answer is refused
by its name where it says anything else than what is done here; the others change nothing.
Source: transformers 5.23.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from nanogap import weights
from nanogap.checks.explain import GET, look_through
from nanogap.clip import CLIPText
from nanogap.errors import NanogapError
from nanogap.llava import Llava
from nanogap.models import MODELS

Table = dict[str, Sequence]     # key -> the values that change nothing; the first is what is done
DECODER: Table = {
    "model_type": ("llama",), "hidden_act": ("silu", "swish"), "attention_bias": (False,),
    "mlp_bias": (False,), "partial_rotary_factor": (1,), "sliding_window": (None,)}
ROPE: Table = {
    "rope_type": ("default", "linear"), "type": ("default", "linear"), "factor": (1,),
    "partial_rotary_factor": (1,)}
VISION: Table = {"model_type": ("clip_vision_model",), "hidden_act": ("quick_gelu",),
                 "num_channels": (3,)}
LLAVA: Table = {"projector_hidden_act": ("gelu",), "vision_feature_select_strategy": ("default",)}
# greedy decoding, of all words alike, up to an end token
GENERATION: Table = {
    "do_sample": (False,), "num_beams": (1,), "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (0,),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "forced_bos_token_id",
                     "forced_eos_token_id"), (None, []))}
# a picture is padded to a square, so the crop that follows in transformers takes nothing away
KINDS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
PIXELS: Table = {
    "do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,),
    "resample": (3, "bicubic"), "rescale_factor": (1 / 255,),
    "image_processor_type": tuple(f"{name}{kind}" for name in ("CLIP", "Llava") for kind in KINDS),
    "feature_extractor_type": ("CLIPFeatureExtractor", "CLIPImageProcessor")}
TOKENIZER: Table = {"add_bos_token": (True,), "add_eos_token": (False,)}
# by `model_type`: what its files may say, and for each decoder a word of the chat template
OF_1_5: dict[str, Table] = {
    "config": LLAVA, "vision": VISION, "pixels": PIXELS, "turns": {"llama": "ASSISTANT"}}
FAMILIES = {
    "llava": OF_1_5,
    "llava_next": OF_1_5 | {
        "config": LLAVA | {"use_image_newline_parameter": (True,)},
        "pixels": PIXELS | {"aspect_ratio_setting": ("anyres",), "image_processor_type":
                            tuple(f"LlavaNext{kind}" for kind in KINDS[:3])},
        "turns": {"llama": "ASSISTANT", "mistral": "[INST]"}},
    "shikra": OF_1_5,
    "minigpt_v2": OF_1_5 | {
        "config": {}, "turns": {"llama": "[INST]"},
        "vision": VISION | {"model_type": ("eva_vit_g",), "hidden_act": ("gelu",)}}}
# words of chat templates that no model here was trained with
OF_OTHERS = re.compile(r"<\|(im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant"
                       r"|system|end)\|>|<(start|end)_of_turn>")
OTHER_CHAT = ("another chat template than the model's, and nanogap asks in that only: a model that "
              "was trained with another would answer worse")
SAMPLE = 1024        # numbers of each matrix by which two vision towers are compared
FARTHEST = 0.3       # of the sum of their norms; those of two trainings are 0.7 apart


def silent(folder: Path) -> None:
    """Refuse what a checkpoint of one of MODELS says and nanogap does not follow.

    raises: NanogapError that names the file and the key
    """
    for file, part, table in settings(folder):
        require(part, table, file)


def require(part: dict, table: Table, file: str = "config.json") -> None:
    """Refuse what a table does not list; a key that is missing or null is as nanogap has it."""
    for key, values in table.items():
        found = part.get(key)
        if found is not None and found not in values:
            known = values if isinstance(values, range) else values[0]
            raise NanogapError(f"{file}: {key} is {found!r:.80}; nanogap implements {known!r} only")


def settings(folder: Path) -> Iterator[tuple[str, dict, Table]]:
    """All that a checkpoint says: the file, its keys, and what they may be."""
    config = weights.read_json(folder / "config.json")
    kind, text = config["model_type"], config.get("text_config", {})
    family = FAMILIES[kind]
    yield "config.json", config, family["config"]
    yield "config.json", text, DECODER | {"model_type": tuple(family["turns"])}
    yield "config.json", config.get("vision_config", {}), family["vision"]
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    yield f"config.json: {key}", text.get(key, {}), ROPE

    read = weights.read_config(folder, MODELS[kind])
    rows, size, layers = read.text.vocab_size, read.vision.image_size, read.vision.num_hidden_layers
    yield "config.json", config, {
        "vision_feature_layer": range(-layers, -1),          # a layer before it, and one behind it
        **dict.fromkeys(("image_token_index", "image_token_id"), range(rows + 1))}
    # transformers takes generation_config.json where there is one, or else config.json
    generation = weights.read_json(folder / "generation_config.json")
    file = "generation_config.json" if generation else "config.json"
    yield file, generation or text | config, GENERATION
    for end in (read.eos_token, *read.other_ends):
        yield file, {"eos_token_id": end}, {"eos_token_id": range(rows)}
    yield "tokenizer_config.json", weights.read_json(folder / "tokenizer_config.json"), TOKENIZER
    check_template(folder, str(family["turns"][text.get("model_type", "llama")]))

    square = (size, {"shortest_edge": size}, {"height": size, "width": size})
    pixels = family["pixels"] | {"size": square, "crop_size": square}
    if "image_grid_pinpoints" in config:
        pixels["image_grid_pinpoints"] = [config["image_grid_pinpoints"]]
    for name in ("preprocessor_config.json", "processor_config.json"):
        found = weights.read_json(folder / name)
        yield f"{name} of a {kind}", found.get("image_processor", found), pixels


def check_template(folder: Path, turn: str) -> None:
    """Refuse another chat template than the model's, wherever it stands; turn: a word of it."""
    names = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
    templates = {name: weights.read_json(folder / name).get("chat_template") for name in names}
    path = folder / "chat_template.jinja"
    if path.exists():
        templates[path.name] = path.read_text()
    for name, template in templates.items():
        text = str(template or turn)                          # of several templates, all of them
        if turn not in text or OF_OTHERS.search(text):
            raise NanogapError(f"{folder / name} holds {OTHER_CHAT}; if this one was not, take "
                               "the template away")


def check_clip(folder: Path) -> None:
    """The same of a CLIP whose text tower reads expressions."""
    config = weights.read_json(folder / "config.json")
    for key in ("text_config", "vision_config", "text_config_dict", "vision_config_dict"):
        require(config.get(key, {}), {"hidden_act": ("quick_gelu",)})


def check_belonging(folder: Path, model: Llava, clip: Path | None) -> None:
    """Refuse a folder whose parts are of different checkpoints, though they fit.

    clip: the folder of the text tower that was loaded with it
    """
    look_through(folder, GET)            # an adapter beside the model, or whole numbers as weights
    check_tokenizer(folder, model)
    guide = model.text_guide
    for tokenizer in [model.tokenizer, *([guide.tokenizer] if guide else [])]:
        tokenizer.no_padding()           # left over from training: a question is one text
        tokenizer.no_truncation()
    if clip is not None and guide is not None:
        check_guide(clip, model, guide)


def check_rows(path: Path, tokenizer: Tokenizer, rows: int) -> None:
    """An ID without an embedding could not be looked up."""
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise NanogapError(f"{path} has more tokens than the model has embeddings "
                           f"({rows}): it belongs to another checkpoint")


def check_tokenizer(folder: Path, model: Llava) -> None:
    """Refuse an image token that words could spell, and the words of another chat template.

    A prompt might hold the one twice; the others may be there without their template.
    """
    path, tokenizer, image = folder / "tokenizer.json", model.tokenizer, model.config.image_token
    check_rows(path, tokenizer, model.config.text.vocab_size)
    added = tokenizer.get_added_tokens_decoder()
    pieces = tokenizer.get_vocab(with_added_tokens=False).values()
    if (image == model.config.bos_token or image in pieces
            or image in added and not added[image].special):
        raise NanogapError(f"config.json: image_token_index is {image}, which stands for "
                           f"{tokenizer.id_to_token(image)!r:.80} in {path}, so a prompt could "
                           "hold it twice; give the tokenizer.json that the checkpoint was "
                           "published with")
    for token in added.values():
        if OF_OTHERS.fullmatch(token.content):
            raise NanogapError(f"{path} holds {token.content}, a word of {OTHER_CHAT}; give its "
                               "own checkpoint")


def check_guide(folder: Path, model: Llava, guide: CLIPText) -> None:
    """Refuse a CLIP that the vision tower does not come from: each matrix's beginning is compared.

    Precisions may differ, and the tower may have been trained a little with the rest.
    """
    path = folder / "tokenizer.json"
    check_rows(path, guide.tokenizer, guide.text_model.config.vocab_size)
    ids, end = guide.tokenizer.encode("a").ids, max(guide.tokenizer.get_vocab().values())
    if len(ids) < 3 or ids[-1] != end or ids.count(end) > 1:
        raise NanogapError(f"{path} makes {ids} of a text, and CLIP reads it at its end token, "
                           "the highest ID; give the one that the CLIP was published with")
    theirs = {name: value for name, value in weights.read_tensors(folder)
              if name.startswith("vision_model.")}
    for name, ours in model.get_submodule("vision_tower").named_parameters():
        other = theirs.get(f"vision_model.{name}")
        if ours.dim() > 1 and (other is None or not alike(ours, other)):
            raise NanogapError(f"{folder} is not the CLIP that the vision tower comes from ({name} "
                               f"differs); get that with {model.clip_download}")


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices begin alike."""
    if a.shape != b.shape:
        return False
    a, b = (matrix.flatten()[:SAMPLE].cpu().float() for matrix in (a, b))
    return bool((a - b).norm() <= FARTHEST * (a.norm() + b.norm()))
