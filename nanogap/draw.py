"""The picture: boxes over an image whose dropped patches are dimmed, and a legend below.

In:  an image, the kept patches, and answers with their boxes.  Out: one picture, also for a phone.

Boxes differ by colour (Okabe and Ito's, which colour-blind readers tell apart), line and name.
The widest line is drawn first: where boxes coincide, each still shows inside the one before.
"""

import errno
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nanogap.cli import NanogapError
from nanogap.image import Box

WIDTH, MAX_HEIGHT = 960, 1200                # of the image on the page, pixels
MIN_WIDTH, MIN_HEIGHT, MARGIN = 640, 160, 14
ROW, FONT_SIZE, TAG_SIZE = 46, 30, 24
PAGE, INK, PAPER = "#1b1b1b", "#101010", "#f4f4f4"
STYLES = {             # colour, line width, dash and gap in pixels
    "full":     ("#ffffff", 18, None),
    "gap":      ("#56b4e9", 9, None),
    "shifted":  ("#e69f00", 5, (26, 20)),
    "permuted": ("#cc79a7", 5, (4, 18)),
}


@dataclass(frozen=True)
class Answer:
    mode: str
    label: str               # at its box and in the legend, such as "gap, 72 tokens, IoU 0.91"
    box: Box | None          # pixels of the image


