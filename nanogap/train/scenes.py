"""Drawn scenes with referring expressions: what the mini model learns from.

In:  a split's name and an index, or a Random.
Out: an image, the things in it with tight boxes, and expressions, each true of exactly one thing.

    python -m nanogap.train.scenes SPLIT INDEX OUT.jpg [--size 672]

The picture notes in its EXIF which scene it is, so that `run.py` can draw the true box.

A thing can be told apart by its name ("the man in blue"), by its place among others of that name
("the man on the left"), or by a landmark ("the man left of the tree").  An expression is given only
where a margin makes it clear.  The same Random draws the same scene, to the byte.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import hypot, log
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from nanogap.checks.command import Parser, answer_for, path_argument, whole_number
from nanogap.checks.output import check_picture, save_picture
from nanogap.errors import NanogapError
from nanogap.image import Box

Cast = Sequence[tuple[str, str]]             # (kind, colour) of each thing
Colour = tuple[int, ...]                     # red, green, blue

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
ABOVE = ((186, 214, 238), (206, 216, 226), (236, 226, 206), (206, 224, 214))   # sky, wall
BELOW = ((172, 196, 140), (232, 216, 178), (160, 162, 168), (190, 160, 130))   # grass to floor
MIN_SIZE, MAX_SIZE = 32, 4096                # of the image's long side, pixels
TRIES = 48                                   # to find room for a thing

HIDDEN = 0.25   # at most this share of a box lies under, or over, the boxes of others
MARGIN = 0.12   # this much further left, right, up or down is clear; of the image's long side
BIGGER = 1.8    # ratio of areas from which one thing is clearly the bigger
NEAR = 0.5      # "next to": at most so far, of the image's long side,
NEARER = 0.6    # and at most this share of the distance of the second nearest

PHRASES = {   # {0} is the thing that is meant, {1} its landmark; a wording listed thrice is usual
    "name": ["the {0}", "the {0}", "the {0}", "{0}"],
    "left": ["the {0} on the left", "the {0} on the left", "the {0} on the left",
             "{0} on the left", "the left {0}", "the leftmost {0}"],
    "right": ["the {0} on the right", "the {0} on the right", "the {0} on the right",
              "{0} on the right", "the right {0}", "the rightmost {0}"],
    "top": ["the {0} at the top", "the {0} at the top", "the {0} at the top",
            "{0} at the top", "the top {0}"],
    "bottom": ["the {0} at the bottom", "the {0} at the bottom", "the {0} at the bottom",
               "{0} at the bottom", "the bottom {0}"],
    "middle": ["the {0} in the middle", "the {0} in the middle", "the {0} in the middle",
               "{0} in the middle", "the middle {0}"],
    "biggest": ["the biggest {0}", "the largest {0}"],
    "smallest": ["the smallest {0}"],
    "above": ["the {0} above the {1}"],
    "below": ["the {0} below the {1}"],
    "left of": ["the {0} to the left of the {1}", "the {0} left of the {1}"],
    "right of": ["the {0} to the right of the {1}", "the {0} right of the {1}"],
    "next to": ["the {0} next to the {1}", "the {0} by the {1}"],
}

INKS: dict[str, tuple[Colour, ...]] = {   # a thing is drawn with one of each; see also `mix_inks`
    "skin": ((250, 214, 186), (220, 172, 136), (136, 92, 66)),
    "jet": ((44, 44, 50),),
    "brown": ((46, 34, 30), (110, 70, 42), (196, 156, 90)),
    "pale": ((216, 234, 242),),
    "ash": ((62, 68, 92), (84, 84, 90), (92, 80, 68)),
}
# shape, ink, and x, y, x, y, ... in percent of the thing's box, whose four sides a drawing touches
DRAWINGS: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {
    "man": [
        ("slab", "skin", (42, 17, 58, 27)),
        ("oval", "brown", (25, 0, 75, 18)),
        ("oval", "skin", (29, 4, 71, 21)),
        ("oval", "jet", (38, 10, 44, 13)),
        ("oval", "jet", (56, 10, 62, 13)),
        ("oval", "skin", (0, 53, 18, 62)),
        ("oval", "skin", (82, 53, 100, 62)),
        ("poly", "ash", (24, 55, 76, 55, 82, 95, 57, 95, 50, 66, 43, 95, 18, 95)),
        ("oval", "jet", (9, 93, 44, 100)),
        ("oval", "jet", (56, 93, 91, 100)),
        ("poly", "own", (30, 23, 70, 23, 88, 29, 99, 55, 84, 58, 74, 40,
                         76, 59, 24, 59, 26, 40, 16, 58, 1, 55, 12, 29)),
    ],
    "woman": [
        ("oval", "brown", (20, 0, 80, 22)),
        ("slab", "brown", (20, 11, 80, 31)),
        ("slab", "skin", (43, 19, 57, 27)),
        ("oval", "skin", (31, 4, 69, 21)),
        ("oval", "jet", (39, 11, 45, 14)),
        ("oval", "jet", (55, 11, 61, 14)),
        ("slab", "skin", (33, 72, 45, 96)),
        ("poly", "skin", (50, 20, 100, 52, 89, 57, 50, 30, 11, 57, 0, 52)),
        ("slab", "skin", (55, 72, 67, 96)),
        ("oval", "jet", (26, 94, 46, 100)),
        ("oval", "jet", (54, 94, 74, 100)),
        ("poly", "own", (26, 24, 74, 24, 80, 32, 67, 36, 66, 43,
                         96, 77, 4, 77, 34, 43, 33, 36, 20, 32)),
    ],
    "dog": [
        ("poly", "own", (0, 10, 7, 10, 24, 46, 14, 54)),
        ("slab", "tone", (24, 60, 33, 97)),
        ("slab", "tone", (64, 60, 73, 97)),
        ("slab", "own", (14, 60, 24, 100)),
        ("slab", "own", (54, 60, 64, 100)),
        ("oval", "own", (12, 38, 76, 76)),
        ("oval", "own", (56, 0, 90, 50)),
        ("oval", "own", (74, 20, 100, 46)),
        ("oval", "tone", (54, 4, 68, 46)),
        ("oval", "jet", (92, 22, 100, 34)),
        ("oval", "jet", (77, 13, 82, 20)),
    ],
    "car": [
        ("poly", "own", (14, 44, 30, 0, 68, 0, 86, 44)),
        ("poly", "pale", (22, 40, 33, 8, 65, 8, 77, 40)),
        ("slab", "own", (47, 4, 51, 42)),
        ("oval", "own", (0, 36, 30, 86)),
        ("oval", "own", (70, 36, 100, 86)),
        ("slab", "own", (9, 36, 91, 80)),
        ("oval", "jet", (13, 58, 35, 100)),
        ("oval", "jet", (65, 58, 87, 100)),
        ("oval", "pale", (20, 71, 28, 87)),
        ("oval", "pale", (72, 71, 80, 87)),
        ("oval", "pale", (93, 50, 99, 62)),
    ],
    "tree": [
        ("slab", "brown", (42, 50, 58, 100)),
        ("oval", "own", (0, 26, 100, 68)),
        ("oval", "own", (16, 0, 84, 50)),
        ("oval", "tone", (28, 30, 38, 37)),
        ("oval", "tone", (60, 16, 70, 23)),
        ("oval", "tone", (70, 46, 80, 53)),
    ],
    "ball": [
        ("oval", "tone", (0, 0, 100, 100)),
        ("oval", "own", (5, 5, 95, 95)),
        ("oval", "tone", (28, 2, 72, 98)),
        ("oval", "own", (35, 5, 65, 95)),
    ],
    "house": [
        ("slab", "ash", (72, 6, 84, 30)),
        ("slab", "own", (8, 38, 92, 100)),
        ("poly", "ash", (0, 44, 44, 0, 56, 0, 100, 44)),
        ("slab", "brown", (42, 62, 60, 100)),
        ("slab", "pale", (17, 54, 34, 74)),
        ("slab", "pale", (68, 54, 84, 74)),
    ],
    "cup": [
        ("poly", "own", (64, 24, 88, 24, 100, 36, 100, 60, 87, 74, 60, 74,
                         60, 62, 82, 62, 89, 55, 89, 41, 83, 36, 64, 36)),
        ("poly", "own", (0, 8, 74, 8, 64, 100, 10, 100)),
        ("oval", "own", (0, 0, 74, 16)),
        ("oval", "tone", (5, 3, 69, 13)),
    ],
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


# ----- what is clearly so -------------------------------------------------------------------------


def shared_area(a: Box, b: Box) -> float:
    """The area that two boxes share; of a box and itself, its own area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def centre(box: Box) -> tuple[float, float]:
    """The middle of a box (x, y)."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def superlatives(things: Sequence[Thing], among: Sequence[int], long: float) -> dict[str, int]:
    """Find which of two or more things (indices) is clearly the left one, the biggest, and so on.

    long:    long side of the image, pixels
    returns: {"left": index, ...}, only what is clear; "middle" is of a row of three, no column
    """
    boxes = {i: things[i].box for i in among}
    clear = MARGIN * long
    x = {i: centre(box)[0] / clear for i, box in boxes.items()}
    y = {i: centre(box)[1] / clear for i, box in boxes.items()}
    area = {i: log(shared_area(box, box), BIGGER) for i, box in boxes.items()}
    found = ends(x, "left", "right") | ends(y, "top", "bottom") | ends(area, "smallest", "biggest")
    in_a_row = "left" in found and "right" in found
    in_a_column = "top" in found and "bottom" in found
    if len(among) == 3 and in_a_row and not in_a_column:
        (found["middle"],) = set(among) - {found["left"], found["right"]}
    return found


def ends(measures: dict[int, float], first: str, last: str) -> dict[str, int]:
    """Which index has the lowest measure, and which the highest, where it is so by 1 or more."""
    order = sorted(measures, key=lambda i: (measures[i], i))
    found = {}
    if measures[order[1]] - measures[order[0]] >= 1:
        found[first] = order[0]
    if measures[order[-1]] - measures[order[-2]] >= 1:
        found[last] = order[-1]
    return found


# how far one thing lies from another in a direction, and how far off to the side; dx is to the
# right, dy downwards
DIRECTIONS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "left of": lambda dx, dy: (-dx, abs(dy)),
    "right of": lambda dx, dy: (dx, abs(dy)),
    "above": lambda dx, dy: (-dy, abs(dx)),
    "below": lambda dx, dy: (dy, abs(dx)),
}


def relations(things: Sequence[Thing], among: Sequence[int], to: int,
              long: float) -> dict[str, int]:
    """Find which of two or more things (indices) is the one next to, left of, ... the thing `to`.

    long:    long side of the image, pixels
    returns: {"left of": index, ...}, only what is clear; no other may be on that side at all
    """
    x, y = centre(things[to].box)
    away = {}                                # (dx, dy) from the landmark, of the image's long side
    for i in among:
        other_x, other_y = centre(things[i].box)
        away[i] = (other_x / long - x / long, other_y / long - y / long)
    found = {}
    distances = {i: hypot(*away[i]) for i in among}
    nearest, second = sorted(among, key=lambda i: (distances[i], i))[:2]
    if distances[nearest] < min(NEAR, NEARER * distances[second]):
        found["next to"] = nearest
    for word, direction in DIRECTIONS.items():
        on_that_side = [i for i in among if direction(*away[i])[0] > 0]
        if len(on_that_side) != 1:
            continue
        ahead, aside = direction(*away[on_that_side[0]])
        if ahead >= max(MARGIN, aside):
            found[word] = on_that_side[0]
    return found


# ----- words --------------------------------------------------------------------------------------


def named(noun: str, colour: str) -> str:
    """A noun with its colour: "man in blue", "blue car"."""
    return f"{noun} in {colour}" if noun in PEOPLE else f"{colour} {noun}"


def names_of(things: Sequence[Thing]) -> dict[str, list[int]]:
    """Every name, such as "man", "man in blue" or "person", and the things (indices) it fits."""
    bearers: dict[str, list[int]] = {}
    for i, thing in enumerate(things):
        nouns = [thing.kind, "person"] if thing.kind in PEOPLE else [thing.kind]
        for noun in nouns:
            for name in (noun, named(noun, thing.colour)):
                bearers.setdefault(name, []).append(i)
    return bearers


def expressions(things: Sequence[Thing], long: float, rng: Random) -> Iterator[tuple[str, int]]:
    """Yield (expression, index) once for each way in which exactly one thing can be told apart.

    long: long side of the image, pixels
    rng:  picks the wording, and the landmark where several would do
    """
    bearers = names_of(things)
    true: dict[tuple[str, str, int], list[str]] = {}   # (form, name, thing): landmarks
    # Where all men are in blue, "the man on the left" is enough: the first name for a group.
    groups: dict[tuple[int, ...], str] = {}
    for name, group in reversed(bearers.items()):
        if len(group) > 1:
            groups[tuple(group)] = name
    for among, name in groups.items():
        for form, i in superlatives(things, among, long).items():
            true[form, name, i] = [""]
    for name, group in bearers.items():
        if len(group) == 1:
            true["name", name, group[0]] = [""]
    for key, landmark in true_relations(things, bearers, long):
        true.setdefault(key, []).append(landmark)
    for (form, name, i), landmarks in true.items():
        yield rng.choice(PHRASES[form]).format(name, rng.choice(landmarks)), i


def true_relations(things: Sequence[Thing], bearers: dict[str, list[int]],
                   long: float) -> Iterator[tuple[tuple[str, str, int], str]]:
    """Yield ((form, noun, thing), landmark) for each relation in which one of several stands."""
    for j, other in enumerate(things):
        landmark = other.kind
        if len(bearers[landmark]) > 1:
            landmark = named(other.kind, other.colour)
        if len(bearers[landmark]) > 1:
            continue   # it has no name of its own
        for noun in KINDS:
            among = [i for i in bearers.get(noun, []) if i != j]
            if len(among) > 1:
                for form, i in relations(things, among, j, long).items():
                    yield (form, noun, i), landmark


def caption(things: Sequence[Thing], rng: Random) -> str:
    """Say what is there, in random order, and not where: "a man in blue and two green trees"."""
    counts: dict[tuple[str, str], int] = {}
    for thing in things:
        pair = (thing.kind, thing.colour)
        counts[pair] = counts.get(pair, 0) + 1
    parts = []
    for (kind, colour), count in counts.items():
        if count == 1:
            words = named(kind, colour)
            article = "an" if words.startswith("o") else "a"                  # an orange ...
            parts.append(f"{article} {words}")
        else:
            parts.append(f"{NUMBERS[count - 2]} {named(KINDS[kind][0], colour)}")
    rng.shuffle(parts)
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


# ----- drawing ------------------------------------------------------------------------------------


def arrange(cast: Cast, width: int, height: int, rng: Random) -> list[Thing]:
    """Give a box to each thing that finds room in the image; the nearest to the viewer is last.

    The boxes are about as large as those of RefCOCO val, whose median is 0.15 of the image: the
    long side of a box is from 1/3 to 5/8 of the image's long side, with four or more things to 1/2.
    The flattest image is 5/8 as high as it is wide, so every box fits.
    """
    placed: list[Thing] = []
    largest = 5 / 8 if len(cast) < 4 else 1 / 2
    for kind, colour in cast:
        ratio = KINDS[kind][1]
        for _ in range(TRIES):
            long = max(width, height) * rng.uniform(1 / 3, largest)
            w = round(long * min(1, ratio))
            h = round(long * min(1, 1 / ratio))
            x = round(rng.random() * (width - w))
            y = round(rng.random() * (height - h))
            box = (x, y, x + w, y + h)
            if has_room([*(thing.box for thing in placed), box]):
                placed.append(Thing(kind, colour, box))
                break
    return sorted(placed, key=lambda thing: thing.box[3])


def has_room(boxes: Sequence[Box]) -> bool:
    """Whether each box shares less than HIDDEN of its area with all the others together."""
    for box in boxes:
        shared = sum(shared_area(box, other) for other in boxes)   # its own is among them
        if shared >= (1 + HIDDEN) * shared_area(box, box):
            return False
    return True


def mix_inks(colour: str, rng: Random) -> dict[str, Colour]:
    """One of each of INKS, the thing's own colour ("own"), and a darker or lighter "tone" of it."""
    inks = {name: rng.choice(choice) for name, choice in INKS.items()}
    own = tuple(min(255, level + rng.randint(-10, 10)) for level in COLOURS[colour])
    if colour == "black":
        tone = tuple(level + 50 for level in own)
    else:
        tone = tuple(level * 3 // 4 for level in own)
    return inks | {"own": own, "tone": tone}


def paint(pen: ImageDraw.ImageDraw, thing: Thing, rng: Random) -> None:
    """Draw a thing so that it fills its box, on a canvas of twice the image's size."""
    inks = mix_inks(thing.colour, rng)
    x1, y1, x2, y2 = (2 * side for side in thing.box)
    left, right = rng.choice(((x1, x2 - 1), (x2 - 1, x1)))   # as it is, or mirrored
    for shape, ink, at in DRAWINGS[thing.kind]:
        xs = [round(left + (right - left) * x / 100) for x in at[::2]]
        ys = [round(y1 + (y2 - 1 - y1) * y / 100) for y in at[1::2]]
        if shape == "poly":
            pen.polygon(list(zip(xs, ys, strict=True)), inks[ink])
            continue
        corners = list(zip(sorted(xs), ys, strict=True))
        if shape == "oval":
            pen.ellipse(corners, inks[ink])
        else:
            pen.rectangle(corners, inks[ink])


def deal(rng: Random) -> Cast:
    """Deal two to seven things of few kinds, so that a kind alone is seldom enough."""
    kinds = rng.choices(list(KINDS), KIND_WEIGHTS, k=rng.randint(1, 3))
    colours = rng.sample(list(COLOURS), rng.randint(2, 6))
    count = rng.choices(range(2, 8), (1, 4, 5, 5, 3, 2))[0]
    return [(rng.choice(kinds), rng.choice(colours)) for _ in range(count)]


def draw_scene(rng: Random, size: int = 336, cast: Cast | None = None) -> Scene:
    """Draw two to seven things and find the expressions that tell them apart.

    size:   long side of the image, pixels
    cast:   (kind, colour) of each thing; None = deal some, and leave out what finds no room
    raises: NanogapError for a size below 32 or above 4096
    """
    if size < MIN_SIZE:
        raise NanogapError(f"size {size} is too small to draw in: give {MIN_SIZE} or more")
    if size > MAX_SIZE:
        raise NanogapError(f"size {size} is too large to draw: give {MAX_SIZE} or less")
    told: tuple[tuple[str, int], ...] = ()
    while not told:
        shape = rng.choice(SHAPES)
        width, height = (round(size * side / max(shape)) for side in shape)
        things = arrange(cast or deal(rng), width, height, rng)
        if len(things) >= (len(cast) if cast else 2):
            told = tuple(expressions(things, size, rng))
    return Scene(render(things, width, height, rng), tuple(things), told)


def render(things: Sequence[Thing], width: int, height: int, rng: Random) -> Image.Image:
    """The things before a horizon, with some noise."""
    sky, ground = (tuple(level + rng.randint(-9, 9) for level in rng.choice(colours))
                   for colours in (ABOVE, BELOW))
    canvas = Image.new("RGB", (2 * width, 2 * height), sky)
    pen = ImageDraw.Draw(canvas)
    horizon = rng.uniform(0.1, 1.1) * 2 * height
    pen.rectangle((0, horizon, 2 * width, 2 * height + horizon), ground)
    for thing in things:
        paint(pen, thing, rng)
    noise = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
    return Image.blend(canvas.reduce(2), noise, rng.uniform(0.01, 0.08))   # reduced: smooth edges


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
    if said is None or not MIN_SIZE <= max(size) <= MAX_SIZE:
        return None
    drawn = scene(said[1], int(said[2]), max(size))
    return drawn if drawn.image.size == size else None


def words_never_taught(text: str) -> list[str]:
    """The words of an expression that no scene is described with, as training had it."""
    taught = {*KINDS, *COLOURS, "person", "in", "a", "an", "and", *NUMBERS}
    taught |= {plural for plural, _ in KINDS.values()}
    for phrase in (phrase for wordings in PHRASES.values() for phrase in wordings):
        taught |= set(phrase.format("", "").split())
    return [word for word in re.findall(r"\w+", text) if word.lower() not in taught]


# ----- the command --------------------------------------------------------------------------------


def command(argv: Sequence[str] | None) -> None:
    """Draw one scene, and print its expressions with their boxes."""
    parser = Parser(prog="python -m nanogap.train.scenes", description="Draw one scene.")
    parser.add_argument("split", help="any word; with the index it seeds the scene")
    parser.add_argument("index", type=whole_number)
    parser.add_argument("out", type=path_argument, help="picture to write, such as scene.jpg")
    parser.add_argument("--size", type=whole_number, default=672,
                        help="long side, pixels (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        args.split.encode()
    except UnicodeEncodeError:
        raise NanogapError("the split is not valid Unicode: type it in UTF-8") from None
    check_picture("OUT", args.out)
    drawn = scene(args.split, args.index, args.size)
    exif = Image.Exif()
    exif[DESCRIPTION] = NOTE.format(args.split, args.index)
    save_picture("OUT", args.out, drawn.image, quality=92, exif=exif)
    for text, i in drawn.expressions:
        print(f"{text:40} {drawn.things[i].box}")


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.train.scenes", command, None))
