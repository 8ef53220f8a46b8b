"""Drawn scenes with referring expressions: what the mini model learns from.

in:   a split's name and an index, or a Random
out:  an image, the things in it with tight boxes, and expressions, each true of exactly one thing
run:  python -m nanogap.scenes SPLIT INDEX OUT.jpg [--size 672]
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from random import Random

from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Cast = Sequence[tuple[str, str]]  # (kind, colour) of each thing

COLOURS = {
    "red": (212, 36, 40), "orange": (245, 134, 0), "yellow": (250, 214, 40), "green": (30, 138, 58),
    "blue": (38, 90, 214), "purple": (124, 50, 166), "pink": (246, 118, 182), "black": (34, 34, 40)}
KINDS = {  # name: (plural, width / height)
    "man": ("men", 0.44), "woman": ("women", 0.46), "dog": ("dogs", 1.3), "car": ("cars", 1.9),
    "tree": ("trees", 0.7), "ball": ("balls", 1.0), "house": ("houses", 1.1), "cup": ("cups", 1.15)}
PEOPLE = ("man", "woman", "person", "men", "women")
SHAPES = ((1, 1), (4, 3), (3, 2), (16, 10), (3, 4), (2, 3))  # width : height of the image
ABOVE = ((186, 214, 238), (206, 216, 226), (236, 226, 206), (206, 224, 214))  # sky, wall
BELOW = ((172, 196, 140), (232, 216, 178), (160, 162, 168), (190, 160, 130))  # grass to floor
INKS = {  # a thing is drawn with one of each, and with its "own" colour and a "tone" of it
    "skin": ((250, 214, 186), (220, 172, 136), (136, 92, 66)), "jet": ((44, 44, 50),),
    "brown": ((46, 34, 30), (110, 70, 42), (196, 156, 90)), "pale": ((216, 234, 242),),
    "ash": ((62, 68, 92), (84, 84, 90), (92, 80, 68))}
# "shape ink x y x y ...", in percent of the thing's box; a drawing touches all four sides of it
DRAWINGS = {kind: [(shape, ink, [int(number) for number in at]) for part in text.split(";")
                   for shape, ink, *at in [part.split()]] for kind, text in {
    "man": """slab skin 42 17 58 27; oval brown 25 0 75 18; oval skin 29 4 71 21;
    oval jet 38 10 44 13; oval jet 56 10 62 13; oval skin 0 53 18 62; oval skin 82 53 100 62;
    poly ash 24 55 76 55 82 95 57 95 50 66 43 95 18 95; oval jet 9 93 44 100; oval jet 56 93 91 100;
    poly own 30 23 70 23 88 29 99 55 84 58 74 40 76 59 24 59 26 40 16 58 1 55 12 29""",
    "woman": """oval brown 20 0 80 22; slab brown 20 11 80 31; slab skin 43 19 57 27;
    oval skin 31 4 69 21; oval jet 39 11 45 14; oval jet 55 11 61 14; slab skin 33 72 45 96;
    poly skin 50 20 100 52 89 57 50 30 11 57 0 52; slab skin 55 72 67 96; oval jet 26 94 46 100;
    oval jet 54 94 74 100; poly own 26 24 74 24 80 32 67 36 66 43 96 77 4 77 34 43 33 36 20 32""",
    "dog": """poly own 0 10 7 10 24 46 14 54; slab tone 24 60 33 97; slab tone 64 60 73 97;
    slab own 14 60 24 100; slab own 54 60 64 100; oval own 12 38 76 76; oval own 56 0 90 50;
    oval own 74 20 100 46; oval tone 54 4 68 46; oval jet 92 22 100 34; oval jet 77 13 82 20""",
    "car": """poly own 14 44 30 0 68 0 86 44; poly pale 22 40 33 8 65 8 77 40; slab own 47 4 51 42;
    oval own 0 36 30 86; oval own 70 36 100 86; slab own 9 36 91 80; oval jet 13 58 35 100;
    oval jet 65 58 87 100; oval pale 20 71 28 87; oval pale 72 71 80 87; oval pale 93 50 99 62""",
    "tree": """slab brown 42 50 58 100; oval own 0 26 100 68; oval own 16 0 84 50;
    oval tone 28 30 38 37; oval tone 60 16 70 23; oval tone 70 46 80 53""",
    "ball": "oval tone 0 0 100 100; oval own 5 5 95 95; oval tone 28 2 72 98; oval own 35 5 65 95",
    "house": """slab ash 72 6 84 30; slab own 8 38 92 100; poly ash 0 44 44 0 56 0 100 44;
    slab brown 42 62 60 100; slab pale 17 54 34 74; slab pale 68 54 84 74""",
    "cup": """poly own 64 24 88 24 100 36 100 60 87 74 60 74 60 62 82 62 89 55 89 41 83 36 64 36;
    poly own 0 8 74 8 64 100 10 100; oval own 0 0 74 16; oval tone 5 3 69 13"""}.items()}
HIDDEN = 0.25  # at most this share of a box lies under, or over, the boxes of others
MARGIN = 0.12  # this much further left, right, up or down is clear; of the image's long side
BIGGER = 1.8  # ratio of areas from which one thing is clearly the bigger
NEAR, NEARER = 0.5, 0.6  # "next to": at most so far, of the long side, and of the second nearest
PHRASES = {  # {0} is the thing that is meant, {1} its landmark
    side: [f"the {{0}} {by} the {side}"] * 3 + [f"{{0}} {by} the {side}", f"the {side} {{0}}"]
    + [f"the {side}most {{0}}"] * (by == "on") for by, side in (
        ("on", "left"), ("on", "right"), ("at", "top"), ("at", "bottom"), ("in", "middle"))} | {
    "name": ["the {0}"] * 3 + ["{0}"], "below": ["the {0} below the {1}"],
    "biggest": ["the biggest {0}", "the largest {0}"], "above": ["the {0} above the {1}"],
    "left of": ["the {0} to the left of the {1}", "the {0} left of the {1}"],
    "right of": ["the {0} to the right of the {1}", "the {0} right of the {1}"],
    "next to": ["the {0} next to the {1}", "the {0} by the {1}"], "smallest": ["the smallest {0}"]}


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


def overlap(a: Box, b: Box) -> float:
    """Measure the area that two boxes share; of a box and itself, its own area."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def places(things: Sequence[Thing], among: list[int], long: float) -> dict[str, int]:
    """Find which of two or more things (indices) is clearly the left one, the biggest, and so on.

    long:    long side of the image, pixels
    returns: {"left": index, ...}, only what is clear; "middle" is of a row of three, no column
    """
    found: dict[str, int] = {}
    for first, last, measure in (  # in units of what is clear
            ("left", "right", lambda box: (box[0] + box[2]) / 2 / (MARGIN * long)),
            ("top", "bottom", lambda box: (box[1] + box[3]) / 2 / (MARGIN * long)),
            ("smallest", "biggest", lambda box: log(overlap(box, box), BIGGER))):
        order = sorted((measure(things[i].box), i) for i in among)
        if order[1][0] - order[0][0] >= 1:
            found[first] = order[0][1]
        if order[-1][0] - order[-2][0] >= 1:
            found[last] = order[-1][1]
    if len(among) == 3 and {"left", "right"} <= {*found} and not {"top", "bottom"} <= {*found}:
        found["middle"] = (set(among) - {found["left"], found["right"]}).pop()
    return found


