"""The pictures of the README and of tutorial.md.

    python -m nanogap.show.figures                      all of them, into nanogap/show/figures
    python -m nanogap.show.figures places               one of them

Letters: P tokens before the image, N visual tokens, K of them kept, A tokens after it.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from nanogap import gap
from nanogap.checks.command import Parser, answer_for
from nanogap.checks.loading import MINI, PACKAGE, TOP, load
from nanogap.checks.output import save_picture
from nanogap.errors import NanogapError
from nanogap.image import open_image
from nanogap.methods.in_decoder import prunes_there
from nanogap.models import VLM
from nanogap.prune import STRATEGIES
from nanogap.show.draw import MARGIN, PAGE, PAPER, ROW, dim_dropped, draw_results, write
from nanogap.show.table import true_box

SIDE, LABEL, FONT_SIZE = 240, 42, 22          # of a small picture and the line below it, pixels
PATCH = 40                                    # of a square before it is made small, pixels
HEAT, GREY = "#ff9a00", "#5a5a5a"
IMAGE, EXPRESSION = TOP / "image.jpg", "the man on the left"


def sheet(panels: Sequence[tuple[Image.Image, str]], columns: int, side: int = SIDE) -> Image.Image:
    """Small pictures of one shape in rows, each with a line of text below."""
    high = round(side * panels[0][0].height / panels[0][0].width)
    rows = math.ceil(len(panels) / columns)
    page = Image.new("RGB", (columns * (side + MARGIN) + MARGIN,
                             rows * (high + LABEL) + 2 * MARGIN), PAGE)
    pen = ImageDraw.Draw(page)
    for i, (picture, label) in enumerate(panels):
        row, column = divmod(i, columns)
        x = MARGIN + column * (side + MARGIN)
        y = MARGIN + row * (high + LABEL)
        page.paste(picture.resize((side, high), Image.Resampling.LANCZOS), (x, y))
        write(pen, x, y + high + LABEL / 2 - 2, label, FONT_SIZE)
    return page


class Square:
    """image.jpg as the model sees it, so large that each patch has PATCH whole pixels a side."""

    def __init__(self, model: VLM) -> None:
        self.encoded = model.encode_image(IMAGE)
        rows, columns = self.encoded.rows, self.encoded.columns
        self.picture = model.frame.fit(open_image(IMAGE), columns * PATCH)
        self.cells = model.frame.cells(rows, columns, *self.picture.size)             # (N, 4)
        self.corners = self.cells.int().tolist()      # x1, y1, x2, y2 of each patch


def asked(model: VLM, share: int, modes: Sequence[str]) -> Image.Image:
    """What run.py draws for the question of the README."""
    encoded = model.encode_image(IMAGE)
    results = {mode: model.ground(encoded, EXPRESSION, "random", f"{share}%", mode)
               for mode in modes}
    return draw_results(open_image(IMAGE), results, true_box(IMAGE, EXPRESSION), "weights/mini")


def answer(model: VLM) -> Image.Image:
    """What `python run.py image.jpg "the man on the left"` draws."""
    return asked(model, 50, ("full", "shifted", "gap"))


def sweep(model: VLM) -> list[Image.Image]:
    """The same question with fewer and fewer patches, at even steps: a frame for each.

    A smaller share keeps a part of what a larger one keeps: the first of one random order.
    """
    frames = []
    for share in range(100, 5, -5):                     # percent
        page = asked(model, share, ("shifted", "gap"))
        write(ImageDraw.Draw(page), page.width - MARGIN, page.height - 2 * ROW,
              f"{share} % kept", 46, anchor="rm")
        page.thumbnail((720, 720))
        frames.append(page)
    return frames


def patches(model: VLM) -> Image.Image:
    """The image as a square, the raster index of each patch, and what CLS attends to."""
    square = Square(model)
    ruled = square.picture.copy()
    pen = ImageDraw.Draw(ruled)
    font = ImageFont.load_default(21)
    for index, (x1, y1, x2, y2) in enumerate(square.corners):
        pen.rectangle((x1, y1, x2, y2), outline=PAGE)
        pen.text(((x1 + x2) / 2, (y1 + y2) / 2), str(index), PAGE, font, anchor="mm",
                 stroke_width=2, stroke_fill=PAPER)
    weights = model.see(square.encoded, {"cls_attention"}, "").cls_attention.float().mean(0)  # (N,)
    levels = (200 * (weights / weights.max()) ** 0.5).round().int().tolist()
    mask = Image.frombytes("L", (square.encoded.columns, square.encoded.rows), bytes(levels))
    mask = mask.resize(square.picture.size, Image.Resampling.NEAREST)
    grey = square.picture.convert("L").point(lambda level: level * 0.5).convert("RGB")
    attended = Image.composite(Image.new("RGB", grey.size, HEAT), grey, mask)
    return sheet([(square.picture, "padded to a square"),
                  (ruled, f"{square.encoded.rows} x {square.encoded.columns} patches"),
                  (attended, "what CLS attends to")], 3, 324)


def line(model: VLM) -> Image.Image:
    """Sixteen patches on the line of position IDs: a token stands where its ID says."""
    P, N, A = 3, 16, 3
    ranked = torch.tensor([9, 6, 2, 13, 10, 5])
    cell, left, high = 38, 140, 64
    page = Image.new("RGB", (left + cell * (P + N + A + 1), 5 * high), PAGE)
    pen = ImageDraw.Draw(page)
    for row, mode in enumerate(("full", "gap", "shifted", "permuted")):
        layout = gap.lay_out(torch.arange(N) if mode == "full" else ranked, P, N, A, mode)
        kept = layout.kept.tolist()
        y = 14 + row * high
        write(pen, MARGIN, y + cell / 2, mode, FONT_SIZE)
        names = ["T"] * P + [str(index) for index in kept] + ["T"] * A
        hues = [f"hsv({306 * index / N}, 55%, 95%)" for index in kept]        # red to violet
        colours = [GREY] * P + hues + [GREY] * A
        for name, colour, at in zip(names, colours, layout.position_ids.tolist(), strict=True):
            x = left + at * cell
            pen.rectangle((x, y, x + cell - 4, y + cell - 4), colour)
            write(pen, x + cell / 2 - 2, y + cell / 2 - 2, name, FONT_SIZE,
                  PAPER if name == "T" else PAGE, "mm")
    y = 4 * high + 16
    write(pen, MARGIN, y, "position ID", FONT_SIZE)
    for at in range(P + N + A):
        write(pen, left + at * cell + cell / 2 - 2, y, str(at), 18, anchor="mm")
    return page


def places(model: VLM) -> Image.Image:
    """image.jpg put together again: each kept patch in the cell that its position ID names."""
    square = Square(model)
    N = len(square.cells)
    ranked = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    panels = []
    for mode in ("full", "gap", "shifted", "permuted"):
        layout = gap.lay_out(ranked if mode == "full" else ranked[:N // 2], 0, N, 0, mode)
        canvas = Image.new("RGB", square.picture.size, GREY)
        for index, at in zip(layout.kept.tolist(), layout.position_ids.tolist(), strict=True):
            canvas.paste(square.picture.crop(square.corners[index]), square.corners[at])
        panels.append((canvas, f"{mode}, {len(layout.kept)} tokens"))
    return sheet(panels, 4)


def strategies(model: VLM) -> Image.Image:
    """A quarter of the patches of image.jpg, as each strategy chooses them for one expression.

    Those that prune in the decoder keep a half in the mean over layers; what is left is shown.
    """
    square = Square(model)
    panels = []
    for name in STRATEGIES:
        budget = "50%" if prunes_there(name) else "25%"
        kept = model.ground(square.encoded, EXPRESSION, name, budget, max_new_tokens=1).keep
        bright = dim_dropped(square.picture, kept.tolist(), square.cells)
        panels.append((bright, f"{name}, {len(kept)}"))
    return sheet(panels, 4)


FIGURES = {draw.__name__: draw for draw in (answer, patches, line, places, strategies)}


def make(names: Sequence[str], model: VLM, out: Path) -> Iterator[Path]:
    """Draw some of the pictures; their paths."""
    for name in names:
        if name == "sweep":
            path = out / "sweep.webp"
            first, *others = sweep(model)
            ms = [2400, *[400] * (len(others) - 1), 2400]
            save_picture("figure", path, first, append_images=others, save_all=True, duration=ms,
                         loop=0, quality=75, method=4)
        else:
            path = out / f"{name}.png"
            small = FIGURES[name](model).quantize(255, dither=Image.Dither.NONE)
            save_picture("figure", path, small, optimize=True)
        yield path


def command(argv: Sequence[str] | None) -> None:
    """Draw the pictures that were asked for."""
    names = [*FIGURES, "sweep"]
    parser = Parser(prog="python -m nanogap.show.figures",
                    description="Draw the pictures of the README and of tutorial.md.")
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"any of {', '.join(names)} (default: all)")
    args = parser.parse_args(argv)
    for name in set(args.names) - set(names):
        raise NanogapError(f"there is no picture {name!r}: choose from {', '.join(names)}")
    out = PACKAGE / "show" / "figures"
    for path in make(args.names or names, load(MINI, "cpu", "float32"), out):
        print(path, flush=True)


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.show.figures", command, None))
