"""What would load, and answer otherwise in silence: settings, and parts of different checkpoints.

In:  a checkpoint's small files, and the model that was made of it.
Out: nothing, or the mistake: a key that nanogap does not follow, a part that is another's.
transformers reads more keys than are implemented here.  One that would change an answer is refused
where it says anything else than what is done here; what makes torch fail needs no row.
Source: transformers 5.23.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from nanogap import weights
from nanogap.errors import NanogapError
from nanogap.llava import Llava
from nanogap.models import MODELS

Table = dict[str, Sequence]     # key -> the values that change nothing; the first is what is done
LLAVA: Table = {"projector_hidden_act": ("gelu",), "vision_feature_select_strategy": ("default",),
                "quantization_config": (None,), "compression_config": (None,)}
DECODER: Table = {"hidden_act": ("silu", "swish"), "attention_bias": (False,),
                  "sliding_window": (None,), "partial_rotary_factor": (1,)}
ROPE: Table = {"rope_type": ("default", "linear"), "type": ("default", "linear"), "factor": (1,),
               "partial_rotary_factor": (1,)}
# a picture is padded to a square, so the crop that follows in transformers takes nothing away
PIXELS: Table = {"do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,),
                 "resample": (3, "bicubic"), "rescale_factor": (1 / 255,)}
FILES: dict[str, Table] = {
    "generation_config.json": {
        "do_sample": (False,), "num_beams": (1,), "repetition_penalty": (1,),
        "no_repeat_ngram_size": (0,), "min_new_tokens": (0,), "min_length": (0,)},
    "preprocessor_config.json": PIXELS,
    "processor_config.json": PIXELS}
CLIP: Table = {"model_type": ("clip_vision_model",), "hidden_act": ("quick_gelu",)}
EVA: Table = {"model_type": ("eva_vit_g",), "hidden_act": ("gelu",)}
# by `model_type`: the vision tower, and for each decoder a word of the chat template
FAMILIES: dict[str, tuple[Table, dict[str, str]]] = {
    "llava": (CLIP, {"llama": "ASSISTANT"}),
    "llava_next": (CLIP, {"llama": "ASSISTANT", "mistral": "[INST]"}),
    "shikra": (CLIP, {"llama": "ASSISTANT"}),
    "minigpt_v2": (EVA, {"llama": "[INST]"})}
OTHER_CHAT = ("another chat template than the model's, and nanogap asks in that only: a model that "
              "was trained with another would answer worse")
ALIKE = 0.8       # cosine of two towers' position embeddings; of two trainings it is below 0.5
# tokens of chat templates that no model here was trained with
OF_OTHERS = {"<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>"}


def silent(folder: Path) -> None:
    """Refuse what a checkpoint of one of MODELS says and nanogap does not follow, by its key."""
    config = weights.read_json(folder / "config.json")
    text, kind = config.get("text_config", {}), config["model_type"]
    tower, turns = FAMILIES[kind]
    read = weights.read_config(folder, MODELS[kind])
    tokens = range(read.text.vocab_size + 1)
    require(config, LLAVA | {
        "image_token_index": tokens, "image_token_id": tokens,
        "vision_feature_layer": range(-read.vision.num_hidden_layers, -1)})
    require(text, DECODER | {"model_type": tuple(turns)})
    for key in ("rope_scaling", "rope_parameters"):
        require(text.get(key, {}), ROPE, f"config.json: {key}")
    require(config.get("vision_config", {}), tower)
    for name, table in FILES.items():
        found = weights.read_json(folder / name)
        require(found.get("image_processor", found), table, name)
    check_template(folder, turns[text.get("model_type", "llama")])


def require(part: dict, table: Table, file: str = "config.json") -> None:
    """Refuse what a table does not list; a key that is missing or null is as nanogap has it."""
    for key, values in table.items():
        found = part.get(key)
        if found is not None and found not in values:
            known = values if isinstance(values, range) else values[0]
            raise NanogapError(f"{file}: {key} is {found!r:.80}; nanogap implements {known!r} only")


def check_template(folder: Path, turn: str) -> None:
    """Refuse another chat template than the model's, wherever it stands; turn: a word of it."""
    found = {path.name: path.read_text() for path in folder.glob("chat_template.*")}
    for name in ("processor_config.json", "tokenizer_config.json"):
        found[name] = str(weights.read_json(folder / name).get("chat_template", turn))
    for name, template in found.items():
        if turn not in template:
            raise NanogapError(f"{folder / name} holds {OTHER_CHAT}; if this one was not, take "
                               "the template away")


def check_clip(folder: Path) -> None:
    """The same of a CLIP whose text tower reads expressions."""
    config = weights.read_json(folder / "config.json")
    for part in ("text_config", "vision_config"):
        require(config.get(part, {}), {"hidden_act": ("quick_gelu",)})


def check_parts(folder: Path, model: Llava, clip: Path | None) -> None:
    """Refuse a tokenizer and a CLIP of other checkpoints than the model's, though they fit.

    clip: the folder of the text tower that was loaded with it
    """
    path, vocabulary = folder / "tokenizer.json", model.tokenizer.get_vocab()
    rows, image = model.config.text.vocab_size, model.config.image_token
    if max(vocabulary.values(), default=0) >= rows:
        raise NanogapError(f"{path} has more tokens than the model has embeddings ({rows}): it "
                           "belongs to another checkpoint")
    if image in model.tokenizer.get_vocab(with_added_tokens=False).values():
        raise NanogapError(f"config.json: image_token_index is {image}, which is a word in {path}; "
                           "give the tokenizer.json that the checkpoint was published with")
    for token in sorted(OF_OTHERS & vocabulary.keys()):
        raise NanogapError(f"{path} holds {token}, a word of {OTHER_CHAT}; give its own checkpoint")
    if clip is not None:
        check_guide(clip, model)


def check_guide(folder: Path, model: Llava) -> None:
    """Refuse a CLIP that the vision tower does not come from: position embeddings tell.

    Precisions may differ, and the tower may have been trained a little with the rest.
    """
    guide = model.guide()
    end, last = guide.tokenizer.encode("a").ids[-1], max(guide.tokenizer.get_vocab().values())
    if end != last or last >= guide.text_model.config.vocab_size:
        raise NanogapError(f"{folder / 'tokenizer.json'} ends no text with the CLIP's highest ID, "
                           "where it reads it; give the one that the CLIP was published with")
    name = "embeddings.position_embedding.weight"
    ours = model.vision_tower.state_dict().get(name)
    theirs = dict(weights.read_tensors(folder)).get(f"vision_model.{name}")
    alike = 0.0
    if ours is not None and theirs is not None and ours.shape == theirs.shape:
        vectors = ours.flatten().cpu().float(), theirs.flatten().float()
        alike = float(torch.cosine_similarity(*vectors, dim=0))
    if alike < ALIKE:
        raise NanogapError(f"{folder} is not the CLIP that the vision tower comes from (position "
                           f"embeddings differ); get that with {model.clip_download}")
