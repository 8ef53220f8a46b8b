"""Pictures of an evaluation, drawn with Pillow: accuracy over the tokens kept, or a row per case.

In:  the rows of a report (score.py).  Out: one picture, also for colour-blind readers.

There is a panel for each strategy.  A mode has the same colour, dash and marker in every panel and
in every picture.  All tokens are a horizontal line with its interval as a band.  Lines stand a
little apart, so that those which coincide can all be seen.  Letters can be read where the picture
is shown 800 pixels wide.
"""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from nanogap.gap import MODES
from nanogap.show.draw import PAGE, PAPER, STYLES, dashes

WIDTH, FONT_SIZE, ROW = 1200, 24, 40          # of the page; its letters; a line of the legend
LEFT, RIGHT, TOP = 90, 24, 48                 # margins of the page, pixels
HEIGHTS = {1: 460, 2: 330, 3: 250, 4: 220}    # of a panel's axes, by the number of columns
TITLE, TICKS, APART = 40, 50, 30              # above and below axes, and between columns
GRID, BAND = "#4a4a4a", "#3a3a3a"
SHARE = "share found, with 95 % intervals"
Point = tuple[float, float]


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


class Page:
    """An empty page, a pen, and letters; it is cut to its height when all is drawn."""

    def __init__(self, height: float) -> None:
        self.picture = Image.new("RGB", (WIDTH, int(height)), PAGE)
        self.pen = ImageDraw.Draw(self.picture)
        self.font = ImageFont.load_default(FONT_SIZE)

    def text(self, x: float, y: float, words: str, anchor: str, colour: str = PAPER) -> None:
        self.pen.text((x, y), words, colour, self.font, anchor)

    def width(self, words: str) -> float:
        return self.pen.textlength(words, self.font)

    def stroke(self, a: Point, b: Point, style: Line) -> None:
        """A line in the colour and with the dash of a mode."""
        for piece in dashes(a, b, style.dash):
            self.pen.line(piece, style.colour, 4)

    def marker(self, at: Point, style: Line, radius: int = 10) -> None:
        """The mark of a mode at a place."""
        inside = PAGE if style.hollow else style.colour
        self.pen.regular_polygon((*at, radius + 1), style.corners, style.turn, inside, PAGE)
        self.pen.regular_polygon((*at, radius), style.corners, style.turn, inside, style.colour, 3)

    def legend(self, names: dict[str, str], top: float) -> Image.Image:
        """The line, the marker and the name of each mode, as many in a row as there is room for.

        returns: the picture down to there
        """
        self.text(20, 16, SHARE, "lt")
        x, y = float(LEFT), top + ROW / 2
        for mode, name in names.items():
            width = 90 + self.width(name)
            if x > LEFT and x + width > WIDTH - RIGHT:
                x, y = LEFT, y + ROW
            style = line_of(mode)
            self.stroke((x, y), (x + 74, y), style)
            if mode != "full":
                self.marker((x + 37, y), style)
            self.text(x + 90, y, name, "lm")
            x += width + 50
        return self.picture.crop((0, 0, WIDTH, int(y + ROW)))


def are_cases(rows: Sequence[dict]) -> bool:
    """Whether rows are no points of lines: cases of the ablation, or tokens that nobody counted."""
    return any(row["visual_tokens"] is None or row["prune"] == "none" and row["mode"] not in MODES
               for row in rows)


def top_of(rows: Sequence[dict]) -> float:
    """Where the axis of accuracy ends: the next tenth above all intervals."""
    return min(1.0, (int(10 * max(row["high"] for row in rows)) + 1) / 10)


def ticks(top: float) -> list[float]:
    """Marks of accuracy: at each tenth, or each fifth where there are many."""
    return [i / 10 for i in range(0, round(top * 10) + 1, 2 if top > 0.5 else 1)]


# ----- accuracy over tokens -----------------------------------------------------------------------


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


