"""What training draws: scenes of each kind, batch by batch.

In:  a seed.  Out: a batch of scenes, ready for the model, and what is said of them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanogap.train.scenes import COLOURS, KINDS, Scene, deal, draw_scene, named

Draw = Callable[[random.Random, int], Scene]
Prepare = Callable[[Image.Image], Tensor]
Ask = Callable[[list[Scene], random.Random], Any]
Batch = tuple[list[Tensor], list[Scene], Any]


def draw_single(rng: random.Random, size: int) -> Scene:
    """Draw one thing."""
    return draw_scene(rng, size, deal(rng)[:1])


def draw_alike(rng: random.Random, size: int) -> Scene:
    """Draw two to four things that are alike, each named by kind and colour.

    Four times in five they are of one kind, else of one colour.
    """
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


def draw_often_alike(rng: random.Random, size: int) -> Scene:
    """Draw things that are alike two times in three, else two to seven of any kind and colour."""
    return draw_alike(rng, size) if rng.random() < 2 / 3 else draw_scene(rng, size)


@dataclass
class Scenes(torch.utils.data.Dataset):
    """Item `step` is the batch of a training step.

    A split is one word, so these seeds, of several words, are never a split's.
    """

    seed: str
    images: int                   # of a batch
    image_size: int               # long side of the smaller ones, pixels
    prepare: Prepare              # a model's pixel_values, on the CPU
    ask: Ask                      # what is said of the scenes: captions or conversations
    draw: Draw = draw_scene

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"train {self.seed} {step}")
        scenes = []
        pixels = []
        for _ in range(self.images):
            # pictures are as large as the model sees them, or twice as large
            scene = self.draw(rng, rng.choice((1, 2)) * self.image_size)
            pixels.append(self.prepare(scene.image))                          # (views, 3, S, S)
            # from here on only the size of a picture is needed: workers need not send it
            scenes.append(replace(scene, image=Image.new("1", scene.image.size)))
        return pixels, scenes, self.ask(scenes, rng)
