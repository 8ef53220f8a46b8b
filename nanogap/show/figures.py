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
from nanogap.checks.loading import MINI, PACKAGE, TOP, folder_of, load
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
    font = ImageFont.load_default(FONT_SIZE)
    for i, (picture, label) in enumerate(panels):
        row, column = divmod(i, columns)
        x = MARGIN + column * (side + MARGIN)
        y = MARGIN + row * (high + LABEL)
        page.paste(picture.resize((side, high), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + high + LABEL / 2 - 2), label, font=font, fill=PAPER, anchor="lm")
    return page


class Square:
    """image.jpg as the model sees it, so large that each patch has PATCH whole pixels a side."""

    def __init__(self, model: VLM) -> None:
        if not model.pictures_alike:
            raise NanogapError("this figure shows a single square of patches, and the model sees "
                               "tiles as well: give --weights weights/mini")
        self.encoded = model.encode_image(IMAGE)
        self.seen = model.see(self.encoded, {"cls_attention"}, "")
        self.rows, self.columns = self.seen.rows, self.seen.columns
        self.picture = model.frame.fit(open_image(IMAGE), self.columns * PATCH)
        self.cells = model.frame.cells(self.rows, self.columns, *self.picture.size)   # (N, 4)
        self.corners = self.cells.int().tolist()      # x1, y1, x2, y2 of each patch

    def with_kept(self, kept: torch.Tensor) -> Image.Image:
        """The square with dropped patches dimmed; kept: raster indices (K,)."""
        return dim_dropped(self.picture, kept.tolist(), self.cells)


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
    return sheet([(square.picture, "padded to a square"),
                  (ruled, f"{square.rows} x {square.columns} patches"),
                  (attended(square), "what CLS attends to")], 3, 324)


def attended(square: Square) -> Image.Image:
    """The square in grey, and the more orange the more CLS attends to it, the mean over heads."""
    weights = square.seen.cls_attention.float().mean(0)                       # (N,)
    levels = (200 * (weights / weights.max()) ** 0.5).round().int().tolist()
    mask = Image.frombytes("L", (square.columns, square.rows), bytes(levels))
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
    font = ImageFont.load_default(FONT_SIZE)
    for row, mode in enumerate(("full", "gap", "shifted", "permuted")):
        layout = gap.lay_out(torch.arange(N) if mode == "full" else ranked, P, N, A, mode)
        kept = layout.kept.tolist()
        y = 14 + row * high
        pen.text((MARGIN, y + cell / 2), mode, PAPER, font, anchor="lm")
        names = ["T"] * P + [str(index) for index in kept] + ["T"] * A
        hues = [f"hsv({306 * index / N}, 55%, 95%)" for index in kept]        # red to violet
        colours = [GREY] * P + hues + [GREY] * A
        for name, colour, at in zip(names, colours, layout.position_ids.tolist(), strict=True):
            x = left + at * cell
            pen.rectangle((x, y, x + cell - 4, y + cell - 4), colour)
            pen.text((x + cell / 2 - 2, y + cell / 2 - 2), name, PAPER if name == "T" else PAGE,
                     font, anchor="mm")
    y = 4 * high + 16
    pen.text((MARGIN, y), "position ID", PAPER, font, anchor="lm")
    small = ImageFont.load_default(18)
    for at in range(P + N + A):
        pen.text((left + at * cell + cell / 2 - 2, y), str(at), PAPER, small, anchor="mm")
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
        panels.append((square.with_kept(kept), f"{name}, {len(kept)}"))
    return sheet(panels, 4)


# ----- the README ---------------------------------------------------------------------------------

SHARES = [100 - 2.5 * step for step in range(37)]      # percent
STILLS = (100, 75, 50, 25, 10)
SIDES = {"shifted": "renumbered position IDs", "gap": "GAP: original position IDs"}
WIDTH, PANEL, LINE = 900, 430, 40                      # of a frame, a picture, a line of text
MS = 160                                               # a frame is shown so long