def dim_dropped(image: Image.Image, keep: Sequence[int], grid: int) -> Image.Image:
    """Dim the patches that were dropped, on the model's own grid over the padded square."""
    kept = Image.new("L", (grid, grid), 0)
    for index in keep:
        kept.putpixel((index % grid, index // grid), 255)
    width, height = (grid * length / max(image.size) for length in image.size)   # in patches
    left, top = (grid - width) / 2, (grid - height) / 2
    seen = (left, top, left + width, top + height)                            # without the padding
    mask = kept.resize(image.size, Image.Resampling.NEAREST, seen)
    dimmed = image.convert("L").point(lambda level: level * 0.4).convert("RGB")
    return Image.composite(image, dimmed, mask)


# ----- boxes --------------------------------------------------------------------------------------


def dashes(a: Sequence[float], b: Sequence[float], dash: tuple[int, int] | None) -> Iterator[Box]:
    """The pieces of a line from a to b, each (x1, y1, x2, y2); whole where there is no dash."""
    length = math.dist(a, b)
    on, off = dash or (length, 0)
    count = max(1, round((length + off) / (on + off))) if length else 1
    for i in range(count):
        start = i * (length - on) / (count - 1) if count > 1 else 0   # the last ends in the corner
        ends = [[p + (q - p) * min(at / length, 1) if length else p for p, q in zip(a, b)]
                for at in (start, start + on)]
        yield (*ends[0], *ends[1])


def stroke(pen: ImageDraw.ImageDraw, lines: Iterable[Box], mode: str) -> None:
    """Lines along the axes, from left to right or downwards, in a mode's style over a dark edge."""
    colour, width, dash = STYLES[mode]
    pieces = [piece for line in lines for piece in dashes(line[:2], line[2:], dash)]
    for radius, ink in ((width / 2 + 2, INK), (width / 2, colour)):
        for x1, y1, x2, y2 in pieces:
            pen.rectangle((x1 - radius, y1 - radius, x2 + radius, y2 + radius), fill=ink)


def sides(box: Box) -> list[Box]:
    """The four sides of a box as lines."""
    x1, y1, x2, y2 = box
    return [(x1, y1, x2, y1), (x1, y1, x1, y2), (x2, y1, x2, y2), (x1, y2, x2, y2)]


# ----- names --------------------------------------------------------------------------------------


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def place_tag(width: float, height: float, box: Box, canvas: tuple[int, int], tags: list[Box],
              boxes: list[Box]) -> Box:
    """Where a name goes: near its box, on no other name, hiding little of any box."""
    lines = [(a - 12, b - 12, c + 12, d + 12) for other in boxes for a, b, c, d in sides(other)]
    x1, y1, x2, y2 = box

    def cost(tag: Box) -> float:
        away = math.hypot(max(x1 - tag[2], tag[0] - x2, 0), max(y1 - tag[3], tag[1] - y2, 0))
        return (away + 0.1 * math.dist(tag[:2], (x1, y1 - height))
                + 10 * sum(overlap(tag, other) for other in tags)
                + 0.2 * sum(overlap(tag, line) for line in lines)
                + 0.02 * sum(overlap(tag, other) for other in boxes))

    right, bottom = canvas[0] - width - 2, canvas[1] - height - 2
    beside, level = [tag[2] + 8 for tag in tags], [tag[1] for tag in tags]
    xs = [x1 - 8, x2 - width + 8, *beside, *range(2, int(right) + 1, 24)]
    ys = [y1 - height - 14, y2 + 14, y1 + 14, *level, *range(2, int(bottom) + 1, 24)]
    places = [(min(max(x, 2), right), min(max(y, 2), bottom)) for y in ys for x in xs]
    return min(((x, y, x + width, y + height) for x, y in places), key=cost)


def draw_boxes(pen: ImageDraw.ImageDraw, boxes: dict[str, Box], labels: dict[str, str],
               canvas: tuple[int, int]) -> None:
    """Each box in the style of its mode, and its label on a tag beside it."""
    font = ImageFont.load_default(TAG_SIZE)
    for mode in (mode for mode in STYLES if mode in boxes):
        stroke(pen, sides(boxes[mode]), mode)
    tags: list[Box] = []
    for mode, box in boxes.items():
        width = pen.textlength(labels[mode], font) + 20
        tags.append(place_tag(width, 36, box, canvas, tags, list(boxes.values())))
        x1, y1, x2, y2 = tags[-1]
        pen.rounded_rectangle(tags[-1], 8, fill=STYLES[mode][0], outline=INK, width=2)
        pen.text(((x1 + x2) / 2, (y1 + y2) / 2 - 1), labels[mode], font=font, fill=INK, anchor="mm")


# ----- the page -----------------------------------------------------------------------------------


def shortened(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont,
              width: float) -> str:
    """As much of a line as there is room for."""
    text = " ".join(text.split())
    text = text if len(text) <= 200 else text[:200] + "..."
    while text and pen.textlength(text, font) > width:
        text = text.removesuffix("...")[:-1] + "..."
    return text


def draw_answers(image: Image.Image, keep: Sequence[int], grid: int, answers: Sequence[Answer],
                 caption: str) -> Image.Image:
    """One picture: kept patches bright, dropped ones dimmed, each answer's box, a legend below.

    keep:    raster indices on the grid x grid patches of the padded square
    answers: at most one for each mode, boxes in pixels of the image
    caption: one line, or several with newlines between them
    """
    scale = min(WIDTH / image.width, MAX_HEIGHT / image.height)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    width, height = max(size[0], MIN_WIDTH) + 2 * MARGIN, max(size[1], MIN_HEIGHT) + 2 * MARGIN
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    lines = caption.split("\n")
    page = Image.new("RGB", (width, height + ROW * (len(lines) + len(answers)) + MARGIN), PAGE)
    page.paste(dim_dropped(image.resize(size, Image.Resampling.LANCZOS), keep, grid), (left, top))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    boxes = {a.mode: tuple(v * scale + (left, top)[k % 2] for k, v in enumerate(a.box))
             for a in answers if a.box is not None}
    draw_boxes(pen, boxes, {a.mode: a.label for a in answers}, (width, height))
    for row, line in enumerate(lines):
        line = shortened(line, pen, font, width - 2 * MARGIN)
        pen.text((MARGIN, height + ROW * (row + 0.5)), line, font=font, fill=PAPER, anchor="lm")
    for row, answer in enumerate(answers, len(lines)):
        y = height + ROW * (row + 0.5)
        stroke(pen, [(MARGIN + 8, y, MARGIN + 78, y)], answer.mode)
        text = answer.label + ("" if answer.box else ", no box")
        pen.text((MARGIN + 104, y), text, font=font, fill=PAPER, anchor="lm")
    return page


# ----- on disk -------------------------------------------------------------------------------------


def check_picture(flag: str, path: Path, image: str | None = None) -> None:
    """Refuse a picture that could not be written, or would take the place of the image it shows."""
    try:
        Image.init()
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.EXTENSION[path.suffix.lower()])
    except Exception:   # Pillow only reads that kind, or has no colours in it
        raise NanogapError(f"{flag} {path}: a picture cannot be written with that ending; "
                           "use .png or .jpg") from None
    folder = path.absolute().parent
    try:
        if path.is_dir():
            raise NanogapError(f"{flag} {path} is a folder; give the path of a picture to write")
        if not folder.is_dir():
            raise NanogapError(f"{flag} {path} would be in a folder that does not exist; "
                               f"make it with `mkdir -p {folder}`")
        if image is not None and path.exists() and path.samefile(image):
            raise NanogapError(f"{flag} {path} is the image itself; give another path")
        for there in (folder, path):
            if there.exists() and not os.access(there, os.W_OK):
                raise PermissionError(errno.EACCES, "permission denied")
    except OSError as error:
        raise unwritable(flag, path, error) from None


def unwritable(flag: str, path: Path, error: OSError) -> NanogapError:
    why = error.strerror or error
    return NanogapError(f"{flag} {path} cannot be written ({why}); give another path")


def save_picture(flag: str, path: Path, picture: Image.Image) -> None:
    """Write the whole picture or nothing."""
    partial = path.with_name(path.name + ".partial")
    try:
        data = io.BytesIO()
        picture.save(data, Image.EXTENSION[path.suffix.lower()])
        partial.write_bytes(data.getvalue())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise unwritable(flag, path, error) from None
