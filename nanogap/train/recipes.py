"""How small models are trained: their sizes, the stages of the training, and what these draw."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from nanogap.clip import CLIPTextConfig, CLIPVisionConfig
from nanogap.llama import LlamaConfig
from nanogap.train.scenes import COLOURS, KINDS, Scene, deal, draw_scene, named


def draw_single(rng: random.Random, size: int) -> Scene:
    return draw_scene(rng, size, deal(rng)[:1])


def draw_often_alike(rng: random.Random, size: int) -> Scene:
    """Draw two times in three things alike in kind, or in colour, each named by both."""
    if rng.random() >= 2 / 3:
        return draw_scene(rng, size)
    count = rng.randint(2, 4)
    kinds = rng.sample(list(KINDS), count)
    colours = rng.sample(list(COLOURS), count)
    if rng.random() < 0.8:
        kinds = kinds[:1] * count
    else:
        colours = colours[:1] * count
    drawn = draw_scene(rng, size, list(zip(kinds, colours, strict=True)))
    names = (f"the {named(thing.kind, thing.colour)}" for thing in drawn.things)
    return replace(drawn, expressions=tuple((name, i) for i, name in enumerate(names)))


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own warm-up and decay."""

    name: str
    minutes: float               # on two CPU cores; also its share of --minutes
    steps: int
    images: int                  # of a step
    rate: float                  # AdamW's
    muon_rate: float = 0.0       # 0: AdamW alone
    rate_left: float = 0.0       # the share of the rates that is left at the end
    draw: Callable[[random.Random, int], Scene] = draw_scene
    # how many questions of a kind a step asks at most: see `turns_about`
    asked: dict[str, int] = field(default_factory=dict)
    later: float = 0.0           # share of the questions that come after one or two others
    # what tokens of answers weigh in the loss, where it is not 1, by kind (of "find" the last token
    # alone counts); "hundredths": of a box, and what is smaller
    weights: dict[str, float] = field(default_factory=dict)

    def share(self, processes: int) -> "Stage":
        """What each of several processes does of it."""
        return replace(self, images=math.ceil(self.images / processes), asked={
            kind: math.ceil(count / processes) for kind, count in self.asked.items()})


@dataclass(frozen=True)
class Recipe:
    vision: CLIPVisionConfig
    text: CLIPTextConfig
    decoder: LlamaConfig
    stages: tuple[Stage, ...]    # the first is CLIP's, the others are the VLM's
    family: str = "llava"        # one of nanogap.models.MODELS


CLIP = Stage("CLIP", minutes=28, steps=4500, images=32, rate=1e-3)
READ = Stage("read", minutes=7, steps=1000, images=16, rate=2.5e-3, draw=draw_single,
             asked={"box": 128, "description": 16})
FIND = Stage("find", minutes=36, steps=2600, images=24, rate=1.5e-3, muon_rate=0.006,
             rate_left=0.5, draw=draw_often_alike,
             asked={"box": 48, "find": 120, "word": 32, "description": 8},
             weights={"find": 20.0, "word": 3.0, "hundredths": 0.25})
BOX = Stage("box", minutes=60, steps=3250, images=16, rate=1.5e-3, muon_rate=0.004,
            asked={"box": 120, "find": 48, "word": 16, "description": 8}, later=0.6,
            weights={"find": 6.0, "word": 3.0})
# LLaVA in miniature, 12 x 12 patches, for two CPU cores.
RECIPE = Recipe(
    vision=CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        image_size=168, patch_size=14),
    text=CLIPTextConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=0),
    decoder=LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, vocab_size=0, rms_norm_eps=1e-5,
        max_position_embeddings=2048),
    stages=(CLIP, READ, FIND, BOX))


def recipe_for(family: str) -> Recipe:
    """The same for another family."""
    vision = RECIPE.vision
    if family == "minigpt_v2":   # of small patches, since four make a token; 32 x 32, as published
        vision = replace(vision, image_size=32 * 8, patch_size=8, layer_norm_eps=1e-6)
    return replace(RECIPE, family=family, vision=vision)
