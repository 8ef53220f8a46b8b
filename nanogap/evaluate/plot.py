"""Pictures of an evaluation, drawn with Pillow: accuracy over the tokens kept, or a row per case.

In:  the rows of a report (score.py).  Out: one picture, also for colour-blind readers.

There is a panel for each strategy.  A mode has the same colour, dash and marker in every panel and
in every picture.  All tokens are a horizontal line with its interval as a band.  Lines stand a
little apart, so that those which coincide can all be seen.  Letters can be read where the picture
is shown 800 pixels wide.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from nanogap.gap import MODES
from nanogap.show.draw import PAGE, PAPER, STYLES, dashes

WIDTH, FONT_SIZE, ROW = 1200, 24, 40          # of the page; its letters; a line of the legend
LEFT, RIGHT, TOP = 90, 24, 48                 # margins of the page, pixels
HEIGHTS = {1: 460, 2: 330, 3: 250, 4: 220}    # of a panel's axes, by the number of columns
TITLE, TICKS, APART = 40, 50, 30              # above and below axes, and between columns
GRID, BAND = "#4a4a4a", "#3a3a3a"
Point = tuple[float, float]
Font = Any                                    # Pillow has two types of it


class Line(NamedTuple):
    """How a mode is drawn."""

    colour: str
    dash: tuple[int, int] | None
    corners: int              # of its marker; 32 are a circle
    turn: int                 # of the marker, degrees
    hollow: bool = False


MARKERS = {                   # corners and turn; all tokens have none
    "shifted":                 (32, 0),
    "permuted":                (4, 0),
    "gap":                     (4, 45),
    "ranked, original":        (3, 0),
    "compact, text not moved": (3, 180),
    "original, text collides": (5, 0),
}
OTHER = Line("#bdbdbd", None, 32, 0, hollow=True)   # a mode of another program


def line_of(mode: str) -> Line:
    """How a mode is drawn, in every picture: in the colour and dash of its boxes (draw.py)."""
    if mode not in STYLES:
        return OTHER
    colour, _, dash = STYLES[mode]
    return Line(colour, dash, *MARKERS.get(mode, (32, 0)))


def are_cases(rows: Sequence[dict]) -> bool:
    """Whether rows are no points of lines: cases of the ablation, or tokens that nobody counted."""
    return any(row["visual_tokens"] is None for row in rows) or any(
        row["prune"] == "none" and row["mode"] not in MODES for row in rows)


def page(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, Font]:
    """An empty page, a pen, and letters."""
    picture = Image.new("RGB", (WIDTH, height), PAGE)
    return picture, ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)


def top_of(rows: Sequence[dict]) -> float:
    """Where the axis of accuracy ends: the next tenth above all intervals."""
    return min(1.0, (int(10 * max(row["high"] for row in rows)) + 1) / 10)


def ticks(top: float) -> list[float]:
    """Marks of accuracy: at each tenth, or each fifth where there are many."""
    return [i / 10 for i in range(0, round(top * 10) + 1, 2 if top > 0.5 else 1)]


def marker(pen: ImageDraw.ImageDraw, at: Point, style: Line, radius: int = 10) -> None:
    """The mark of a mode at a place."""
    inside = PAGE if style.hollow else style.colour
    pen.regular_polygon((*at, radius + 1), style.corners, style.turn, inside, PAGE)
    pen.regular_polygon((*at, radius), style.corners, style.turn, inside, style.colour, 3)


def stroke(pen: ImageDraw.ImageDraw, points: Sequence[Point], style: Line) -> None:
    """A line through points in the colour and with the dash of a mode."""
    for a, b in zip(points, points[1:], strict=False):
        for piece in dashes(a, b, style.dash):
            pen.line(piece, style.colour, 4)


# ----- a panel ------------------------------------------------------------------------------------


class Axes(NamedTuple):
    """Where a panel lies on the page, and what its axes range over."""

    left: float
    right: float
    top: float
    bottom: float
    accuracy: float           # at the top; 0 is at the bottom
    fewest: float             # visual tokens of the leftmost point
    most: float

    def y(self, accuracy: float) -> float:
        return self.bottom - (self.bottom - self.top) * accuracy / self.accuracy

    def x(self, tokens: float) -> float:
        """Points begin and end a little inside the panel; if all are one, it is in the middle."""
        if self.fewest == self.most:
            return (self.left + self.right) / 2
        inside = 50
        width = self.right - self.left - 2 * inside
        return self.left + inside + width * (tokens - self.fewest) / (self.most - self.fewest)


def draw_axes(pen: ImageDraw.ImageDraw, font: Font, axes: Axes, rows: Sequence[dict], title: str,
              named: bool) -> None:
    """A grid of accuracies, and a mark at each number of tokens for which there is room.

    named: whether the marks of accuracy have their numbers
    """
    for share in ticks(axes.accuracy):
        y = axes.y(share)
        pen.line((axes.left, y, axes.right, y), GRID)
        if named:
            pen.text((axes.left - 12, y), f"{share:.1f}", PAPER, font, "rm")
    free = axes.right + 60
    for count in sorted({row["visual_tokens"] for row in rows}, reverse=True):
        x = axes.x(count)
        pen.line((x, axes.bottom, x, axes.bottom + 8), PAPER, 2)
        if x + 36 < free:
            pen.text((x, axes.bottom + 14), f"{count:.4g}", PAPER, font, "mt")
            free = x - 36
    pen.line((axes.left, axes.bottom, axes.right, axes.bottom), PAPER, 2)
    pen.text((axes.left, axes.top - 12), title, PAPER, font, "ls")


def draw_whole(pen: ImageDraw.ImageDraw, axes: Axes, row: dict) -> None:
    """All tokens: a line across the panel, and its interval as a band."""
    y = axes.y(row["accuracy"])
    pen.rectangle((axes.left, axes.y(row["high"]), axes.right, axes.y(row["low"])), BAND)
    stroke(pen, [(axes.left, y), (axes.right, y)], line_of("full"))


def draw_mode(pen: ImageDraw.ImageDraw, axes: Axes, rows: Sequence[dict], style: Line,
              shift: float) -> None:
    """The line of one mode: points with their intervals, moved sideways by some pixels."""
    rows = sorted(rows, key=lambda row: row["visual_tokens"])
    points = [(axes.x(row["visual_tokens"]) + shift, axes.y(row["accuracy"])) for row in rows]
    for (x, _), row in zip(points, rows, strict=True):
        pen.line((x, axes.y(row["low"]), x, axes.y(row["high"])), style.colour, 2)
    stroke(pen, points, style)
    for point in points:
        marker(pen, point, style)


# ----- accuracy over tokens -----------------------------------------------------------------------


def columns_of(panels: int) -> int:
    """Three columns where that leaves no cell empty, else the number that leaves the fewest."""
    if panels < 4:
        return panels
    return min((3, 2, 4), key=lambda columns: -panels % columns)


def axes_of(index: int, panels: int, accuracy: float, rows: Sequence[dict]) -> Axes:
    """The place of a panel among others, with an axis of tokens for its own rows."""
    columns = columns_of(panels)
    height = HEIGHTS[columns]
    width = (WIDTH - LEFT - RIGHT - APART * (columns - 1)) / columns
    left = LEFT + (width + APART) * (index % columns)
    top = TOP + TITLE + (TITLE + height + TICKS) * (index // columns)
    tokens = [row["visual_tokens"] for row in rows] or [0]
    return Axes(left, left + width, top, top + height, accuracy, min(tokens), max(tokens))


def draw_panels(rows: Sequence[dict]) -> Image.Image:
    """A panel for each strategy, in it a line for each mode; all tokens are a line across all."""
    whole = [row for row in rows if row["mode"] == "full"]
    strategies: dict[str, list[dict]] = {}
    for row in rows:
        if row["mode"] != "full":
            strategies.setdefault(row["prune"], []).append(row)
    strategies = strategies or {"": []}                                       # all tokens alone
    modes = list(dict.fromkeys(row["mode"] for mine in strategies.values() for row in mine))
    places = [axes_of(index, len(strategies), top_of(rows), mine)
              for index, mine in enumerate(strategies.values())]
    bottom = int(places[-1].bottom) + TICKS
    names = {mode: mode for mode in modes}
    if whole:
        names = {"full": f"full: all {whole[0]['visual_tokens']:.4g} tokens"} | names
    picture, pen, font = page(bottom + ROW)
    legend = legend_rows(pen, font, names)
    picture, pen, font = page(bottom + ROW + ROW * len(legend) + ROW // 2)
    for axes, (strategy, mine) in zip(places, strategies.items(), strict=True):
        for row in whole:
            draw_whole(pen, axes, row)
        draw_axes(pen, font, axes, mine, strategy, named=axes.left == LEFT)
        for index, mode in enumerate(modes):
            shift = 7 * (index - (len(modes) - 1) / 2)
            draw_mode(pen, axes, [row for row in mine if row["mode"] == mode], line_of(mode),
                      shift)
    pen.text((20, 16), "share found, with 95 % intervals", PAPER, font, "lt")
    pen.text(((LEFT + WIDTH - RIGHT) / 2, bottom), "visual tokens", PAPER, font, "mt")
    draw_legend(pen, font, legend, names, bottom + ROW)
    return picture


def legend_rows(pen: ImageDraw.ImageDraw, font: Font,
                names: dict[str, str]) -> list[list[tuple[str, float]]]:
    """Each mode of the legend and where it begins: as many in a row as there is room for."""
    rows: list[list[tuple[str, float]]] = [[]]
    x: float = LEFT
    for mode, name in names.items():
        width = 90 + pen.textlength(name, font)
        if rows[-1] and x + width > WIDTH - RIGHT:
            rows.append([])
            x = LEFT
        rows[-1].append((mode, x))
        x += width + 50
    return rows


def draw_legend(pen: ImageDraw.ImageDraw, font: Font, rows: list[list[tuple[str, float]]],
                names: dict[str, str], top: float) -> None:
    """The line, the marker and the name of each mode."""
    for index, row in enumerate(rows):
        y = top + ROW * (index + 0.5)
        for mode, x in row:
            style = line_of(mode)
            stroke(pen, [(x, y), (x + 74, y)], style)
            if mode != "full":
                marker(pen, (x + 37, y), style)
            pen.text((x + 90, y), names[mode], PAPER, font, "lm")


# ----- a row for each case ------------------------------------------------------------------------


def draw_rows(rows: Sequence[dict]) -> Image.Image:
    """Accuracy and interval of each run on a line of its own, under its name."""
    top = top_of(rows)
    start, end = 560, WIDTH - 120
    bottom = TOP + TITLE + ROW * len(rows)
    picture, pen, font = page(bottom + TICKS)

    def x(share: float) -> float:
        return start + (end - start) * share / top

    for share in ticks(top):
        pen.line((x(share), TOP + TITLE - 6, x(share), bottom), GRID)
        pen.text((x(share), bottom + 8), f"{share:.1f}", PAPER, font, "mt")
    for index, row in enumerate(rows):
        y = TOP + TITLE + ROW * (index + 0.5)
        pen.text((20, y), row["mode"], PAPER, font, "lm")
        pen.text((start - 16, y), kept(row), PAPER, font, "rm")
        pen.line((x(row["low"]), y, x(row["high"]), y), line_of("gap").colour, 4)
        marker(pen, (x(row["accuracy"]), y), Line(PAPER, None, 32, 0))
        pen.text((WIDTH - 20, y), f"{row['accuracy']:.3f}", PAPER, font, "rm")
    pen.text((20, 16), "share found, with 95 % intervals", PAPER, font, "lt")
    return picture


def kept(row: dict) -> str:
    """How many tokens stayed, and who chose them, as far as that is known."""
    words = [] if row["visual_tokens"] is None else [f"{row['visual_tokens']:.4g}"]
    if row["prune"] != "none":
        words.append(row["prune"])
    return " ".join(words)
