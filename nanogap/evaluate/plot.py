"""Pictures of an evaluation, drawn with Pillow: accuracy over the tokens kept, or a row per case.

In:  the rows of a report (score.py).  Out: one picture, also for colour-blind readers: each line
has the colour and the dash of its mode (draw.py), a marker of its own, and a name below.  Lines
stand a little apart, so that those which coincide can all be seen.
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from nanogap.draw import PAGE, PAPER, STYLES, dashes

WIDTH, HEIGHT, ROW, FONT_SIZE = 1000, 560, 40, 24
LEFT, RIGHT, TOP, BOTTOM = 90, 960, 60, 480   # of the axes, pixels
COLUMNS = 3                                   # of panels
GRID = "#4a4a4a"
MARKERS = ((32, 0), (4, 0), (4, 45), (3, 0), (3, 180))   # corners and turn; filled, then hollow
Point = tuple[float, float]


def page(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, ImageFont.FreeTypeFont]:
    picture = Image.new("RGB", (WIDTH, height), PAGE)
    return picture, ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)


def top_of(rows: Sequence[dict]) -> float:
    """Where the axis of accuracy ends: the next tenth above all intervals."""
    return min(1.0, (int(10 * max(row["high"] for row in rows)) + 1) / 10)


def ticks(top: float) -> list[float]:
    """Marks of accuracy: at each tenth, or each fifth where there are many."""
    return [i / 10 for i in range(0, round(top * 10) + 1, 2 if top > 0.5 else 1)]


def marker(pen: ImageDraw.ImageDraw, at: Point, index: int, colour: str) -> None:
    """The mark of the index-th line at a place."""
    corners, turn = MARKERS[index % len(MARKERS)]
    hollow = index // len(MARKERS) % 2
    pen.regular_polygon((*at, 11), corners, turn, PAGE if hollow else colour, PAGE)
    pen.regular_polygon((*at, 10), corners, turn, PAGE if hollow else colour, colour, 3)


def dashed(pen: ImageDraw.ImageDraw, points: Sequence[Point], mode: str) -> None:
    """A line through points in the colour and with the dash of a mode."""
    colour, _, dash = STYLES[mode]
    for a, b in zip(points, points[1:]):
        for piece in dashes(a, b, dash):
            pen.line(piece, colour, 4)


# ----- accuracy over tokens -----------------------------------------------------------------------


def axes(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, tokens: Sequence[float],
         top: float, most: float, title: str) -> None:
    """Axes with marks of accuracy, and of each number of tokens for which there is room."""
    for share in ticks(top):
        y = BOTTOM - (BOTTOM - TOP) * share / top
        pen.line((LEFT, y, RIGHT, y), GRID)
        pen.text((LEFT - 12, y), f"{share:.1f}", PAPER, font, "rm")
    free = RIGHT + 60
    for count in sorted(set(tokens), reverse=True):
        x = LEFT + (RIGHT - LEFT) * count / most
        pen.line((x, BOTTOM, x, BOTTOM + 8), PAPER, 2)
        if x + 30 < free:
            pen.text((x, BOTTOM + 14), f"{count:.4g}", PAPER, font, "mt")
            free = x - 30
    pen.line((LEFT, BOTTOM, RIGHT, BOTTOM), PAPER, 2)
    pen.text((LEFT - 70, 14), title, PAPER, font, "lt")
    pen.text(((LEFT + RIGHT) / 2, BOTTOM + 46), "visual tokens", PAPER, font, "mt")


def draw_panels(rows: Sequence[dict]) -> Image.Image:
    """`draw_lines` for each strategy, all to one scale, with one legend."""
    prunes = [prune for prune in dict.fromkeys(row["prune"] for row in rows) if prune != "none"]
    if len(prunes) < 2:
        return draw_lines(rows)
    width, height, legend = WIDTH // 2, HEIGHT // 2, ROW * len({row["mode"] for row in rows})
    whole = Image.new("RGB", (width * COLUMNS, height * -(-len(prunes) // COLUMNS) + legend), PAGE)
    for index, prune in enumerate(prunes):
        mine = [row for row in rows if row["prune"] in (prune, "none")]
        panel = draw_lines(mine, top_of(rows), max(row["visual_tokens"] for row in rows), prune)
        at = (width * (index % COLUMNS), height * (index // COLUMNS))
        whole.paste(panel.crop((0, 0, WIDTH, HEIGHT)).resize((width, height), Image.LANCZOS), at)
    whole.paste(panel.crop((0, HEIGHT, WIDTH, panel.height)), (0, whole.height - legend))
    return whole


def draw_lines(rows: Sequence[dict], top: float | None = None, most: float | None = None,
               title: str = "share found, with 95 % intervals") -> Image.Image:
    """A line for each mode and strategy; rows whose mode has a style in draw.py.

    top, most: where the axes of accuracy and of tokens end, if not at what the rows need
    """
    lines: dict[tuple[str, str], list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["visual_tokens"]):
        lines.setdefault((row["mode"], row["prune"]), []).append(row)
    picture, pen, font = page(HEIGHT + ROW * len(lines))
    top, tokens = top or top_of(rows), [row["visual_tokens"] for row in rows]
    most = most or max(tokens)
    axes(pen, font, tokens, top, most, title)

    def place(row: dict, key: str, index: int) -> Point:
        apart = 0 if row["mode"] == "full" else 5 * (index - (len(lines) - 1) / 2)
        return (LEFT + (RIGHT - LEFT) * row["visual_tokens"] / most + apart,
                BOTTOM - (BOTTOM - TOP) * row[key] / top)

    for index, ((mode, prune), line) in enumerate(lines.items()):
        colour, y = STYLES[mode][0], HEIGHT + ROW * (index + 0.3)
        points = [place(row, "accuracy", index) for row in line]
        for row in line:
            pen.line((*place(row, "low", index), *place(row, "high", index)), colour, 2)
        dashed(pen, points if mode != "full" else [(LEFT, points[0][1]), *points], mode)
        dashed(pen, [(LEFT, y), (LEFT + 120, y)], mode)
        for at in [*points, (LEFT + 60, y)]:
            marker(pen, at, index, colour)
        alone = len({row["prune"] for row in rows} - {"none"}) < 2
        name = "full: all tokens" if mode == "full" else mode if alone else f"{mode}, {prune}"
        pen.text((LEFT + 150, y), name, PAPER, font, "lm")
    return picture


# ----- a row for each case ------------------------------------------------------------------------


def draw_rows(rows: Sequence[dict]) -> Image.Image:
    """Accuracy and interval of each run on a line of its own, under its name."""
    picture, pen, font = page(2 * TOP + ROW * len(rows) + 20)
    start, end, top = 520, WIDTH - 110, top_of(rows)
    bottom = TOP + ROW * len(rows)

    def x(share: float) -> float:
        return start + (end - start) * share / top

    for share in ticks(top):
        pen.line((x(share), TOP - 6, x(share), bottom), GRID)
        pen.text((x(share), bottom + 8), f"{share:.1f}", PAPER, font, "mt")
    for index, row in enumerate(rows):
        y = TOP + ROW * (index + 0.5)
        kept = f"{row['visual_tokens']:.4g}" + f" {row['prune']}" * (row["prune"] != "none")
        pen.text((20, y), f"{row['mode']}", PAPER, font, "lm")
        pen.text((start - 16, y), kept, PAPER, font, "rm")
        pen.line((x(row["low"]), y, x(row["high"]), y), STYLES["gap"][0], 4)
        marker(pen, (x(row["accuracy"]), y), 0, PAPER)
        pen.text((WIDTH - 20, y), f"{row['accuracy']:.3f}", PAPER, font, "rm")
    pen.text((20, 14), "case, tokens, share found with 95 % interval", PAPER, font, "lt")
    return picture
