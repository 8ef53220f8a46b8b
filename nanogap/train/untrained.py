"""The models before training, and their tokenizers; or those of a folder, to be trained on.

In:  a recipe and a seed.  Out: CLIP, and a model that takes over its vision tower.
"""

import math
import random
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from nanogap.checks.loading import load
from nanogap.errors import NanogapError
from nanogap.models import MODELS, VLM
from nanogap.prompt import DESCRIBE
from nanogap.train.clip import CLIP
from nanogap.train.questions import box_questions, short_questions
from nanogap.train.recipes import Recipe
from nanogap.train.scenes import caption, draw_scene
from nanogap.train.tokenizer import train_clip_tokenizer, train_llama_tokenizer


def initialise(model: nn.Module, depth: int) -> None:
    """Normal weights of standard deviation fan_in^-1/2, and smaller ones on the residual branches.

    Embeddings of CLIP are small, biases 0.
    """
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
def clip_tokenizer(seed: int) -> Tokenizer:
    """It learns from captions of a thousand scenes."""
    rng = random.Random(f"train {seed} captions")
    said = [caption(draw_scene(rng, 168).things, rng) for _ in range(1000)]
    return train_clip_tokenizer(said, 256)


@cache
def llama_tokenizer(seed: int, family: str) -> Tokenizer:
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
    """An untrained CLIP."""
    words = clip_tokenizer(seed)
    text = replace(recipe.text, vocab_size=words.get_vocab_size())
    clip = CLIP(recipe.vision, text, text.hidden_size, MODELS[recipe.family].Tower)
    clip.tokenizer = words
    torch.manual_seed(seed)
    initialise(clip, recipe.vision.num_hidden_layers)
    return clip


def new_model(recipe: Recipe, seed: int) -> VLM:
    """An untrained projector and decoder; the vision tower is frozen, and waits for CLIP's."""
    family = MODELS[recipe.family]
    tokenizer = llama_tokenizer(seed, recipe.family)
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
    """The model of a folder, to be trained on: in one of MODELS, its own or one of the same parts.

    raises: NanogapError where its tensors are not those of the model
    """
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
