"""Drawn scenes with referring expressions: what the mini model learns from.

    python -m nanogap.train.scenes SPLIT INDEX OUT.jpg

In:  a split's name and an index, or a Random: the same draws the same scene, to the byte.
Out: an image, the things in it with tight boxes, and expressions, each true of exactly one thing:
     by name ("the man in blue"), place ("the man on the left") or landmark ("left of the tree").
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

from PIL import Image

from nanogap.checks.command import Parser, answer_for, path_argument, whole_number
from nanogap.checks.output import check_picture, save_picture
from nanogap.image import Box
from nanogap.train.drawing import render
from nanogap.train.places import arrange, relations, superlatives

Cast = Sequence[tuple[str, str]]             # (kind, colour) of each thing

COLOURS = {
    "red": (212, 36, 40),
    "orange": (245, 134, 0),
    "yellow": (250, 214, 40),
    "green": (30, 138, 58),
    "blue": (38, 90, 214),
    "purple": (124, 50, 166),
    "pink": (246, 118, 182),
    "black": (34, 34, 40),
}
KINDS = {   # name: (plural, width / height)
    "man": ("men", 0.44),
    "woman": ("women", 0.46),
    "dog": ("dogs", 1.3),
    "car": ("cars", 1.9),
    "tree": ("trees", 0.7),
    "ball": ("balls", 1.0),
    "house": ("houses", 1.1),
    "cup": ("cups", 1.15),
}
KIND_WEIGHTS = (3, 3, 2, 2, 2, 2, 2, 2)      # how often each is drawn
PEOPLE = ("man", "woman", "person", "men", "women")
NUMBERS = ("two", "three", "four", "five", "six", "seven")
SHAPES = ((1, 1), (4, 3), (3, 2), (16, 10), (3, 4), (2, 3))   # width : height of the image


def usually(place: str, *rarely: str) -> list[str]:
    """Wordings of a place, of which "the {0} on the left" is chosen most often."""
    return 3 * [f"the {{0}}{place}"] + [f"{{0}}{place}", *rarely]


PHRASES = {   # {0} is the thing that is meant, {1} its landmark
    "name": usually(""),
    "left": usually(" on the left", "the left {0}", "the leftmost {0}"),
    "right": usually(" on the right", "the right {0}", "the rightmost {0}"),
    "top": usually(" at the top", "the top {0}"),
    "bottom": usually(" at the bottom", "the bottom {0}"),
    "middle": usually(" in the middle", "the middle {0}"),
    "biggest": ["the biggest {0}", "the largest {0}"],
    "smallest": ["the smallest {0}"],
    "above": ["the {0} above the {1}"],
    "below": ["the {0} below the {1}"],
    "left of": ["the {0} to the left of the {1}", "the {0} left of the {1}"],
    "right of": ["the {0} to the right of the {1}", "the {0} right of the {1}"],
    "next to": ["the {0} next to the {1}", "the {0} by the {1}"],
}


@dataclass(frozen=True)
class Thing:
    """One drawn object; its box, in pixels of the image, is tight around the drawing."""

    kind: str
    colour: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """An RGB image, what is in it, and (expression, index into things) for each true expression."""

    image: Image.Image
    things: tuple[Thing, ...]
    expressions: tuple[tuple[str, int], ...]


def named(noun: str, colour: str) -> str:
    """A noun with its colour: "man in blue", "blue car"."""
    return f"{noun} in {colour}" if noun in PEOPLE else f"{colour} {noun}"


def expressions(things: Sequence[Thing], long: float, rng: Random) -> Iterator[tuple[str, int]]:
    """Yield (expression, index) once for each way to tell exactly one thing apart.

    long: long side of the image, pixels
    """
    boxes = [thing.box for thing in things]
    bearers: dict[str, list[int]] = {}   # of each name: "man", "man in blue", "person" ...
    for i, thing in enumerate(things):
        for noun in [thing.kind, "person"] if thing.kind in PEOPLE else [thing.kind]:
            for name in (noun, named(noun, thing.colour)):
                bearers.setdefault(name, []).append(i)
    true: dict[tuple[str, str, int], list[str]] = {}   # (form, name, thing): landmarks
    # Where all men are in blue, "the man on the left" is enough: the first name for a group.
    groups = {tuple(group): name for name, group in reversed(bearers.items()) if len(group) > 1}
    for group, name in groups.items():
        for form, i in superlatives({i: boxes[i] for i in group}, long).items():
            true[form, name, i] = [""]
    true |= {("name", name, among[0]): [""] for name, among in bearers.items() if len(among) == 1}
    for j, other in enumerate(things):
        own_names = [name for name in (other.kind, named(other.kind, other.colour))
                     if bearers[name] == [j]]
        for noun in KINDS:
            others = {i: boxes[i] for i in bearers.get(noun, []) if i != j}
            if own_names and len(others) > 1:
                for form, i in relations(others, other.box, long).items():
                    true.setdefault((form, noun, i), []).append(own_names[0])
    for (form, name, i), landmarks in true.items():
        yield rng.choice(PHRASES[form]).format(name, rng.choice(landmarks)), i


def contents(things: Iterable[Thing]) -> Counter[tuple[str, str]]:
    """How many there are of each kind and colour; a caption is true where there are as many."""
    return Counter((thing.kind, thing.colour) for thing in things)


def caption(things: Iterable[Thing], rng: Random) -> str:
    """Say what is there, in random order, and not where: "a man in blue and two green trees"."""
    parts = []
    for (kind, colour), count in contents(things).items():
        noun = named(kind if count == 1 else KINDS[kind][0], colour)
        article = "an" if noun.startswith("o") else "a"                       # an orange ...
        parts.append(f"{(article, *NUMBERS)[count - 1]} {noun}")
    rng.shuffle(parts)
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def words_never_taught(text: str) -> list[str]:
    """The words of an expression that no scene is described with, as training had it."""
    taught = {*KINDS, *COLOURS, "person", "in", "a", "an", "and", *NUMBERS}
    taught |= {plural for plural, _ in KINDS.values()}
    taught |= set(" ".join(chain(*PHRASES.values())).split())
    return [word for word in re.findall(r"\w+", text) if word.lower() not in taught]


def deal(rng: Random) -> Cast:
    """Deal two to seven things of few kinds, so that a kind alone is seldom enough."""
    kinds = rng.choices(list(KINDS), KIND_WEIGHTS, k=rng.randint(1, 3))
    colours = rng.sample(list(COLOURS), rng.randint(2, 6))
    count = rng.choices(range(2, 8), (1, 4, 5, 5, 3, 2))[0]
    return [(rng.choice(kinds), rng.choice(colours)) for _ in range(count)]


def draw_scene(rng: Random, size: int = 336, cast: Cast | None = None) -> Scene:
    """Draw two to seven things and find the expressions that tell them apart.

    size: long side of the image, pixels; things need some 32
    cast: of all things; None = deal some, and leave out what finds no room
    """
    told: tuple[tuple[str, int], ...] = ()
    while not told:
        shape = rng.choice(SHAPES)
        width, height = (round(size * side / max(shape)) for side in shape)
        dealt = cast or deal(rng)
        placed = arrange([KINDS[kind][1] for kind, _ in dealt], width, height, rng)
        things = [Thing(*dealt[i], box) for i, box in placed.items()]
        things.sort(key=lambda thing: thing.box[3])          # the nearest to the viewer is last
        if len(things) >= (len(cast) if cast else 2):
            told = tuple(expressions(things, size, rng))
    coloured = [(thing.kind, COLOURS[thing.colour], thing.box) for thing in things]
    return Scene(render(coloured, width, height, rng), tuple(things), told)


def scene(split: str, index: int, size: int = 336) -> Scene:
    """Draw the scene of a split (any word) and an index, the same at every call."""
    return draw_scene(Random(f"{split}/{index}"), size)


NOTE, DESCRIPTION = "nanogap scene {} {}", 0x010E     # in the EXIF of a picture that is written


def scene_of(path: str | Path) -> Scene | None:
    """The scene that a picture shows, where it notes one; no photograph does."""
    with Image.open(path) as image:
        size, note = image.size, ""
        with suppress(Exception):                       # broken EXIF notes nothing
            note = str(image.getexif().get(DESCRIPTION))
    said = re.fullmatch(NOTE.format("([!-~]+)", "([0-9]{1,9})"), note)
    if said is None or not 32 <= max(size) <= 4096:     # in which a scene is soon drawn
        return None
    drawn = scene(said[1], int(said[2]), max(size))
    return drawn if drawn.image.size == size else None


def command(argv: Sequence[str] | None) -> None:
    """Draw one scene, and print its expressions with their boxes."""
    parser = Parser(prog="python -m nanogap.train.scenes", description="Draw one scene.")
    parser.add_argument("split", help="any word; with the index it seeds the scene")
    parser.add_argument("index", type=whole_number)
    parser.add_argument("out", type=path_argument, help="picture to write, such as scene.jpg")
    args = parser.parse_args(argv)
    check_picture("OUT", args.out)
    drawn = scene(args.split, args.index, 672)
    exif = Image.Exif()
    exif[DESCRIPTION] = NOTE.format(args.split, args.index)
    save_picture("OUT", args.out, drawn.image, quality=92, exif=exif)
    for text, i in drawn.expressions:
        print(f"{text:40} {drawn.things[i].box}")


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.train.scenes", command, None))