class Sweep:
    """image.jpg, asked one question with fewer and fewer patches.

    Nothing is chosen by its result: it is the question of the README, seed 0, and every share from
    100 % to 10 % in even steps, those in which GAP fails as well.  A smaller share keeps a part of
    what a larger one keeps, for `random` takes the first so many of one random order.
    """

    def __init__(self, model: VLM) -> None:
        encoded = model.encode_image(IMAGE)
        truth = true_box(IMAGE, EXPRESSION)
        assert truth is not None
        self.truth = truth
        self.picture = open_image(IMAGE)
        self.results = {
            share: {mode: model.ground(encoded, EXPRESSION, "random", f"{share}%", mode)
                    for mode in SIDES} for share in SHARES}

    def panel(self, result: Answered, mode: str) -> Image.Image:
        """The picture with what was kept, the box that was said, and the true one dotted."""
        scale = PANEL / self.picture.width
        small = self.picture.resize((PANEL, round(self.picture.height * scale)),
                                    Image.Resampling.LANCZOS)
        panel = dim_dropped(small, result.keep.tolist(), result.cells * scale)
        said = STYLES[mode][0], 5, None
        for box, style in ((result.box, said), (self.truth, (TRUTH[0], 3, (1, 16)))):
            if box is not None:
                x1, y1, x2, y2 = (v * scale for v in box)
                stroke(ImageDraw.Draw(panel), [((x1, y1, x2, y2), style)])
        return panel

    def score(self, result: Answered) -> str:
        """IoU with the true box, as it is written."""
        return f"IoU {iou(result.box, self.truth):.2f}" if result.box else "no box"

    def frame(self, share: float) -> Image.Image:
        """Both modes side by side, with their IoU, and how much is kept."""
        below = LINE + round(self.picture.height * PANEL / self.picture.width)
        page = Image.new("RGB", (WIDTH, below + 3 * LINE - 8), PAGE)
        pen = ImageDraw.Draw(page)
        font, large = ImageFont.load_default(22), ImageFont.load_default(28)
        x, y = MARGIN, below + LINE / 2
        for mode, result in self.results[share].items():
            colour = STYLES[mode][0]
            page.paste(self.panel(result, mode), (x, LINE))
            pen.text((x, LINE / 2), SIDES[mode], colour, font, anchor="lm")
            pen.text((x, y), self.score(result), colour, large, anchor="lm")
            pen.text((x + 140, y), "dotted: the true box", PAPER, font, anchor="lm")
            x = WIDTH - PANEL - MARGIN
        kept, y = len(result.keep), below + 3 * LINE / 2
        told = f"\"{EXPRESSION}\": {share:.1f} % of the patches kept, {kept} of {len(result.cells)}"
        pen.text((MARGIN, y), told, PAPER, font, anchor="lm")
        full = WIDTH - 2 * MARGIN
        for length, colour in ((full, GREY), (full * share / 100, PAPER)):
            pen.rectangle((MARGIN, y + 22, MARGIN + length, y + 36), colour)
        return page

    def frames(self) -> tuple[list[Image.Image], list[int]]:
        """From all patches to the fewest and back, and how long each is shown, milliseconds."""
        down = [self.frame(share) for share in SHARES]
        frames = [*down, *down[-2:0:-1]]
        shown = [MS] * len(frames)
        shown[0] = shown[len(down) - 1] = 8 * MS
        return frames, shown

    def still(self) -> Image.Image:
        """Some of the shares beside one another, for places that do not move."""
        shown = [(self.results[share][mode], mode, share) for mode in SIDES for share in STILLS]
        return sheet([(self.panel(result, mode), f"{mode}, {share} %: {self.score(result)}")
                      for result, mode, share in shown], len(STILLS))


# ----- the command --------------------------------------------------------------------------------


FIGURES: dict[str, Callable[[VLM], Image.Image]] = {
    draw.__name__: draw for draw in (answer, patches, line, places, strategies)}


def make(names: Sequence[str], model: VLM, out: Path) -> Iterator[Path]:
    """Draw some of the pictures; their paths."""
    for name in names:
        if name == "sweep":
            sweep = Sweep(model)
            picture = sweep.still()
            frames, shown = sweep.frames()
            save_picture("--out", out / "sweep.webp", frames[0], save_all=True,
                         append_images=frames[1:], duration=shown, loop=0, quality=75, method=4)
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
    parser.add_argument("--weights", type=path_argument, default=MINI, metavar="DIR",
                        help="default: weights/mini")
    parser.add_argument("--out", type=path_argument, default=PACKAGE / "show" / "figures",
                        metavar="DIR", help="default: nanogap/show/figures")
    args = parser.parse_args(argv)
    for name in set(args.names) - set(names):
        raise NanogapError(f"there is no picture {name!r}: choose from {', '.join(names)}")
    check_folder("--out", args.out)
    model = load(folder_of(args.weights), "cpu", "float32")
    for path in make(args.names or names, model, args.out):
        print(path, flush=True)


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.show.figures", command, None))
