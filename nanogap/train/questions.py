"""What is drawn, asked and answered in training, batch by batch.

In:  a seed, and a stage of the training.
Out: scenes ready for the model, and what is said of them: captions for CLIP, conversations for the
     others, with the kinds of answers of LLaVA-1.5's own mixture (arXiv 2310.03744).
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanogap.models import VLM
from nanogap.prompt import DESCRIBE, encode
from nanogap.train.recipes import Stage
from nanogap.train.scenes import COLOURS, KINDS, Scene, Thing, caption

PICTURES = (168, 336)      # long sides, pixels: as large as most models see them, or twice that
Batch = tuple[list[Tensor], list[Scene], Any]     # pixel_values, and captions or conversations
SINGLES = [Thing(kind, colour, (0.0, 0.0, 1.0, 1.0)) for kind in KINDS for colour in COLOURS]


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