def relations(things: Sequence[Thing], among: list[int], to: int, long: float) -> dict[str, int]:
    """Find in the same way which of them is the one next to, left of, ... the landmark `to`."""
    centres = [complex(b[0] + b[2], b[1] + b[3]) / 2 / long for b in (t.box for t in things)]
    away = {i: centres[i] - centres[to] for i in among}  # x + iy, y downwards
    (least, nearest), (second, _), *_ = sorted((abs(away[i]), i) for i in among)
    found = {"next to": nearest} if least < min(NEAR, NEARER * second) else {}
    for word, turn in (("left of", -1), ("right of", 1), ("above", 1j), ("below", -1j)):
        ahead = {i: d * turn for i, d in away.items() if (d * turn).real > 0}  # by however little
        if len(ahead) == 1 and all(d.real >= max(MARGIN, abs(d.imag)) for d in ahead.values()):
            found[word] = next(iter(ahead))
    return found


def named(noun: str, colour: str) -> str:
    return f"{noun} in {colour}" if noun in PEOPLE else f"{colour} {noun}"


def expressions(things: Sequence[Thing], long: float, rng: Random) -> Iterator[tuple[str, int]]:
    """Yield (expression, index) once for each way in which exactly one thing can be told apart.

    long: long side of the image, pixels
    rng:  picks the wording, and the landmark where several would do
    """
    bearers: dict[str, list[int]] = {}  # "man", "man in blue", "person": the things so named
    for i, thing in enumerate(things):
        for noun in (thing.kind, "person") if thing.kind in PEOPLE else (thing.kind,):
            for name in (noun, named(noun, thing.colour)):
                bearers.setdefault(name, []).append(i)
    true: dict[tuple[str, str, int], list[str]] = {}  # (form, name, thing): landmarks
    # Where all men are in blue, "the man on the left" is enough: the first name for a group.
    for among, name in {tuple(b): name for name, b in reversed(bearers.items()) if b[1:]}.items():
        true |= {(form, name, i): [""] for form, i in places(things, list(among), long).items()}
    true |= {("name", name, among[0]): [""] for name, among in bearers.items() if not among[1:]}
    for j, other in enumerate(things):
        name = other.kind if len(bearers[other.kind]) == 1 else named(other.kind, other.colour)
        for noun in KINDS if len(bearers[name]) == 1 else ():
            among = [i for i in bearers.get(noun, ()) if i != j]
            for form, i in relations(things, among, j, long).items() if among[1:] else ():
                true.setdefault((form, noun, i), []).append(name)
    for (form, name, i), landmarks in true.items():
        yield rng.choice(PHRASES[form]).format(name, rng.choice(landmarks)), i


