"""The models as they are published: their prompts in real tokens, their configs and their sizes."""

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from nanogap.clip import CLIPVisionConfig
from nanogap.convert.sentencepiece import read_llama_tokenizer
from nanogap.llama import LlamaConfig
from nanogap.models import MODELS, VLM
from nanogap.models.llava_next import TEMPLATES, LlavaNext
from nanogap.models.minigpt import MiniGPT
from nanogap.models.saving import our_name
from nanogap.models.shikra import Shikra
from nanogap.prompt import Template, encode
from nanogap.weights import read_config, read_text_config
from tests.models.test_reference import PUBLISHED, ROOT, needs_published

MISTRAL = Path(os.environ.get("NANOGAP_MISTRAL",
                              ROOT / "../shared/published/mistral-7b-instruct-v0.2"))


@cache
def published(folder: Path, family: type[VLM]) -> Tokenizer:
    """The published pieces, and from 32000 on the tokens of a model's image."""
    if not (folder / "tokenizer.model").is_file():
        pytest.skip("set NANOGAP_PUBLISHED to a folder with the text files of "
                    "llava-hf/llava-1.5-7b-hf, and NANOGAP_MISTRAL to one with the "
                    "tokenizer.model of Mistral-7B-Instruct-v0.2")
    return read_llama_tokenizer(folder / "tokenizer.model", family.special_tokens)


SYSTEM = [   # "A chat between a curious user and an artificial intelligence assistant. ... USER:"
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076,
    8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889,
    3148, 1001, 29901]
LLAVA = [    # a lone space, 29871, on both sides of the image
    *SYSTEM, 29871, 32000, 29871, 13, 12148, 3867, 278, 3216, 292, 3800, 14821, 310, 278, 5120,
    445, 10541, 16612, 29901, 278, 767, 373, 278, 2175, 29889, 319, 1799, 9047, 13566, 29901]
EARLY = replace(Shikra.template,
                where_is="In <image>, I need the bounding box coordinates of {}.")
PROMPTS = {   # of "the man on the left"
    "LLaVA-1.5": (PUBLISHED, VLM, VLM.template, LLAVA),
    "a Vicuna of 1.6: a human, not a user": (
        PUBLISHED, LlavaNext, TEMPLATES["llama"],
        [5199 if token == 1404 else token for token in LLAVA]),
    "a Mistral of 1.6: [INST] is three ordinary tokens": (
        MISTRAL, LlavaNext, TEMPLATES["mistral"], [
            1, 733, 16289, 28793, 28705, 32000, 28705, 13, 12069, 3084, 272, 3585, 288, 3890,
            17237, 302, 272, 4424, 456, 12271, 13966, 28747, 272, 676, 356, 272, 1749, 28723, 733,
            28748, 16289, 28793]),
    "MiniGPT-v2": (PUBLISHED, MiniGPT, MiniGPT.template, [
        1, 1, 518, 25580, 29962, 529, 25518, 29958, 32000, 1533, 25518, 29958, 518, 20275, 29962,
        2367, 592, 278, 4423, 310, 278, 767, 373, 278, 2175, 518, 29914, 25580, 29962]),
    "Shikra": (PUBLISHED, Shikra, Shikra.template, [
        *SYSTEM, 1815, 366, 1298, 714, 278, 767, 373, 278, 2175, 297, 278, 1967, 32001, 32000,
        32002, 322, 3867, 278, 10350, 310, 967, 4423, 29973, 319, 1799, 9047, 13566, 29901]),
    "Shikra, the image early": (PUBLISHED, Shikra, EARLY, [
        *SYSTEM, 512, 32001, 32000, 32002, 1919, 306, 817, 278, 3216, 292, 3800, 10350, 310,
        278, 767, 373, 278, 2175, 29889, 319, 1799, 9047, 13566, 29901]),
}


