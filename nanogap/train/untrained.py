"""The models before training, and their tokenizers; or those of a folder, to be trained on.

In:  a recipe and a seed.  Out: CLIP, and a model that takes over its vision tower; their tokenizers
have the form of the published ones, and learn from sentences about scenes.
"""

import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn

from nanogap.checks.loading import load
from nanogap.errors import NanogapError
from nanogap.models import MODELS, VLM
from nanogap.models.saving import START_TOKENS, llama_tokenizer
from nanogap.prompt import DESCRIBE
from nanogap.train.losses import CLIP
from nanogap.train.recipes import Recipe, box_questions, short_questions
from nanogap.train.scenes import caption, draw_scene


def train_llama_tokenizer(sentences: Iterable[str], vocab_size: int,
                          special_tokens: Iterable[str] = VLM.special_tokens) -> Tokenizer:
    """LLaMA's kind of BPE: <unk> <s> </s>, 256 bytes, pieces, and a model's own special tokens."""
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁")])
    # only while learning: no piece spans two words, and digits and punctuation stand alone
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("▁", "merged_with_next"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(Regex(r"[^\w▁\[]"), "isolated")])
    printable = [chr(code) for code in range(32 + 1, 127)] + ["▁", "\n"]
    bytes_ = [f"<0x{code:02X}>" for code in range(256)]
    learner.train_from_iterator(sentences, BpeTrainer(
        vocab_size=vocab_size - len(START_TOKENS) - len(bytes_), initial_alphabet=printable,
        show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {piece: i for i, piece in enumerate([*START_TOKENS, *bytes_, *pieces])}
    merges = [tuple(merge) for merge in learned["merges"]]
    return llama_tokenizer(vocab, merges, special_tokens)


def train_clip_tokenizer(sentences: Iterable[str], vocab_size: int) -> Tokenizer:
    """CLIP's kind of BPE, over bytes, cut to 77 tokens; the end token comes last and pads."""
    start, end, suffix = "<|startoftext|>", "<|endoftext|>", "</w>"
    tokenizer = Tokenizer(BPE(end_of_word_suffix=suffix))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(sentences, BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix=suffix, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [letter + suffix for letter in alphabet]
    pieces += ["".join(merge) for merge in merges] + [start, end]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer.model = BPE(vocab, merges, unk_token=end, end_of_word_suffix=suffix)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (start, end)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocab[start]), (end, vocab[end])])
    tokenizer.enable_truncation(77)
    tokenizer.enable_padding(pad_id=vocab[end], pad_token=end)
    return tokenizer


def initialise(model: nn.Module, depth: int) -> None:
    """Normal weights of fan_in^-1/2, smaller in residual branches and for CLIP's embeddings."""
    for name, parameter in model.named_parameters():
        if "embedding.weight" in name and parameter.dim() == 2 or name.endswith("pos_embed"):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("class_embedding"):
            nn.init.normal_(parameter, std=len(parameter) ** -0.5)
        elif parameter.dim() >= 2:
            std = parameter[0].numel() ** -0.5
            if re.search(r"(out_proj|attn\.proj|fc2|o_proj|down_proj)\.weight$", name):
                std *= (2 * depth) ** -0.5
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


@cache
def llama_words(seed: int, family: str) -> Tokenizer:
    """It learns from questions and answers about a thousand scenes."""
    rng = random.Random(f"train {seed} words")
    model = MODELS[family]
    said = []
    for _ in range(1000):
        drawn = draw_scene(rng, 168)
        asked = [*box_questions(model, drawn), (DESCRIBE, caption(drawn.things, rng))]
        for question, answer in [*asked, *short_questions(drawn, rng)]:
            before, after = model.template.around(question)
            said += [before, f"{after} {answer}"]
    return train_llama_tokenizer(said, 640, model.special_tokens)


def new_clip(recipe: Recipe, seed: int) -> CLIP:
    """An untrained CLIP, whose tokenizer learns from captions of a thousand scenes."""
    rng = random.Random(f"train {seed} captions")
    said = [caption(draw_scene(rng, 168).things, rng) for _ in range(1000)]
    tokenizer = train_clip_tokenizer(said, 256)
    text = replace(recipe.text, vocab_size=tokenizer.get_vocab_size())
    clip = CLIP(recipe.vision, text, text.hidden_size, MODELS[recipe.family].Tower)
    clip.tokenizer = tokenizer
    torch.manual_seed(seed)
    initialise(clip, recipe.vision.num_hidden_layers)
    return clip


def new_model(recipe: Recipe, seed: int) -> VLM:
    """An untrained projector and decoder; the vision tower is frozen, and waits for CLIP's."""
    family = MODELS[recipe.family]
    tokenizer = llama_words(seed, recipe.family)
    rows = 64 * math.ceil(tokenizer.get_vocab_size() / 64)                    # as published
    image_token = tokenizer.get_vocab()[family.special_tokens[0]]
    model = family(family.Config(
        replace(recipe.decoder, vocab_size=rows), recipe.vision, image_token))
    model.tokenizer = tokenizer
    torch.manual_seed(seed + 1)
    initialise(model, recipe.decoder.num_hidden_layers)
    model.vision_tower.requires_grad_(False)
    return model


def started(folder: Path, name: str) -> VLM:
    """The model of a folder, to be trained on, or another one of the same parts."""
    family, found = MODELS[name], load(folder, "cpu", "float32")
    config = found.config
    if type(found) is not family:
        config = family.Config(config.text, config.vision, config.image_token)
    model = family(config)
    model.tokenizer = found.tokenizer
    found.text_guide = None                   # it is copied as it stands
    unknown = model.load_state_dict(found.state_dict(), strict=False).unexpected_keys
    if unknown:
        raise NanogapError(f"--start {folder} holds {unknown[0]}, which a {name} has not; "
                           f"start from a {name}")
    model.vision_tower.requires_grad_(False)
    return model
