"""The picture of a query: boxes over an image whose dropped patches are dimmed, and a legend below.

Boxes differ by colour (Okabe and Ito's, which colour-blind readers tell apart), line and name.
The widest line is drawn first: where boxes coincide, each still shows inside the one before.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nanogap.fast.ground_all import Answered
from nanogap.gap import MODES
from nanogap.ground import Result
from nanogap.image import Box, iou, open_image

WIDTH, MAX_HEIGHT, MARGIN = 960, 1200, 14    # of the image on the page, and around it, pixels
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


def dashes(length: float, dash: tuple[int, int] | None) -> list[tuple[float, float]]:
    """Where each piece of a line begins and ends; the line is whole where there is no dash."""
    on, off = dash or (max(length, 1), 0)
    count = max(1, round((length + off) / (on + off)))
    step = (length - on) / max(1, count - 1)                  # the last piece ends in the corner
    return [(i * step, min(i * step + on, length)) for i in range(count)]


def stroke(pen: ImageDraw.ImageDraw, boxes: Sequence[tuple[Box, Style]]) -> None:
    """Draw boxes: a dark edge below all of them, then the sides of each in its style."""
    for edge in (EDGE, 0):
        for (x1, y1, x2, y2), (colour, width, dash) in boxes:
            radius = width // 2 + edge
            across = [(x1 + a, y, x1 + b, y) for y in (y1, y2) for a, b in dashes(x2 - x1, dash)]
            down = [(x, y1 + a, x, y1 + b) for x in (x1, x2) for a, b in dashes(y2 - y1, dash)]
            for left, top, right, bottom in across + down:
                pen.rectangle((left - radius, top - radius, right + radius, bottom + radius),
                              fill=INK if edge else colour)


def place_tag(width: float, box: Box, canvas: tuple[int, int], tags: Sequence[Box]) -> Box:
    """Where a name goes: above its box, below it, or in any row, where no tag is hidden."""
    x1, y1, x2, y2 = box
    for y in (y1 - CLEAR - TAG_HEIGHT, y2 + CLEAR, *range(2, canvas[1], TAG_HEIGHT + EDGE)):
        for x in (x1 - 8, x2 + 8 - width):
            left = min(max(x, 2), canvas[0] - width - 2)
            top = min(max(y, 2), canvas[1] - TAG_HEIGHT - 2)
            place = left, top, left + width, top + TAG_HEIGHT
            if not any(iou(place, tag) for tag in tags):
                return place
    return place


def write(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int,
          colour: str = PAPER, anchor: str = "lm") -> None:
    """A line of text; x, y: the middle of its left end, or what else of it Pillow's anchor says."""
    pen.text((x, y), text, colour, ImageFont.load_default(size), anchor=anchor)


def agreement(result: Result, full: Result | None) -> float | None:
    """IoU of a box with that of the full run; None where one of them is missing."""
    if full is None or result.box is None or full.box is None:
        return None
    return iou(result.box, full.box)


def legend(results: Mapping[str, Answered], pruned: Answered, truth: Box | None,
           model: str) -> list[tuple[str, Style | None]]:
    """What was asked, how many patches were dropped, and what each box is, in its style."""
    question = " ".join(pruned.expression.split())[:200]      # there is no room for more
    asked = f"\"{question}\"" + (f", asked of {model}" if model else "")
    are_patches = pruned.cells[:, 0] < pruned.cells[:, 2]                     # (N,)
    total, kept = int(are_patches.sum()), int(are_patches[pruned.keep].sum())
    stay = (f"{pruned.prune or 'your choice'} keeps {kept} of {total} patches; "
            "the dimmed ones are dropped")
    if pruned.mode == "full":
        stay = f"all {total} patches"
    lines: list[tuple[str, Style | None]] = [(asked, None), (stay, None)]
    for mode, result in results.items():
        _, visual_ids, _ = MODES[mode]
        meaning = "" if "," in mode else f": {visual_ids} position IDs"    # some names say it all
        text = f"{mode}{meaning}, {result.visual_tokens:g} tokens"
        with_full = agreement(result, results.get("full"))
        if result.box is None:
            text += ", no box"
        elif with_full is not None and mode != "full":
            text += f", IoU with full {with_full:.2f}"
        lines.append((text, STYLES[mode]))
    if truth is not None:
        lines.append(("the true box", TRUTH))
    return lines


# ----- the page -----------------------------------------------------------------------------------


def draw_results(image: Image.Image, results: Mapping[str, Answered], truth: Box | None = None,
                 model: str = "") -> Image.Image:
    """The picture of a query: kept patches bright, dropped ones dimmed, boxes, a legend below."""
    pruned = min(results.values(), key=lambda result: len(result.keep))
    lines = legend(results, pruned, truth, model)
    scale = min(WIDTH / image.width, MAX_HEIGHT / image.height)
    width, height = (max(1, round(side * scale)) for side in image.size)
    bright = image.resize((width, height), Image.Resampling.LANCZOS)
    shares = torch.tensor([width / image.width, height / image.height] * 2)
    bright = dim_dropped(bright, pruned.keep.tolist(), pruned.cells.cpu() * shares)
    left, canvas = MARGIN + (WIDTH - width) // 2, (WIDTH + 2 * MARGIN, height + 2 * MARGIN)
    page = Image.new("RGB", (canvas[0], canvas[1] + len(lines) * ROW + MARGIN), PAGE)
    page.paste(bright, (left, MARGIN))
    pen = ImageDraw.Draw(page)

    def on_page(box: Box) -> Box:
        x1, y1, x2, y2 = (v * scale for v in box)
        return x1 + left, y1 + MARGIN, x2 + left, y2 + MARGIN

    boxes = {mode: on_page(result.box) for mode, result in results.items() if result.box}
    stroke(pen, [(boxes[mode], style) for mode, style in STYLES.items() if mode in boxes])
    if truth is not None:
        stroke(pen, [(on_page(truth), TRUTH)])                # its dots show on a light line, too
    tags: list[Box] = []
    for mode, box in boxes.items():
        room = pen.textlength(mode, ImageFont.load_default(TAG_SIZE)) + 20
        tags.append(place_tag(room, box, canvas, tags))
        x1, y1, x2, y2 = tags[-1]
        pen.rounded_rectangle(tags[-1], 8, fill=STYLES[mode][0], outline=INK, width=2)
        write(pen, (x1 + x2) / 2, (y1 + y2) / 2 - 1, mode, TAG_SIZE, INK, "mm")
    font = ImageFont.load_default(FONT_SIZE)
    for number, (text, style) in enumerate(lines):
        y = canvas[1] + ROW / 2 + number * ROW
        if style:
            stroke(pen, [((MARGIN + 8, y, MARGIN + 78, y), style)])
        while pen.textlength(text, font) > WIDTH:
            text = text.removesuffix("...")[:-1] + "..."
        write(pen, MARGIN + LEGEND if style else MARGIN, y, text, FONT_SIZE)
    return page


def draw(result: Answered, image: Image.Image | str | Path) -> Image.Image:
    """The picture of one answer; image: the one that was asked about, or its path."""
    return draw_results(open_image(image), {result.mode: result})
