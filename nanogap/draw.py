"""The picture: boxes over an image whose dropped patches are dimmed.

In:  an image, the kept patches, and answers with their boxes.  Out: one picture, legible at 800 pixels.

Boxes differ by colour (Okabe and Ito's, which colour-blind readers tell apart), by line and by label.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from nanogap.image import Box

WIDTH, MAX_HEIGHT, MIN_WIDTH = 960, 1200, 640     # of the picture, pixels
STYLES = {             # colour, line width, dash and gap in line widths
    "full":     ("#ffffff", 12, None),
    "shifted":  ("#e69f00", 7, (3.0, 1.5)),
    "permuted": ("#cc79a7", 7, (1.0, 1.0)),
    "gap":      ("#0072b2", 6, None),
}
INK = "#202020"


@dataclass(frozen=True)
class Answer:
    mode: str
    label: str               # beside the box, such as "gap, 72 tokens, IoU 0.91"
    box: Box | None          # pixels of the image


def dim_dropped(image: Image.Image, keep: Sequence[int], grid: int) -> Image.Image:
    """Fade the patches that were dropped, on the model's own grid over the padded square."""
    width, height = image.size
    side = max(width, height)
    kept = Image.new("L", (grid, grid), 0)
    for index in keep:
        kept.putpixel((index % grid, index // grid), 255)
    left, top = (side - width) // 2, (side - height) // 2
    mask = kept.resize((side, side), Image.Resampling.NEAREST).crop((left, top, left + width, top + height))
    faded = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "#303030"), 0.6)
    return Image.composite(image, faded, mask)


def stroke(pen: ImageDraw.ImageDraw, a: tuple[float, float], b: tuple[float, float], colour: str, width: int,
           dash: tuple[float, float] | None) -> None:
    """A line from a to b, whole or dashed, along one axis."""
    length = math.dist(a, b)
    on, off = (d * width for d in dash) if dash else (length, 0.0)
    count = max(1, round((length + off) / (on + off))) if length else 1
    for i in range(count):
        start, end = i / count, (i + on / (on + off)) / count if dash else 1.0
        p, q = [tuple(a[k] + (b[k] - a[k]) * t for k in (0, 1)) for t in (start, end)]
        pen.line([p, q], fill=colour, width=width)


def outline(pen: ImageDraw.ImageDraw, box: Box, mode: str) -> None:
    """A rectangle in the style of its mode, over a dark edge that sets it off from any picture."""
    colour, width, dash = STYLES[mode]
    x1, y1, x2, y2 = box
    sides = [((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))]
    for a, b in sides:
        stroke(pen, a, b, INK if mode != "gap" else "#ffffff", width + 4, dash)
    for a, b in sides:
        stroke(pen, a, b, colour, width, dash)


def overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def tag(pen: ImageDraw.ImageDraw, answer: Answer, box: Box, canvas: tuple[int, int],
        taken: list[Box], font: ImageFont.FreeTypeFont) -> None:
    """Write an answer's label beside its box, where it hides the least of what is written already."""
    w, h = pen.textlength(answer.label, font) + 46, font.size * 1.5
    x1, y1, x2, y2 = box
    places = [(x, y) for y in (y1 - h - 8, y2 + 8, y1 + 10, y2 - h - 10, (y1 + y2 - h) / 2)
              for x in (x1, x2 - w, (x1 + x2 - w) / 2)]
    places = [(min(max(x, 4), canvas[0] - w - 4), min(max(y, 4), canvas[1] - h - 4)) for x, y in places]
    x, y = min(places, key=lambda p: sum(overlap((*p, p[0] + w, p[1] + h), other) for other in taken))
    taken.append((x, y, x + w, y + h))
    colour, width, dash = STYLES[answer.mode]
    pen.rounded_rectangle((x, y, x + w, y + h), 6, fill=INK)
    stroke(pen, (x + 8, y + h / 2), (x + 34, y + h / 2), colour, width, dash and (1.0, 1.0))
    pen.text((x + 40, y + h / 2), answer.label, font=font, fill="#ffffff", anchor="lm")


def draw_answers(image: Image.Image, keep: Sequence[int], grid: int, answers: Sequence[Answer],
                 caption: str) -> Image.Image:
    """One picture: kept patches bright, dropped ones dimmed, each answer's box, a caption below.

    keep: raster indices on the grid x grid patches of the padded square; boxes in pixels of the image
    """
    scale = min(WIDTH / image.width, MAX_HEIGHT / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    font = ImageFont.load_default(30)
    lines = [caption] + [f"{a.label}: no box" for a in answers if a.box is None]
    width = max(size[0], MIN_WIDTH)
    canvas = Image.new("RGB", (width, size[1] + 14 + 40 * len(lines)), "#ffffff")
    left = (width - size[0]) // 2
    canvas.paste(dim_dropped(image, keep, grid).resize(size, Image.Resampling.LANCZOS), (left, 0))
    pen = ImageDraw.Draw(canvas)
    boxes = [(a, tuple(v * scale + (left if k % 2 == 0 else 0) for k, v in enumerate(a.box)))
             for a in answers if a.box is not None]
    for answer, box in boxes:
        outline(pen, box, answer.mode)
    taken: list[Box] = []
    for answer, box in boxes:
        tag(pen, answer, box, (width, size[1]), taken, font)
    for i, line in enumerate(lines):
        while line and pen.textlength(line, font) > width - 20:
            line = line.removesuffix("...")[:-1] + "..."
        pen.text((10, size[1] + 8 + 40 * i), line, font=font, fill=INK)
    return canvas