def caption(things: Sequence[Thing], rng: Random) -> str:
    """Say what is there, in random order, and not where: "a man in blue and two green trees"."""
    pairs, parts = [(thing.kind, thing.colour) for thing in things], []
    for (kind, colour), count in {pair: pairs.count(pair) for pair in pairs}.items():
        words = named(kind if count == 1 else KINDS[kind][0], colour)
        number = ("an" if words[0] == "o" else "a", "two", "three", "four", "five", "six", "seven")
        parts.append(f"{number[count - 1]} {words}")
    rng.shuffle(parts)
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def lay_out(cast: Cast, width: int, height: int, rng: Random) -> list[Thing]:
    """Give a box to each thing that finds room in the image; the nearest to the viewer is last.

    The long side of a box is a third to five eighths of the image's (the height of the flattest image), of
    four or more things to a half: so the boxes are about as large as those of RefCOCO val, of which the
    median is 0.15 of the image.
    """
    placed: list[Thing] = []
    for kind, colour in cast:
        for _ in range(48):
            long = max(width, height) * rng.uniform(1 / 3, 5 / 8 if len(cast) < 4 else 1 / 2)
            w, h = (round(long * min(1, ratio)) for ratio in (KINDS[kind][1], 1 / KINDS[kind][1]))
            x, y = round(rng.random() * (width - w)), round(rng.random() * (height - h))
            boxes = [*(thing.box for thing in placed), (x, y, x + w, y + h)]
            if all(sum(overlap(a, b) for b in boxes) < (1 + HIDDEN) * overlap(a, a) for a in boxes):
                placed.append(Thing(kind, colour, boxes[-1]))
                break
    return sorted(placed, key=lambda thing: thing.box[3])


