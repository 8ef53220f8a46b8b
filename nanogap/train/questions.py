"""What is drawn, asked and answered in training, batch by batch.

In:  a seed, and a stage of the training.
Out: scenes ready for the model, and what is said of them: for LLaVA conversations in tokens, and
     what each token weighs in the loss.
Source: the kinds of answers are those of LLaVA-1.5's own mixture, arXiv 2310.03744.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
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

Batch = tuple[list[Tensor], list[Scene], Any]


@dataclass
class Scenes(torch.utils.data.Dataset):
    """Item `step` is the batch of a training step, which no split of scenes.py holds."""

    seed: int
    stage: Stage
    image_size: int                                     # long side of the smaller ones, pixels
    prepare: Callable[[Image.Image], Tensor]            # a model's pixel_values, on the CPU
    ask: Callable[[list[Scene], random.Random], Any]    # for captions or conversations

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"train {self.seed} {self.stage.name.lower()} {step}")
        scenes = []
        pixels = []
        for _ in range(self.stage.images):
            # pictures are as large as the model sees them, or twice as large
            scene = self.stage.draw(rng, rng.choice((1, 2)) * self.image_size)
            pixels.append(self.prepare(scene.image))                          # (views, 3, S, S)
            # from here on only the size of a picture is needed: workers need not send it
            scenes.append(replace(scene, image=Image.new("1", scene.image.size)))
        return pixels, scenes, self.ask(scenes, rng)


@dataclass(frozen=True)
class Turn:
    """A question about one of the images, and the tokens of its answer."""

    kind: str
    image: int
    question: str
    answer: list[int]              # with the end token, if whole
    weights: list[float]           # of these in the loss


@dataclass(frozen=True)
class Conversation:
    """One or more turns as the model is fed them."""

    kind: str                      # that of its only turn, or "turns"
    image: int
    tokens: list[int]              # (T,) with one image token
    weights: list[float]           # (T,) 0 for what is no answer


def conversations(model: VLM, stage: Stage, scenes: list[Scene],
                  rng: random.Random) -> list[Conversation]:
    """Every question once, alone or after others about the same image."""
    asked = list(turns_about(model, stage, scenes, rng))
    said = []
    for turn in asked:
        earlier: list[Turn] = []
        if rng.random() < stage.later:
            others = [other for other in asked
                      if other.image == turn.image and other.kind != "find" and other is not turn]
            earlier = rng.sample(others, min(rng.randint(1, 2), len(others)))
        said.append(converse(model, [*earlier, turn]))
    return said


def converse(model: VLM, turns: Sequence[Turn]) -> Conversation:
    """Turns about an image, one behind the other in the form of the model's template."""
    tokens: list[int] = []
    weights: list[float] = []
    for turn in turns:
        asked = (encode(model.tokenizer, model.follow(turn.question)) if tokens
                 else model.encode_question(turn.question).tolist())
        tokens += asked + turn.answer
        weights += [0.0] * len(asked) + turn.weights
    kind = turns[0].kind if len(turns) == 1 else "turns"
    return Conversation(kind, turns[0].image, tokens, weights)


def turns_about(model: VLM, stage: Stage, scenes: list[Scene],
                rng: random.Random) -> Iterator[Turn]:
    """Questions for boxes, for their first tokens, for a word, and for descriptions."""
    end = [model.config.eos_token]
    places = [(i, expression, thing) for i, scene in enumerate(scenes)
              for expression, thing in scene.expressions]
    for kind, count in (("box", stage.boxes), ("find", stage.finds)):
        for i, expression, thing in rng.sample(places, min(count, len(places))):
            box = model.frame.from_pixels(scenes[i].things[thing].box, *scenes[i].image.size)
            answer = encode(model.tokenizer, model.box_format.say(box)) + end
            digits = decimal_places([model.tokenizer.decode([token]) for token in answer])
            weights = [stage.hundredths if place > 1 else 1.0 for place in digits]
            if kind == "find":
                tenth = digits.index(1)
                answer, weights = answer[:tenth + 1], [0.0] * tenth + [stage.find]
            yield Turn(kind, i, model.question(expression), answer, weights)
    short = [(i, *asked) for i, scene in enumerate(scenes) for asked in short_questions(scene, rng)]
    said = [("word", stage.word, *asked)
            for asked in rng.sample(short, min(stage.words, len(short)))]
    said += [("description", 1.0, i, DESCRIBE, caption(scene.things, rng))
             for i, scene in enumerate(scenes[:stage.descriptions])]
    for kind, weight, i, question, text in said:
        answer = encode(model.tokenizer, text) + end
        yield Turn(kind, i, question, answer, [weight] * len(answer))


def decimal_places(tokens: Sequence[str]) -> list[int]:
    """Which place of a number each token of a box is: 1 for tenths, 2 hundredths; 0 for the rest.

    In "[0.12" these are the digits behind the point, in "{<12>" (of a hundred) both; the only digit
    of "{<7>" counts as tenths.
    """
    text = "".join(tokens)
    places = [0] * (len(text) + 1)
    for number in re.finditer(r"(?:\d+\.)?(\d+)", text):
        for place, at in enumerate(range(*number.span(1)), 1):
            places[at] = place
    return [places[at] for at in accumulate(map(len, tokens[:-1]), initial=0)]


def short_questions(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield questions with one word for an answer, as in LLaVA-1.5's own mixture (VQAv2, GQA)."""
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
