"""The pictures of the README and of tutorial.md.

    python -m nanogap.show.figures                      all of them, into nanogap/show/figures
    python -m nanogap.show.figures places --out DIR     one of them, elsewhere

Letters: P tokens before the image, N visual tokens, K of them kept, A tokens after it.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from nanogap import gap
from nanogap.checks.command import Parser, answer_for, path_argument
from nanogap.checks.loading import MINI, PACKAGE, TOP, load
from nanogap.checks.output import check_folder, save_picture
from nanogap.errors import NanogapError
from nanogap.fast.answered import Answered
from nanogap.image import iou, open_image
from nanogap.methods.in_decoder import prunes_there
from nanogap.models import VLM
from nanogap.prune import STRATEGIES
from nanogap.show.draw import (
    MARGIN,
    PAGE,
    PAPER,
    STYLES,
    TRUTH,
    dim_dropped,
    draw_results,
    stroke,
    write,
)
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


# ----- chapters 1 and 2 ---------------------------------------------------------------------------


def answer(model: VLM) -> Image.Image:
    """What `python run.py image.jpg "the man on the left"` draws."""
    encoded = model.encode_image(IMAGE)
    results = {mode: model.ground(encoded, EXPRESSION, "random", "50%", mode)
               for mode in ("full", "shifted", "gap")}
    return draw_results(open_image(IMAGE), results, true_box(IMAGE, EXPRESSION), "weights/mini")


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
    return sheet([(square.picture, "padded to a square"),
                  (ruled, f"{square.encoded.rows} x {square.encoded.columns} patches"),
                  (attended(square, weights), "what CLS attends to")], 3, 324)


def attended(square: Square, weights: torch.Tensor) -> Image.Image:
    """The square in grey, and the more orange the more CLS attends to it."""
    levels = (200 * (weights / weights.max()) ** 0.5).round().int().tolist()
    mask = Image.frombytes("L", (square.encoded.columns, square.encoded.rows), bytes(levels))
    mask = mask.resize(square.picture.size, Image.Resampling.NEAREST)
    grey = square.picture.convert("L").point(lambda level: level * 0.5).convert("RGB")
    return Image.composite(Image.new("RGB", grey.size, HEAT), grey, mask)


# ----- chapter 8 ----------------------------------------------------------------------------------


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


# ----- chapter 10 ---------------------------------------------------------------------------------


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


# ----- the README ---------------------------------------------------------------------------------

SHARES = [100 - 2.5 * step for step in range(37)]      # percent
STILLS = (100, 75, 50, 25, 10)
SIDES = {"shifted": "renumbered position IDs", "gap": "GAP: original position IDs"}
WIDTH, PANEL, LINE = 900, 430, 40                      # of a frame, a picture, a line of text
MS = 160                                               # a frame is shown so long


def sweep(model: VLM) -> tuple[list[Image.Image], Image.Image]:
    """image.jpg, asked one question with fewer and fewer patches: frames, and some in one still.

    Nothing is chosen by its result: it is the question of the README, seed 0, and every share from
    100 % to 10 % in even steps, those in which GAP fails as well.  A smaller share keeps a part of
    what a larger one keeps, for `random` takes the first so many of one random order.
    """
    encoded = model.encode_image(IMAGE)
    frames, stills = [], {}
    for share in SHARES:
        results = {mode: model.ground(encoded, EXPRESSION, "random", f"{share}%", mode)
                   for mode in SIDES}
        sides = {mode: side(mode, result) for mode, result in results.items()}
        kept = len(results["gap"].keep)
        told = f"\"{EXPRESSION}\": {share:.1f} % of the patches kept, {kept} of {encoded.n_patches}"
        frames.append(frame(told, share, sides))
        for mode, (panel, score) in sides.items():
            stills[mode, share] = panel, f"{mode}, {share:g} %: {score}"
    return frames, sheet([stills[mode, share] for mode in SIDES for share in STILLS], len(STILLS))


def side(mode: str, result: Answered) -> tuple[Image.Image, str]:
    """The picture with what was kept, the box that was said, and the true one dotted; the IoU."""
    picture, truth = open_image(IMAGE), true_box(IMAGE, EXPRESSION)
    scale = PANEL / picture.width
    panel = picture.resize((PANEL, round(picture.height * scale)), Image.Resampling.LANCZOS)
    panel = dim_dropped(panel, result.keep.tolist(), result.cells * scale)
    styles = (STYLES[mode][0], 5, None), (TRUTH[0], 3, (1, 16))
    for box, style in zip((result.box, truth), styles, strict=True):
        if box is not None:
            x1, y1, x2, y2 = (v * scale for v in box)
            stroke(ImageDraw.Draw(panel), [((x1, y1, x2, y2), style)])
    return panel, f"IoU {iou(result.box, truth):.2f}" if result.box and truth else "no box"


def frame(told: str, share: float, sides: dict[str, tuple[Image.Image, str]]) -> Image.Image:
    """Both modes side by side, with their IoU, and how much is kept: in words, and as a bar."""
    below = LINE + sides["gap"][0].height
    page = Image.new("RGB", (WIDTH, below + 3 * LINE - 8), PAGE)
    pen = ImageDraw.Draw(page)
    x = MARGIN
    for mode, (panel, score) in sides.items():
        page.paste(panel, (x, LINE))
        write(pen, x, LINE / 2, SIDES[mode], FONT_SIZE, STYLES[mode][0])
        write(pen, x, below + LINE / 2, score, 28, STYLES[mode][0])
        write(pen, x + 140, below + LINE / 2, "dotted: the true box", FONT_SIZE)
        x = WIDTH - PANEL - MARGIN
    y = below + 3 * LINE / 2
    write(pen, MARGIN, y, told, FONT_SIZE)
    full = WIDTH - 2 * MARGIN
    for length, colour in ((full, GREY), (full * share / 100, PAPER)):
        pen.rectangle((MARGIN, y + 22, MARGIN + length, y + 36), colour)
    return page


# ----- the command --------------------------------------------------------------------------------


FIGURES: dict[str, Callable[[VLM], Image.Image]] = {
    draw.__name__: draw for draw in (answer, patches, line, places, strategies)}


def make(names: Sequence[str], model: VLM, out: Path) -> Iterator[Path]:
    """Draw some of the pictures; their paths."""
    for name in names:
        if name == "sweep":
            frames, picture = sweep(model)
            more = [*frames[1:], *frames[-2:0:-1]]             # to the last frame, and back
            shown = [MS] * (1 + len(more))
            shown[0] = shown[len(frames) - 1] = 8 * MS
            save_picture("--out", out / "sweep.webp", frames[0], save_all=True, append_images=more,
                         duration=shown, loop=0, quality=75, method=4)
            yield out / "sweep.webp"
        else:
            picture = FIGURES[name](model)
        small = picture.quantize(255, dither=Image.Dither.NONE)
        save_picture("--out", out / f"{name}.png", small, optimize=True)
        yield out / f"{name}.png"


def command(argv: Sequence[str] | None) -> None:
    """Draw the pictures that were asked for."""
    names = [*FIGURES, "sweep"]
    parser = Parser(prog="python -m nanogap.show.figures",
                    description="Draw the pictures of the README and of tutorial.md.")
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"any of {', '.join(names)} (default: all)")
    parser.add_argument("--out", type=path_argument, default=PACKAGE / "show" / "figures",
                        metavar="DIR", help="default: nanogap/show/figures")
    args = parser.parse_args(argv)
    for name in set(args.names) - set(names):
        raise NanogapError(f"there is no picture {name!r}: choose from {', '.join(names)}")
    check_folder("--out", args.out)
    for path in make(args.names or names, load(MINI, "cpu", "float32"), args.out):
        print(path, flush=True)


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.show.figures", command, None))