def draw_axes(page: Page, axes: Axes, rows: Sequence[dict], title: str) -> None:
    """A grid of accuracies, and a mark at each number of tokens for which there is room."""
    for share in ticks(axes.accuracy):
        y = axes.y(share)
        page.pen.line((axes.left, y, axes.right, y), GRID)
        if axes.left == LEFT:
            page.text(axes.left - 12, y, f"{share:.1f}", "rm")
    free = axes.right + 60
    for count in sorted({row["visual_tokens"] for row in rows}, reverse=True):
        x = axes.x(count)
        page.pen.line((x, axes.bottom, x, axes.bottom + 8), PAPER, 2)
        if x + 36 < free:
            page.text(x, axes.bottom + 14, f"{count:.4g}", "mt")
            free = x - 36
    page.pen.line((axes.left, axes.bottom, axes.right, axes.bottom), PAPER, 2)
    page.text(axes.left, axes.top - 12, title, "ls")


def draw_mode(page: Page, axes: Axes, rows: Sequence[dict], style: Line, shift: float) -> None:
    """The line of one mode: points with their intervals, moved sideways by some pixels."""
    rows = sorted(rows, key=lambda row: row["visual_tokens"])
    points = [(axes.x(row["visual_tokens"]) + shift, axes.y(row["accuracy"])) for row in rows]
    for (x, _), row in zip(points, rows, strict=True):
        page.pen.line((x, axes.y(row["low"]), x, axes.y(row["high"])), style.colour, 2)
    for a, b in zip(points, points[1:], strict=False):
        page.stroke(a, b, style)
    for point in points:
        page.marker(point, style)


def draw_panels(rows: Sequence[dict]) -> Image.Image:
    """A panel for each strategy, in it a line for each mode; all tokens are a line across all."""
    whole = [row for row in rows if row["mode"] == "full"]
    strategies: dict[str, list[dict]] = {}
    for row in rows:
        if row["mode"] != "full":
            strategies.setdefault(row["prune"], []).append(row)
    strategies = strategies or {"": []}                                       # all tokens alone
    modes = list(dict.fromkeys(row["mode"] for mine in strategies.values() for row in mine))
    names = {mode: mode for mode in modes}
    if whole:
        names = {"full": f"full: all {whole[0]['visual_tokens']:.4g} tokens"} | names
    places = [axes_of(index, len(strategies), top_of(rows), mine)
              for index, mine in enumerate(strategies.values())]
    bottom = int(places[-1].bottom) + TICKS
    page = Page(bottom + ROW * (len(names) + 2))
    for axes, (strategy, mine) in zip(places, strategies.items(), strict=True):
        for row in whole:
            y = axes.y(row["accuracy"])
            page.pen.rectangle((axes.left, axes.y(row["high"]), axes.right, axes.y(row["low"])),
                               BAND)
            page.stroke((axes.left, y), (axes.right, y), line_of("full"))
        draw_axes(page, axes, mine, strategy)
        for index, mode in enumerate(modes):
            draw_mode(page, axes, [row for row in mine if row["mode"] == mode], line_of(mode),
                      7 * (index - (len(modes) - 1) / 2))
    page.text((LEFT + WIDTH - RIGHT) / 2, bottom, "visual tokens", "mt")
    return page.legend(names, bottom + ROW)


# ----- a row for each case ------------------------------------------------------------------------


def draw_rows(rows: Sequence[dict]) -> Image.Image:
    """Accuracy and interval of each run on a line of its own, under its name."""
    top = top_of(rows)
    start, end = 560, WIDTH - 120
    bottom = TOP + TITLE + ROW * len(rows)
    page = Page(bottom + TICKS)

    def x(share: float) -> float:
        return start + (end - start) * share / top

    for share in ticks(top):
        page.pen.line((x(share), TOP + TITLE - 6, x(share), bottom), GRID)
        page.text(x(share), bottom + 8, f"{share:.1f}", "mt")
    for index, row in enumerate(rows):
        y = TOP + TITLE + ROW * (index + 0.5)
        count = "" if row["visual_tokens"] is None else f"{row['visual_tokens']:.4g} "
        who = "" if row["prune"] == "none" else row["prune"]
        page.text(20, y, row["mode"], "lm")
        page.text(start - 16, y, (count + who).strip(), "rm")
        page.pen.line((x(row["low"]), y, x(row["high"]), y), line_of("gap").colour, 4)
        page.marker((x(row["accuracy"]), y), Line(PAPER, None, 32, 0))
        page.text(WIDTH - 20, y, f"{row['accuracy']:.3f}", "rm")
    page.text(20, 16, SHARE, "lt")
    return page.picture
