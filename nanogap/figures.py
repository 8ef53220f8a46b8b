"""The pictures of tutorial.md.

    python -m nanogap.figures                      all of them, into nanogap/figures
    python -m nanogap.figures places --out DIR     one of them, elsewhere

In:  weights, and image.jpg.  Out: small PNG files.
Letters: P tokens before the image, N patches, K patches kept, A tokens after it.
"""

import colorsys
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from nanogap import gap
from nanogap.cli import Parser, answer_for
from nanogap.draw import MARGIN, PAGE, PAPER, dim_dropped
from nanogap.cli import NanogapError
from nanogap.image import open_image, pad_to_square
from nanogap.models.llava import Llava
from nanogap.prune import STRATEGIES
from nanogap.weights import load

ROOT = Path(__file__).resolve().parent.parent
EXPRESSION = "the man on the left"
SIDE, LABEL, FONT_SIZE = 240, 36, 20          # of a small picture and the line below it, pixels
GREY = "#5a5a5a"


def sheet(panels: Sequence[tuple[Image.Image, str]], columns: int, side: int = SIDE) -> Image.Image:
    """Small pictures in rows, each with a line of text below."""
    rows = -(-len(panels) // columns)
    size = columns * (side + MARGIN) + MARGIN, rows * (side + LABEL) + 2 * MARGIN
    page = Image.new("RGB", size, PAGE)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    for i, (picture, label) in enumerate(panels):
        x, y = MARGIN + i % columns * (side + MARGIN), MARGIN + i // columns * (side + LABEL)
        page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + side + LABEL / 2 - 2), label, font=font, fill=PAPER, anchor="lm")
    return page


def square_of_patches(grid: int, patch: int = 40) -> Image.Image:
    """image.jpg as the square that the model sees, so large that a patch has whole pixels."""
    return pad_to_square(open_image(ROOT / "image.jpg")).resize((grid * patch,) * 2)


# ----- chapters 1 and 2 ---------------------------------------------------------------------------


def patches(model: Llava) -> Image.Image:
    """The image, its square with the grid and raster indices, and what CLS attends to."""
    grid = model.config.vision.grid
    plain = square_of_patches(grid)
    ruled, patch = plain.copy(), plain.width // grid
    pen, font = ImageDraw.Draw(ruled), ImageFont.load_default(18)
    for at in range(patch, plain.width, patch):
        pen.line((at, 0, at, plain.width), PAGE, 2)
        pen.line((0, at, plain.width, at), PAGE, 2)
    for row in range(grid):
        for column in range(grid):
            pen.text(((column + 0.5) * patch, (row + 0.5) * patch), str(row * grid + column), PAGE,
                     font, anchor="mm", stroke_width=2, stroke_fill=PAPER)
    weights = model.look(ROOT / "image.jpg").seen.cls_attention.float().mean(0)
    levels = (255 * (weights / weights.max()) ** 0.35).round().int().tolist()
    bright = Image.frombytes("L", (grid, grid), bytes(levels))
    bright = bright.resize(plain.size, Image.Resampling.NEAREST)
    lit = Image.composite(plain, Image.new("RGB", plain.size, "black"), bright)
    return sheet([(plain, "padded to a square"), (ruled, f"{grid} x {grid} patches"),
                  (lit, "what CLS attends to")], 3, 324)


# ----- chapter 8 ----------------------------------------------------------------------------------


