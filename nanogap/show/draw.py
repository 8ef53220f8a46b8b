"""The picture: boxes over an image whose dropped patches are dimmed, and a legend below.

In:  an image, where its visual tokens lie, which were kept, and boxes.
Out: one picture that explains itself, also on a phone.

Boxes differ by colour (Okabe and Ito's, which colour-blind readers tell apart), line and name.
The widest line is drawn first: where boxes coincide, each still shows inside the one before.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nanogap.fast.answered import Answered
from nanogap.ground import Result
from nanogap.image import Box, iou, open_image
from nanogap.train.places import shared_area

WIDTH, MAX_HEIGHT = 960, 1200                # of the image on the page, pixels
MIN_WIDTH, MIN_HEIGHT, MARGIN = 640, 160, 14
ROW, FONT_SIZE, LEGEND = 46, 28, 104         # of the legend; where its words begin
TAG_HEIGHT, TAG_SIZE = 36, 24                # of a name at its box, and of its letters
EDGE = 2                                     # of ink around each line
CLEAR = 14                                   # from the middle of a line to the nearest name
PAGE, INK, PAPER = "#1b1b1b", "#101010", "#f4f4f4"

Style = tuple[str, int, tuple[int, int] | None]   # colour, line width, dash and gap in pixels
STYLES: dict[str, Style] = {                      # by mode, the widest line first
    "full":                    ("#ffffff", 11, None),
    "gap":                     ("#56b4e9", 7, None),
    "shifted":                 ("#e69f00", 5, (26, 20)),
    "permuted":                ("#cc79a7", 5, (5, 18)),
    "ranked, original":        ("#f0e442", 5, (14, 10)),
    "compact, text not moved": ("#009e73", 3, (40, 14)),
    "original, text collides": ("#d55e00", 3, (8, 30)),
}
TRUTH: Style = ("#b0ffd0", 5, (1, 17))            # of the true box, where it is known
MEANING = {                                       # of a mode, for who sees the picture alone
    "full": "nothing dropped",
    "gap": "position IDs kept",
    "shifted": "position IDs closed up",
    "permuted": "IDs closed up, by score",
}


class DrawnBox(NamedTuple):
    """What one mode answered."""

    mode: str                # at its box
    label: str               # in the legend, such as "gap, 72 tokens, IoU 0.91"
    box: Box | None          # pixels of the image


def dim_dropped(image: Image.Image, kept: Sequence[int], cells: Tensor) -> Image.Image:
    """Dim all parts of an image that no kept token shows.

    kept:  indices of the visual tokens that were kept
    cells: (N, 4) which part of the image each token shows, pixels; it may lie outside, or be empty
    """
    mask = Image.new("L", image.size, 0)
    pen = ImageDraw.Draw(mask)
    seen = cells[list(kept)].float().round(decimals=3)   # 23.4999 is 23.5, as a neighbour's end is
    for x1, y1, x2, y2 in seen.round().int().tolist():
        if x1 < x2 and y1 < y2:
            pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=255)
    dimmed = image.convert("L").point(lambda level: level * 0.4).convert("RGB")
    return Image.composite(image, dimmed, mask)


# ----- boxes --------------------------------------------------------------------------------------


def dashes(a: Sequence[float], b: Sequence[float], dash: tuple[int, int] | None) -> Iterator[Box]:
    """The pieces of a line from a to b, each (x1, y1, x2, y2); whole where there is no dash."""
    length = math.dist(a, b)
    if dash is None or length == 0:
        yield a[0], a[1], b[0], b[1]
        return
    on, off = dash
    count = max(1, round((length + off) / (on + off)))
    step = (length - on) / max(1, count - 1)                  # the last piece ends in the corner
    dx = (b[0] - a[0]) / length
    dy = (b[1] - a[1]) / length
    for i in range(count):
        start = i * step
        end = min(start + on, length)
        yield a[0] + start * dx, a[1] + start * dy, a[0] + end * dx, a[1] + end * dy


def sides(box: Box) -> list[Box]:
    """The four sides of a box as lines, from left to right or downwards."""
    x1, y1, x2, y2 = box
    return [(x1, y1, x2, y1), (x1, y1, x1, y2), (x2, y1, x2, y2), (x1, y2, x2, y2)]


def stroke(pen: ImageDraw.ImageDraw, lines: Sequence[tuple[Box, Style]]) -> None:
    """Draw lines along the axes: a dark edge below all of them, then each in its style."""
    for edge in (EDGE, 0):
        for (x1, y1, x2, y2), (colour, width, dash) in lines:
            radius = width // 2 + edge
            for left, top, right, bottom in dashes((x1, y1), (x2, y2), dash):
                pen.rectangle((left - radius, top - radius, right + radius, bottom + radius),
                              fill=INK if edge else colour)


# ----- names --------------------------------------------------------------------------------------


def place_tag(width: float, height: float, box: Box, canvas: tuple[int, int],
              tags: Sequence[Box], boxes: Sequence[Box]) -> Box:
    """Where a name goes: the first place at its box, or else anywhere, that hides no name or line.

    tags:  the names that are there
    boxes: all that are drawn; a place that is in none of them is better
    """
    x1, y1, x2, y2 = box
    places = [(x, y) for y in (y1 - CLEAR - height, y2 + CLEAR) for x in (x1 - 8, x2 + 8 - width)]
    places += [(x, y) for y in (y1 + CLEAR, y2 - CLEAR - height)
               for x in (x1 + CLEAR, x2 - CLEAR - width)]
    right, low = canvas[0] - width - 2, canvas[1] - height - 2
    fitting = [(min(max(x, 2), right), min(max(y, 2), low)) for x, y in places]
    near = CLEAR - 2
    lines = [(left - near, top - near, end + near, bottom + near)
             for other in boxes for left, top, end, bottom in sides(other)]

    def hides(place: tuple[float, float], others: Sequence[Box]) -> float:
        x, y = place
        return sum(shared_area((x, y, x + width, y + height), other) for other in others)

    x, y = min(fitting, key=lambda at: [hides(at, others) for others in (tags, lines, boxes)])
    if hides((x, y), [*tags, *lines]):
        anywhere = product(range(2, int(right) + 1, 12), range(2, int(low) + 1, 12))
        x, y = min(anywhere, key=lambda at: [
            hides(at, tags), hides(at, lines),
            math.hypot(max(x1 - at[0] - width, at[0] - x2, 0),
                       max(y1 - at[1] - height, at[1] - y2, 0))])
    return x, y, x + width, y + height


def draw_boxes(pen: ImageDraw.ImageDraw, boxes: dict[str, Box], truth: Box | None,
               canvas: tuple[int, int]) -> None:
    """Each mode's box in its style, and the mode's name beside it; the true box has no name."""
    lines = [(line, style) for mode, style in STYLES.items() if mode in boxes
             for line in sides(boxes[mode])]
    stroke(pen, lines)
    drawn = list(boxes.values())
    if truth is not None:
        stroke(pen, [(line, TRUTH) for line in sides(truth)])   # its dots show on a light line, too
        drawn.append(truth)
    font = ImageFont.load_default(TAG_SIZE)
    tags: list[Box] = []
    for mode, box in boxes.items():
        width = pen.textlength(mode, font) + 20
        x1, y1, x2, y2 = tag = place_tag(width, TAG_HEIGHT, box, canvas, tags, drawn)
        tags.append(tag)
        pen.rounded_rectangle(tag, 8, fill=STYLES[mode][0], outline=INK, width=2)
        pen.text(((x1 + x2) / 2, (y1 + y2) / 2 - 1), mode, font=font, fill=INK, anchor="mm")


# ----- the page -----------------------------------------------------------------------------------


def shortened(text: str, room: float, measure: Callable[[str], float]) -> str:
    """As much of a line as there is room for."""
    text = " ".join(text.split())
    if len(text) > 200:
        text = text[:200] + "..."
    while text and measure(text) > room:
        text = text.removesuffix("...")[:-1] + "..."
    return text


def draw_answers(image: Image.Image, kept: Sequence[int], cells: Tensor,
                 answers: Sequence[DrawnBox], caption: str,
                 truth: Box | None = None) -> Image.Image:
    """One picture: kept patches bright, dropped ones dimmed, each answer's box, a legend below.

    kept:    indices of the visual tokens that were kept
    cells:   (N, 4) which part of the image each visual token shows, pixels
    answers: at most one for each mode, boxes in pixels of the image
    caption: one line, or several with newlines between them
    truth:   the true box, where it is known
    """
    scale = min(WIDTH / image.width, MAX_HEIGHT / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    legend = [(answer.label if answer.box else f"{answer.label}, no box", STYLES[answer.mode])
              for answer in answers]
    if truth is not None:
        legend.append(("the true box", TRUTH))
    font = ImageFont.load_default(FONT_SIZE)
    widest = LEGEND + math.ceil(max((font.getlength(text) for text, _ in legend), default=0))
    width, height = max(size[0], MIN_WIDTH, widest), max(size[1], MIN_HEIGHT)
    width, height = width + 2 * MARGIN, height + 2 * MARGIN
    left, top = (width - size[0]) // 2, (height - size[1]) // 2

    def on_page(box: Box) -> Box:
        return (box[0] * scale + left, box[1] * scale + top,
                box[2] * scale + left, box[3] * scale + top)

    boxes = {answer.mode: on_page(answer.box) for answer in answers if answer.box is not None}
    lines = caption.split("\n")
    page = Image.new("RGB", (width, height + ROW * (len(lines) + len(legend)) + MARGIN), PAGE)
    cells = cells.cpu() * torch.tensor([size[0] / image.width, size[1] / image.height] * 2)
    page.paste(dim_dropped(image.resize(size, Image.Resampling.LANCZOS), kept, cells), (left, top))
    pen = ImageDraw.Draw(page)
    draw_boxes(pen, boxes, None if truth is None else on_page(truth), (width, height))
    draw_legend(pen, lines, legend, width, height)
    return page


def draw_legend(pen: ImageDraw.ImageDraw, lines: Sequence[str], legend: Sequence[tuple[str, Style]],
                width: int, top: int) -> None:
    """Lines of text, and below them each style with what it stands for."""
    font = ImageFont.load_default(FONT_SIZE)
    y = top + ROW / 2
    for line in lines:
        line = shortened(line, width - 2 * MARGIN, lambda text: pen.textlength(text, font))
        pen.text((MARGIN, y), line, font=font, fill=PAPER, anchor="lm")
        y += ROW
    for text, style in legend:
        stroke(pen, [((MARGIN + 8, y, MARGIN + 78, y), style)])
        pen.text((MARGIN + LEGEND, y), text, font=font, fill=PAPER, anchor="lm")
        y += ROW


# ----- the picture of a query ---------------------------------------------------------------------


def agreement(result: Result, full: Result | None) -> float | None:
    """IoU of a box with that of the full run; None where one of them is missing."""
    if full is None or result.box is None or full.box is None:
        return None
    return iou(result.box, full.box)


def label(mode: str, result: Result, full: Result | None) -> str:
    """What the legend says: "gap: position IDs kept, 72 tokens, IoU with full 0.93"."""
    meaning = f"{mode}: {MEANING[mode]}" if mode in MEANING else mode
    text = f"{meaning}, {result.visual_tokens:g} tokens"
    with_full = agreement(result, full)
    return text if mode == "full" or with_full is None else f"{text}, IoU with full {with_full:.2f}"


def draw_results(image: Image.Image, cells: Tensor, expression: str, prune: str,
                 results: Mapping[str, Result], truth: Box | None = None,
                 model: str = "") -> Image.Image:
    """The picture of one query.

    cells:   (N, 4) which part of the image each visual token shows, pixels
    prune:   the strategy's name, if one chose
    results: by mode
    model:   its name
    """
    kept = min((result.keep for result in results.values()), key=len)          # (K,)
    are_patches = cells[:, 0] < cells[:, 2]                                    # (N,)
    pruned = f"all {int(are_patches.sum())} patches"
    if set(results) != {"full"}:
        pruned = (f"{prune or 'your choice'} keeps {int(are_patches[kept].sum())} of "
                  f"{int(are_patches.sum())} patches; the dimmed ones are dropped")
    answers = [DrawnBox(mode, label(mode, result, results.get("full")), result.box)
               for mode, result in results.items()]
    asked = f"\"{' '.join(expression.split())}\"" + (f", asked of {model}" if model else "")
    return draw_answers(image, kept.tolist(), cells, answers, f"{asked}\n{pruned}", truth)


def draw(result: Answered, image: Image.Image | str | Path) -> Image.Image:
    """The picture of one answer.

    image: the one that was asked about, or its path
    """
    return draw_results(open_image(image), result.cells, result.expression, result.prune,
                        {result.mode: result})