def paint(pen: ImageDraw.ImageDraw, thing: Thing, rng: Random) -> None:
    """Draw a thing so that it fills its box, on a canvas of twice the image's size."""
    inks = {name: rng.choice(choice) for name, choice in INKS.items()}
    inks["own"] = own = tuple(min(255, c + rng.randint(-10, 10)) for c in COLOURS[thing.colour])
    inks["tone"] = tuple(c + 50 if thing.colour == "black" else c * 3 // 4 for c in own)
    x1, y1, x2, y2 = (2 * side for side in thing.box)
    left, right = rng.choice(((x1, x2 - 1), (x2 - 1, x1)))  # as it is, or mirrored
    for shape, ink, at in DRAWINGS[thing.kind]:
        xs = [round(left + (right - left) * x / 100) for x in at[::2]]
        ys = [round(y1 + (y2 - 1 - y1) * y / 100) for y in at[1::2]]
        draw = {"poly": pen.polygon, "oval": pen.ellipse, "slab": pen.rectangle}[shape]
        draw(list(zip(xs if shape == "poly" else sorted(xs), ys)), inks[ink])


def deal(rng: Random) -> Cast:
    """Deal two to seven things of few kinds, so that a kind alone is seldom enough."""
    kinds = rng.choices(list(KINDS), (3, 3, 2, 2, 2, 2, 2, 2), k=rng.randint(1, 3))
    colours = rng.sample(list(COLOURS), rng.randint(2, 6))
    count = rng.choices(range(2, 8), (1, 4, 5, 5, 3, 2))[0]
    return [(rng.choice(kinds), rng.choice(colours)) for _ in range(count)]


def draw_scene(rng: Random, size: int = 336, cast: Cast | None = None) -> Scene:
    """Draw two to seven things and find the expressions that tell them apart.

    size: long side of the image, pixels; ValueError below 32
    cast: (kind, colour) of each thing; None = deal some, and leave out what finds no room
    """
    if size < 32:
        raise ValueError(f"size {size} is too small to draw in: give 32 or more")
    told: tuple[tuple[str, int], ...] = ()
    while not told:
        ratio = rng.choice(SHAPES)
        w, h = (round(size * side / max(ratio)) for side in ratio)
        things = lay_out(cast or deal(rng), w, h, rng)
        if len(things) >= (len(cast) if cast else 2):
            told = tuple(expressions(things, size, rng))
    above, below = (tuple(c + rng.randint(-9, 9) for c in rng.choice(b)) for b in (ABOVE, BELOW))
    canvas = Image.new("RGB", (2 * w, 2 * h), above)
    pen, horizon = ImageDraw.Draw(canvas), rng.uniform(0.1, 1.1) * 2 * h
    pen.rectangle((0, horizon, 2 * w, 2 * h + horizon), below)
    for thing in things:
        paint(pen, thing, rng)
    noise = Image.frombytes("RGB", (w, h), rng.randbytes(3 * w * h))
    image = Image.blend(canvas.reduce(2), noise, rng.uniform(0.01, 0.08))  # reduced: smooth edges
    return Scene(image, tuple(things), told)


def scene(split: str, index: int, size: int = 336) -> Scene:
    """Draw the scene of a split (any word) and an index, the same at every call."""
    return draw_scene(Random(f"{split}/{index}"), size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m nanogap.scenes", description="Draw one scene.")
    parser.add_argument("split", help="any word; with the index it seeds the scene")
    parser.add_argument("index", type=int)
    parser.add_argument("out", help="JPEG to write")
    parser.add_argument("--size", type=int, default=672, help="long side, pixels (default 672)")
    args = parser.parse_args()
    try:
        drawn = scene(args.split, args.index, args.size)
        drawn.image.save(args.out, "JPEG", quality=92)
    except (OSError, ValueError) as error:
        parser.exit(2, f"scenes: {args.out} is not written: {error}\n")
    for text, i in drawn.expressions:
        print(f"{text:40} {drawn.things[i].box}")