def line(model: Llava) -> Image.Image:
    """Sixteen patches on the line of position IDs: a token stands where its ID says."""
    P, N, A = 3, 16, 3
    ranked = torch.tensor([9, 6, 2, 13, 10, 5])
    cell, left, high = 38, 130, 64
    page = Image.new("RGB", (left + cell * (P + N + A + 1), 5 * high), PAGE)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    small = ImageFont.load_default(14)
    for row, mode in enumerate(("full", "gap", "shifted", "permuted")):
        keep = torch.arange(N) if mode == "full" else ranked
        ids, _ = gap.position_ids(keep, P, N, A, mode)
        keep, y = gap.arrange(keep, gap.MODES[mode][0]).tolist(), 14 + row * high
        pen.text((MARGIN, y + cell / 2), mode, PAPER, font, anchor="lm")
        for token, at in enumerate(ids.tolist()):
            inside = P <= token < P + len(keep)
            hue = colorsys.hsv_to_rgb(0.85 * keep[token - P] / N, 0.55, 0.95) if inside else None
            x, colour = left + at * cell, tuple(round(255 * c) for c in hue) if hue else GREY
            pen.rectangle((x, y, x + cell - 4, y + cell - 4), colour)
            pen.text((x + cell / 2 - 2, y + cell / 2 - 2), str(keep[token - P]) if inside else "T",
                     PAGE if inside else PAPER, font, anchor="mm")
    y = 4 * high + 16
    pen.text((MARGIN, y), "position ID", PAPER, font, anchor="lm")
    for at in range(P + N + A):
        pen.text((left + at * cell + cell / 2 - 2, y), str(at), PAPER, small, anchor="mm")
    return page


def places(model: Llava) -> Image.Image:
    """image.jpg put together again: each kept patch in the cell that its position ID names."""
    grid = model.config.vision.grid
    N, whole = grid * grid, square_of_patches(grid)
    patch, panels = whole.width // grid, []
    ranked = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for mode in ("full", "gap", "shifted", "permuted"):
        keep = ranked if mode == "full" else ranked[:N // 2]
        ids, _ = gap.position_ids(keep, 0, N, 0, mode)
        canvas = Image.new("RGB", whole.size, GREY)
        for index, at in zip(gap.arrange(keep, gap.MODES[mode][0]).tolist(), ids.tolist()):
            x, y = index % grid * patch, index // grid * patch
            canvas.paste(whole.crop((x, y, x + patch, y + patch)),
                         (at % grid * patch, at // grid * patch))
        panels.append((canvas, f"{mode}, {len(keep)} tokens"))
    return sheet(panels, 4)


# ----- chapter 10 ---------------------------------------------------------------------------------


def strategies(model: Llava) -> Image.Image:
    """A quarter of the patches of image.jpg, as each strategy chooses them for one expression."""
    grid, panels = model.config.vision.grid, []
    look, whole = model.look(ROOT / "image.jpg", share=True), square_of_patches(grid)
    for name in STRATEGIES:
        result = model.ground(look, EXPRESSION, name, grid * grid // 4, "gap", max_new_tokens=1)
        keep = result.keep.tolist()
        panels.append((dim_dropped(whole, keep, grid), f"{name}, {len(keep)}"))
    return sheet(panels, 4)


# ----- the command --------------------------------------------------------------------------------


FIGURES: dict[str, Callable[[Llava], Image.Image]] = {
    "patches": patches, "line": line, "places": places, "strategies": strategies}


def make(names: Sequence[str], model: Llava, out: Path) -> list[Path]:
    """Draw some of the pictures; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        picture = FIGURES[name](model).quantize(255, dither=Image.Dither.NONE)
        picture.save(out / f"{name}.png", optimize=True)
    return [out / f"{name}.png" for name in names]


def command(argv: Sequence[str] | None) -> None:
    """Draw the pictures that were asked for."""
    parser = Parser(prog="python -m nanogap.figures",
                    description="Draw the pictures of tutorial.md.")
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"any of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", metavar="DIR",
                        help="default: weights/mini")
    parser.add_argument("--out", type=Path, default=ROOT / "nanogap" / "figures", metavar="DIR",
                        help="default: nanogap/figures")
    args = parser.parse_args(argv)
    unknown = set(args.names) - set(FIGURES)
    if unknown:
        raise NanogapError(f"there is no picture {min(unknown)!r}: "
                           f"choose from {', '.join(FIGURES)}")
    for path in make(args.names or list(FIGURES), load(args.weights, "cpu", "float32"), args.out):
        print(path)


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.figures", command, None))
