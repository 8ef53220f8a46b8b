"""The picture of an evaluation: panels, rows in them, and in each row a mark for each mode.

In:  the rows of a report (score.py).  Out: one picture, also for colour-blind readers.

A mark stands at the share found, on a line as long as its 95 % interval.  All tokens are a line
down the panel, with the interval as a band.  Letters can be read 800 pixels wide.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from nanogap.checks.command import visible
from nanogap.evaluate.score import Budget, budget
from nanogap.show.draw import PAGE, PAPER, STYLES

WIDTH, MARGIN = 1200, 24                     # of the page, and at its sides; pixels
LINE, FONT_SIZE = 40, 24                     # of a line of text, and its letters
TITLE, SCALE = 60, 60                        # above a panel, and below it
LONGEST, APART = 500, 40                     # of a label, and between panels
MOST = 4                                     # panels beside each other
RADIUS, STEP = 7, 13                         # of a mark, and down to the next one in its row
GRID, BAND, FAINT = "#4a4a4a", "#3a3a3a", "#9a9a9a"
SHARES = {0.0: "0", 0.25: "", 0.5: "0.5", 0.75: "", 1.0: "1"}      # lines of the grid

Marks = dict[str, dict]                      # by mode: what became of it, a row of the report
MARKERS = {                                  # corners (32: a circle), and turn in degrees
    "shifted":                 (32, 0),
    "permuted":                (4, 0),
    "gap":                     (4, 45),
    "ranked, original":        (3, 0),
    "compact, text not moved": (3, 180),
    "original, text collides": (5, 0),
}


class Panel(NamedTuple):
    """What is drawn below one title."""

    title: str
    whole: Sequence[dict]                    # all tokens, if they were asked
    rows: dict[str, Marks]                   # by label


def panels_of(rows: Sequence[dict]) -> list[Panel]:
    """A panel for each strategy, in it a row for each budget.

    Where not all modes have a style, as in --ablate, there is one panel with a row for each case.
    """
    whole = [row for row in rows if row["mode"] == "full"]
    are_cases = any(row["mode"] not in STYLES for row in rows)
    panels: dict[str, Panel] = {}
    for row in rows:
        if row["mode"] == "full":
            continue
        title, label = row["prune"], f"keep {budget(row)}"
        if are_cases:
            title, label = "", row["mode"]
            if row["prune"] != "none":
                label = f"{row['prune']} {budget(row)}: {label}"
        panel = panels.setdefault(title, Panel(visible(title), whole, {}))
        panel.rows.setdefault(visible(label), {})[row["mode"]] = row
    return list(panels.values()) or [Panel("", whole, {})]


def panel_of(model: str, rows: Sequence[dict],
             budgets: Mapping[str, tuple[str, Budget]]) -> Panel:
    """The rows of one model's report, put together by what was asked, as in "trim 50%"."""
    found = {label: {row["mode"]: row for row in rows if (row["prune"], row["keep"]) == asked}
             for label, asked in budgets.items()}
    return Panel(model, [row for row in rows if row["mode"] == "full"],
                 {label: marks for label, marks in found.items() if marks})


def draw(panels: Sequence[Panel]) -> Image.Image:
    """All panels to one scale, their labels at the left, and one legend."""
    font = ImageFont.load_default(FONT_SIZE)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.rows)) or [""]
    rows = [marks for panel in panels for marks in panel.rows.values()]
    modes = list(dict.fromkeys(mode for marks in rows for mode in marks if mode in STYLES))
    if any(panel.whole for panel in panels):
        modes.insert(0, "full")

    lines = math.ceil(len(panels) / MOST)
    columns = math.ceil(len(panels) / lines)
    names = min(LONGEST, max(map(font.getlength, labels))) + 2 * MARGIN
    width = (WIDTH - names - MARGIN - APART * (columns - 1)) / columns
    row = max(LINE, STEP * (1 + max(map(len, rows), default=0)))
    height = TITLE + row * len(labels) + SCALE
    bottom = LINE + height * lines
    page = Image.new("RGB", (WIDTH, int(bottom + LINE * (len(modes) + 1))), PAGE)
    pen = ImageDraw.Draw(page)
    pen.font = font
    pen.text((MARGIN, LINE), "share found, with 95 % intervals", PAPER, anchor="lm")
    for index, panel in enumerate(panels):
        left = names + (width + APART) * (index % columns)
        top = LINE + height * (index // columns) + TITLE
        if index % columns == 0:
            for number, label in enumerate(labels):
                pen.text((names - MARGIN, top + row * (number + 0.5)), cut(pen, label, LONGEST),
                         PAPER, anchor="rm")
        draw_panel(pen, panel, labels, (left, top, width), row)
    return page.crop((0, 0, WIDTH, int(draw_legend(pen, modes, bottom))))


def cut(pen: ImageDraw.ImageDraw, text: str, room: float) -> str:
    """The end of a text that is too long: of a path it says more than the beginning."""
    while pen.textlength(text) > room:
        text = "..." + text.removeprefix("...")[1:]
    return text


def draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, labels: Sequence[str],
               place: tuple[float, float, float], height: float) -> None:
    """The title, a grid of shares, all tokens, and a row for each label.

    place:  left, top and width, pixels
    height: of a row
    """
    left, top, width = place
    bottom = top + height * len(labels)

    def x(share: float) -> float:
        return left + width * share

    pen.text((left, top - 12), cut(pen, panel.title, width), PAPER, anchor="ls")
    for row in panel.whole:
        pen.rectangle((x(row["low"]), top, x(row["high"]), bottom), BAND)
    for share, name in SHARES.items():
        pen.line((x(share), top, x(share), bottom), GRID)
        pen.text((x(share), bottom + 10), name, PAPER, anchor="mt")
    for row in panel.whole:
        pen.line((x(row["accuracy"]), top, x(row["accuracy"]), bottom), STYLES["full"][0], 4)
    for index, label in enumerate(labels):
        upper = top + height * index
        pen.line((left, upper, left + width, upper), GRID)
        marks = panel.rows.get(label, {})
        if label and not marks:
            pen.text((left + 12, upper + height / 2), "not asked", FAINT, anchor="lm")
        y = upper + height / 2 - STEP * (len(marks) - 1) / 2
        for mode, row in marks.items():
            draw_mark(pen, mode, y, x(row["low"]), x(row["accuracy"]), x(row["high"]))
            y += STEP


def draw_mark(pen: ImageDraw.ImageDraw, mode: str, y: float, low: float, x: float,
              high: float) -> None:
    """The mark of a mode on its line; one that has no style is grey."""
    colour = STYLES[mode][0] if mode in STYLES else FAINT
    corners, turn = MARKERS.get(mode, (32, 0))
    pen.line((low, y, high, y), colour, 3)
    pen.regular_polygon((x, y, RADIUS), corners, turn, colour, PAGE)


def draw_legend(pen: ImageDraw.ImageDraw, modes: Sequence[str], top: float) -> float:
    """The mark and the name of each mode, as many in a line as there is room for; where it ends."""
    x, y = float(MARGIN), top + LINE / 2
    for mode in modes:
        name = "full: all tokens" if mode == "full" else mode
        width = 70 + pen.textlength(name)
        if x + width > WIDTH:
            x, y = float(MARGIN), y + LINE
        if mode == "full":
            pen.line((x, y, x + 60, y), STYLES[mode][0], 4)
        else:
            draw_mark(pen, mode, y, x, x + 30, x + 60)
        pen.text((x + 72, y), name, PAPER, anchor="lm")
        x += width + APART
    return y + LINE
