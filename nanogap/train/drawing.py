"""How the things of a scene are drawn.

In:  kinds, colours and boxes.  Out: an image, in which each drawing touches all sides of its box.
"""

from collections.abc import Iterable
from random import Random

from PIL import Image, ImageDraw

from nanogap.image import Box

Colour = tuple[int, ...]                     # red, green, blue

ABOVE = ((186, 214, 238), (206, 216, 226), (236, 226, 206), (206, 224, 214))   # sky, wall
BELOW = ((172, 196, 140), (232, 216, 178), (160, 162, 168), (190, 160, 130))   # grass to floor
INKS: dict[str, tuple[Colour, ...]] = {   # a thing is drawn with one of each, "own" and its "tone"
    "skin": ((250, 214, 186), (220, 172, 136), (136, 92, 66)),
    "jet": ((44, 44, 50),),
    "brown": ((46, 34, 30), (110, 70, 42), (196, 156, 90)),
    "pale": ((216, 234, 242),),
    "ash": ((62, 68, 92), (84, 84, 90), (92, 80, 68)),
}
# kind, shape, ink, and x y x y ... in percent of the thing's box: all corners of a polygon, or two
# of each oval and each slab; later pieces lie over earlier ones
PIECES = [line.split() for line in """\
    man    slab  skin   42 17  58 27
    man    oval  brown  25 0  75 18
    man    oval  skin   29 4  71 21
    man    oval  jet    38 10  44 13    56 10  62 13
    man    oval  skin   0 53  18 62     82 53  100 62
    man    poly  ash    24 55  76 55  82 95  57 95  50 66  43 95  18 95
    man    oval  jet    9 93  44 100    56 93  91 100
    man    poly  own    30 23  70 23  88 29  99 55  84 58  74 40 \
                        76 59  24 59  26 40  16 58  1 55  12 29
    woman  oval  brown  20 0  80 22
    woman  slab  brown  20 11  80 31
    woman  slab  skin   43 19  57 27
    woman  oval  skin   31 4  69 21
    woman  oval  jet    39 11  45 14    55 11  61 14
    woman  slab  skin   33 72  45 96    55 72  67 96
    woman  poly  skin   50 20  100 52  89 57  50 30  11 57  0 52
    woman  oval  jet    26 94  46 100   54 94  74 100
    woman  poly  own    26 24  74 24  80 32  67 36  66 43  96 77  4 77  34 43  33 36  20 32
    dog    poly  own    0 10  7 10  24 46  14 54
    dog    slab  tone   24 60  33 97    64 60  73 97
    dog    slab  own    14 60  24 100   54 60  64 100
    dog    oval  own    12 38  76 76    56 0  90 50     74 20  100 46
    dog    oval  tone   54 4  68 46
    dog    oval  jet    92 22  100 34   77 13  82 20
    car    poly  own    14 44  30 0  68 0  86 44
    car    poly  pale   22 40  33 8  65 8  77 40
    car    slab  own    47 4  51 42
    car    oval  own    0 36  30 86     70 36  100 86
    car    slab  own    9 36  91 80
    car    oval  jet    13 58  35 100   65 58  87 100
    car    oval  pale   20 71  28 87    72 71  80 87    93 50  99 62
    tree   slab  brown  42 50  58 100
    tree   oval  own    0 26  100 68    16 0  84 50
    tree   oval  tone   28 30  38 37    60 16  70 23    70 46  80 53
    ball   oval  tone   0 0  100 100
    ball   oval  own    5 5  95 95
    ball   oval  tone   28 2  72 98
    ball   oval  own    35 5  65 95
    house  slab  ash    72 6  84 30
    house  slab  own    8 38  92 100
    house  poly  ash    0 44  44 0  56 0  100 44
    house  slab  brown  42 62  60 100
    house  slab  pale   17 54  34 74    68 54  84 74
    cup    poly  own    64 24  88 24  100 36  100 60  87 74  60 74 \
                        60 62  82 62  89 55  89 41  83 36  64 36
    cup    poly  own    0 8  74 8  64 100  10 100
    cup    oval  own    0 0  74 16
    cup    oval  tone   5 3  69 13
""".splitlines()]


def paint(pen: ImageDraw.ImageDraw, kind: str, colour: Colour, box: Box, rng: Random) -> None:
    """Draw a thing so that it fills its box, on a canvas of twice the image's size."""
    inks = {name: rng.choice(choice) for name, choice in INKS.items()}
    inks["own"] = tuple(min(255, level + rng.randint(-10, 10)) for level in colour)
    is_black = max(inks["own"]) < 64
    inks["tone"] = tuple(level + 50 if is_black else level * 3 // 4 for level in inks["own"])
    x1, y1, x2, y2 = (2 * side for side in box)
    left, right = rng.choice(((x1, x2 - 1), (x2 - 1, x1)))   # as it is, or mirrored
    for of, shape, ink, *at in PIECES:
        if of != kind:
            continue
        xs = [round(left + (right - left) * int(x) / 100) for x in at[::2]]
        ys = [round(y1 + (y2 - 1 - y1) * int(y) / 100) for y in at[1::2]]
        points = list(zip(xs, ys, strict=True))
        if shape == "poly":
            pen.polygon(points, inks[ink])
            continue
        draw = pen.ellipse if shape == "oval" else pen.rectangle
        for (a, top), (b, bottom) in zip(points[::2], points[1::2], strict=True):
            draw((min(a, b), top, max(a, b), bottom), inks[ink])


def render(things: Iterable[tuple[str, Colour, Box]], width: int, height: int,
           rng: Random) -> Image.Image:
    """Draw (kind, colour, box) of each thing before a horizon, with some noise."""
    sky, ground = (tuple(level + rng.randint(-9, 9) for level in rng.choice(colours))
                   for colours in (ABOVE, BELOW))
    canvas = Image.new("RGB", (2 * width, 2 * height), sky)
    pen = ImageDraw.Draw(canvas)
    horizon = rng.uniform(0.1, 1.1) * 2 * height
    pen.rectangle((0, horizon, 2 * width, 2 * height + horizon), ground)
    for kind, colour, box in things:
        paint(pen, kind, colour, box, rng)
    noise = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
    return Image.blend(canvas.reduce(2), noise, rng.uniform(0.01, 0.08))   # reduced: smooth edges
