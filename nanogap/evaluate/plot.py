"""The picture of an evaluation: a panel for each model, rows in it, and in each row the modes.

A mark stands at the share found, on a line as long as its 95 % interval.  All tokens are a line
down the panel, with the interval as a band.  Colour-blind readers tell the modes by their shapes.
"""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from nanogap.checks.command import visible
from nanogap.evaluate.score import budget
from nanogap.gap import MODES
from nanogap.show.draw import PAGE, PAPER, STYLES

WIDTH, MARGIN = 1200, 24                     # of a page, which many models widen; at its left
LINE, FONT_SIZE, LETTER = 40, 24, 14         # of a line of text, and its letters; pixels
TOP, SCALE = 110, 50                         # above the rows, and below them
NARROWEST, APART = 160, 40                   # of panels, and right of each
LONGEST = 40                                 # of a label, in letters; of a path the end says more
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


def put_together(rows: Sequence[dict]) -> dict[str, Marks]:
    """What stands in a row, such as "random 50%", all tokens in each; other cases stand alone."""
    whole = {row["mode"]: row for row in rows if row["mode"] == "full"}
    found: dict[str, Marks] = {}
    for row in rows:
        label = f"{row['prune']} {budget(row)}"
        if row["mode"] not in STYLES:
            label = f"{label}: {row['mode']}"
        if row["mode"] != "full":
            found.setdefault(label, dict(whole))[row["mode"]] = row
    all_of_them = {"none": "100%"}               # a number is another one in each model
    return found or {f"{row['prune']} {all_of_them.get(row['prune'], budget(row))}": {"full": row}
                     for row in rows}


def draw(models: Mapping[str, Sequence[dict]]) -> Image.Image:
    """All panels to one scale, their labels at the left, and the legend below.

    models: by name, the rows of each one's report
    """
    font = ImageFont.load_default(FONT_SIZE)
    panels = [put_together(rows) for rows in models.values()]
    labels = list(dict.fromkeys(label for panel in panels for label in panel))
    shown = [visible(label)[-LONGEST:] for label in labels]
    modes = dict.fromkeys(row["mode"] for rows in models.values() for row in rows)
    legend = [mode for mode in modes if mode in STYLES]
    names = 2 * MARGIN + max(map(font.getlength, shown))
    width = max(NARROWEST, (WIDTH - names) / len(models) - APART)
    most = max(len(marks.keys() - {"full"}) for panel in panels for marks in panel.values())
    height = max(LINE, STEP * (1 + most))
    bottom = TOP + height * len(labels)
    page = Image.new("RGB", (int(names + (width + APART) * len(models)),
                             bottom + SCALE + LINE * len(legend)), PAGE)
    pen = ImageDraw.Draw(page)
    pen.font = font
    pen.text((MARGIN, LINE), "share found, with 95 % intervals", PAPER, anchor="lm")
    for number, label in enumerate(shown):
        pen.text((names - MARGIN, TOP + height * (number + 0.5)), label, PAPER, anchor="rm")
    for number, (name, panel) in enumerate(zip(models, panels, strict=True)):
        left = names + (width + APART) * number
        pen.text((left, TOP - 12), visible(name)[-int(width / LETTER):], PAPER, anchor="ls")
        draw_panel(pen, [panel.get(label, {}) for label in labels], left, width, height)
    for number, mode in enumerate(legend):
        y = bottom + SCALE + LINE * (number + 0.5)
        draw_mark(pen, mode, y, MARGIN, MARGIN + 30, MARGIN + 60)
        order, ids, _ = MODES[mode]
        text = "all tokens" if mode == "full" else f"{order} order, {ids} position IDs"
        pen.text((MARGIN + 72, y), f"{mode}: {text}", PAPER, anchor="lm")
    return page


def draw_panel(pen: ImageDraw.ImageDraw, rows: Sequence[Marks], left: float, width: float,
               height: int) -> None:
    """A grid of shares, all tokens, and in each row of that height its marks."""
    bottom = TOP + height * len(rows)
    whole = [(TOP + height * number, marks["full"])
             for number, marks in enumerate(rows) if "full" in marks]

    def x(share: float) -> float:
        return left + width * share

    for y, row in whole:
        pen.rectangle((x(row["low"]), y, x(row["high"]), y + height), BAND)
    for share, name in SHARES.items():
        pen.line((x(share), TOP, x(share), bottom), GRID)
        pen.text((x(share), bottom + 10), name, PAPER, anchor="mt")
    for y, row in whole:
        pen.line((x(row["accuracy"]), y, x(row["accuracy"]), y + height), STYLES["full"][0], 4)
    for number, marks in enumerate(rows):
        upper = TOP + height * number
        pen.line((left, upper, left + width, upper), GRID)
        if not marks:
            pen.text((left + 12, upper + height / 2), "not asked", FAINT, anchor="lm")
        pruned = [(mode, row) for mode, row in marks.items() if mode != "full"]
        for index, (mode, row) in enumerate(pruned):
            middle = upper + height / 2 + STEP * (index - (len(pruned) - 1) / 2)
            draw_mark(pen, mode, middle, x(row["low"]), x(row["accuracy"]), x(row["high"]))


def draw_mark(pen: ImageDraw.ImageDraw, mode: str, y: float, low: float, x: float,
              high: float) -> None:
    """The mark of a mode on its line; grey where it has no style; all tokens have none."""
    colour = STYLES[mode][0] if mode in STYLES else FAINT
    pen.line((low, y, high, y), colour, 3)
    if mode != "full":
        corners, turn = MARKERS.get(mode, (32, 0))
        pen.regular_polygon((x, y, RADIUS), corners, turn, colour, PAGE)
