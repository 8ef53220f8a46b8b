"""How small models are trained: their sizes, the stages, and what these draw, ask and answer.

In:  a seed and a stage.  Out: batch by batch, scenes and what is said of them: captions for CLIP,
then conversations, with answers as in LLaVA-1.5's own mixture (arXiv 2310.03744).
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanogap.clip import CLIPTextConfig, CLIPVisionConfig
from nanogap.llama import LlamaConfig
from nanogap.models import VLM
from nanogap.prompt import DESCRIBE, encode
from nanogap.train.scenes import COLOURS, KINDS, Scene, Thing, caption, deal, draw_scene, named

PICTURES = (168, 336)      # long sides, pixels: as large as most models see them, or twice that
Batch = tuple[list[Tensor], list[Scene], Any]     # pixel_values, and captions or conversations
SINGLES = [Thing(kind, colour, (0.0, 0.0, 1.0, 1.0)) for kind in KINDS for colour in COLOURS]


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
    # what tokens of answers weigh, if not 1: by kind ("find": its last), or "hundredths" of boxes
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
RECIPE = Recipe(                 # LLaVA in miniature, 12 x 12 patches, for two CPU cores
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


@dataclass
class Scenes(torch.utils.data.Dataset):
    """Item `step` is the batch of a training step, which no split of scenes.py holds."""

    seed: int
    stage: Stage
    model: VLM              # prepares pictures and asks, on the CPU

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"train {self.seed} {self.stage.name.lower()} {step}")
        scenes = []
        pixels = []
        for _ in range(self.stage.images):
            scene = self.stage.draw(rng, rng.choice(PICTURES))
            pixels.append(self.model.pixel_values(scene.image))               # (views, 3, S, S)
            # from here on only the size of a picture is needed: workers need not send it
            scenes.append(replace(scene, image=Image.new("1", scene.image.size)))
        if self.stage.name != "CLIP":
            return pixels, scenes, conversations(self.model, self.stage, scenes, rng)
        whole = [caption(scene.things, rng) for scene in scenes]
        return pixels, scenes, (whole, [caption([thing], rng) for thing in SINGLES])


@dataclass(frozen=True)
class Turn:
    """A question about one of the images, and the tokens of its answer."""

    kind: str
    image: int
    question: str
    answer: list[int]
    weights: list[float]           # of these in the loss


@dataclass(frozen=True)
class Conversation:
    """One or more turns as the model is fed them."""

    kind: str                      # that of its only turn, or "turns"
    image: int
    head: tuple[int, ...]          # (P,) tokens before the image
    tokens: list[int]              # (T,) tokens behind it
    weights: list[float]           # (T,) of these in the loss, 0 for what is no answer


def conversations(model: VLM, stage: Stage, scenes: list[Scene],
                  rng: random.Random) -> list[Conversation]:
    """Every question once, alone or after others about the same image."""
    turns = turns_about(model, stage, scenes, rng)
    said = []
    for turn in turns:
        earlier: list[Turn] = []
        if rng.random() < stage.later:
            others = [other for other in turns
                      if other.image == turn.image and other.kind != "find" and other is not turn]
            earlier = rng.sample(others, min(rng.randint(1, 2), len(others)))
        tokens: list[int] = []
        weights: list[float] = []
        for one in [*earlier, turn]:              # one behind the other, in the template's form
            asked = (encode(model.tokenizer, model.follow(one.question)) if tokens
                     else model.encode_question(one.question).tolist())
            tokens += asked + one.answer
            weights += [0.0] * len(asked) + one.weights
        P = tokens.index(model.config.image_token)
        said.append(Conversation("turns" if earlier else turn.kind, turn.image,
                                 tuple(tokens[:P]), tokens[P + 1:], weights[P + 1:]))
    return said


def turns_about(model: VLM, stage: Stage, scenes: list[Scene], rng: random.Random) -> list[Turn]:
    """Questions for boxes, words and descriptions; "find": a box that stops at "[0.1"."""
    def some(kind: str, pool: list[tuple[int, str, str]]) -> list[tuple[str, int, str, str]]:
        chosen = rng.sample(pool, min(stage.asked.get(kind, 0), len(pool)))
        return [(kind, *one) for one in chosen]

    boxes = [(i, *said) for i, scene in enumerate(scenes) for said in box_questions(model, scene)]
    asked = some("box", boxes) + some("find", boxes)
    words = [(i, *said) for i, scene in enumerate(scenes) for said in short_questions(scene, rng)]
    asked += some("word", words)
    asked += [("description", i, DESCRIBE, caption(scene.things, rng))
              for i, scene in enumerate(scenes[:stage.asked["description"]])]
    turns = []
    for kind, i, question, text in asked:
        answer = [*encode(model.tokenizer, text), model.config.eos_token]
        places = decimal_places([model.tokenizer.decode([token]) for token in answer])
        weight = stage.weights.get(kind, 1.0)
        weights = [stage.weights.get("hundredths", 1.0) if p > 1 else weight for p in places]
        if kind == "find":
            tenth = places.index(1)
            answer = answer[:tenth + 1]
            weights = [0.0] * tenth + [weight]
        turns.append(Turn(kind, i, question, answer, weights))
    return turns


def box_questions(model: VLM | type[VLM], scene: Scene) -> Iterator[tuple[str, str]]:
    """Yield the question about each expression, and its box as the model says it."""
    for expression, thing in scene.expressions:
        box = model.frame.from_pixels(scene.things[thing].box, *scene.image.size)
        yield model.template.question(expression), model.box_format.say(box)


def decimal_places(tokens: Sequence[str]) -> list[int]:
    """Which place each token is: 1 for tenths, as in "[0.1" and "{<1"; 2 hundredths; 0 the rest."""
    text = "".join(tokens)
    places = [0] * (len(text) + 1)
    for number in re.finditer(r"(?:\d+\.)?(\d+)", text):
        for place, at in enumerate(range(*number.span(1)), 1):
            places[at] = place
    return [places[at] for at in accumulate(map(len, tokens[:-1]), initial=0)]


def short_questions(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield questions with one word for an answer (as of VQAv2 and GQA)."""
    for expression, thing in scene.expressions:
        if not {*COLOURS} & {*expression.split()}:
            question = f"What colour is the {expression.removeprefix('the ')}?"
            yield question, scene.things[thing].colour
    there = [(thing.kind, thing.colour) for thing in scene.things]
    for kind, colour in there:
        if [c for _, c in there].count(colour) == 1:
            yield f"What is {colour}?", kind
        other_colour = (kind, rng.choice([*COLOURS]))
        other_kind = (rng.choice([*KINDS]), colour)
        asked = rng.choice([(kind, colour), (kind, colour), other_colour, other_kind])
        one = caption([Thing(*asked, (0.0, 0.0, 1.0, 1.0))], rng)             # "a red car"
        yield f"Is there {one}?", "yes" if asked in there else "no"