@pytest.mark.parametrize("folder, family, template, ids", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_has_the_ids_of_the_published_code(
        folder: Path, family: type[VLM], template: Template, ids: list[int]):
    question = template.question("the man on the left")
    assert template.encode(published(folder, family), question, 1, 32000) == ids


@pytest.mark.parametrize("folder, family, ids", [
    (PUBLISHED, VLM, [
        518, 29900, 29889, 29896, 29906, 29892, 29871, 29900, 29889, 29941, 29946, 29892, 29871,
        29900, 29889, 29945, 29953, 29892, 29871, 29900, 29889, 29955, 29947, 29962]),
    (MISTRAL, LlavaNext, [
        733, 28734, 28723, 28740, 28750, 28725, 28705, 28734, 28723, 28770, 28781, 28725, 28705,
        28734, 28723, 28782, 28784, 28725, 28705, 28734, 28723, 28787, 28783, 28793]),
    (PUBLISHED, Shikra, [
        673, 29901, 518, 29900, 29889, 29896, 29906, 29900, 29892, 29900, 29889, 29941, 29946,
        29900, 29892, 29900, 29889, 29945, 29953, 29900, 29892, 29900, 29889, 29955, 29947, 29900,
        29962, 869]),
    (PUBLISHED, MiniGPT, [
        426, 29966, 29896, 29906, 5299, 29941, 29946, 5299, 29945, 29953, 5299, 29955, 29947,
        29958, 29913])])
def test_a_box_has_24_tokens_28_or_15(folder: Path, family: type[VLM], ids: list[int]):
    box = family.box_format.say((0.12, 0.34, 0.56, 0.78))
    assert encode(published(folder, family), box) == ids


@needs_published
def test_the_published_config_and_its_686_names_are_those_of_the_model():
    """What config.json leaves out is supplied; the sizes are those of float16."""
    config = read_config(PUBLISHED)
    assert config.text == LlamaConfig(
        4096, 11008, 32, 32, 32, 128, 32064, 1e-5, 10000.0, 4096, tie_word_embeddings=False)
    assert config.vision == CLIPVisionConfig(1024, 4096, 24, 16, 336, 14, 1e-5)
    assert (config.image_token, config.bos_token, config.eos_token) == (32000, 1, 2)
    assert (config.vision_feature_layer, config.projector_bias) == (-2, True)
    assert config.dtype == "float16"
    assert config.image_mean == (0.48145466, 0.4578275, 0.40821073)
    index = json.loads((PUBLISHED / "model.safetensors.index.json").read_text())
    with torch.device("meta"):
        model = VLM(config)
    names = [our_name(name, VLM.rename) for name in index["weight_map"]]
    assert len(names) == 686 and sorted(names) == sorted(model.state_dict())
    size = 2 * sum(p.numel() for p in model.parameters())
    assert size == index["metadata"]["total_size"] == 14_126_854_144


def test_what_a_mistrals_config_leaves_out_is_not_what_a_llamas_does():
    """The defaults of MistralConfig; a null key-value count is that of the heads."""
    mistral = LlavaNext.complete({"text_config": {"model_type": "mistral"}})["text_config"]
    assert read_text_config(mistral, False) == LlamaConfig(
        intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072)
    llama = LlavaNext.complete({"text_config": {"model_type": "llama"}})["text_config"]
    assert read_text_config(llama, False) == LlamaConfig()


CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}


def llava_next(**text: object) -> dict:
    """config.json of a LLaVA-1.6: what it says that the defaults do not."""
    text |= {"rms_norm_eps": 1e-5, "vocab_size": 32064}
    return {"model_type": "llava_next", "vision_config": CLIP, "text_config": text}


LLAMA_7B = 6_738_415_616
SIZES = {   # name: (config.json, tensors, parameters)
    "llava-v1.6-mistral-7b": (llava_next(
        model_type="mistral", intermediate_size=14336, rope_theta=1000000.0, sliding_window=None,
        max_position_embeddings=32768, num_key_value_heads=8), 687, 7_566_747_648),
    "llava-v1.6-vicuna-7b": (
        llava_next(model_type="llama", max_position_embeddings=4096), 687, 7_063_431_168),
    "llava-v1.6-vicuna-13b": (llava_next(      # LLaVA-1.5's 13B and a newline
        model_type="llama", max_position_embeddings=4096, hidden_size=5120, num_hidden_layers=40,
        intermediate_size=13824, num_attention_heads=40, num_key_value_heads=40),
        759, 13_351_494_656 + 5120),
    # LLaMA with three more rows, one Linear, and CLIP-L/14 for 224 pixels
    "shikra-7b": (
        {"model_type": "shikra", "text_config": {"vocab_size": 32003},
         "vision_config": CLIP | {"image_size": 224}}, 291 + 2 + 391,
        LLAMA_7B + 2 * 3 * 4096 + 1024 * 4096 + 4096 + 303_507_456 - (577 - 257) * 1024),
    # EVA, ln_vision, llama_proj, LLaMA
    "minigpt-v2": ({"model_type": "minigpt_v2", "text_config": {"vocab_size": 32000}},
                   511 + 2 + 2 + 291, 986_975_872 + 2 * 1408 + 23_072_768 + LLAMA_7B),
}


@pytest.mark.parametrize("name", SIZES)
def test_at_full_size_there_are_as_many_tensors_and_parameters_as_published(
        name: str, tmp_path: Path):
    """Without memory for them; what the config of MiniGPT-v2 leaves out is supplied."""
    config, *sizes = SIZES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = MODELS[config["model_type"]]
    with torch.device("meta"):
        model = family(read_config(tmp_path, family))
    assert [len(model.state_dict()), sum(p.numel() for p in model.parameters())] == sizes
    if family is MiniGPT:
        vision = CLIPVisionConfig(1408, 6144, 39, 16, 448, 14, 1e-6)
        assert (model.config.vision, model.config.image_token) == (vision, 32000)
