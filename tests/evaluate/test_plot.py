"""The picture of an evaluation."""

import math

import pytest
from PIL import Image, ImageColor

from nanogap.evaluate import plot
from nanogap.gap import MODES
from nanogap.show.draw import PAGE, STYLES


def row(mode: str, tokens: float, accuracy: float, prune: str = "random") -> dict:
    return {"mode": mode, "prune": prune, "visual_tokens": tokens, "accuracy": accuracy,
            "low": max(accuracy - 0.05, 0), "high": accuracy + 0.05}


ROWS = [row("full", 144, 0.55, "none"), row("gap", 36, 0.2), row("gap", 72, 0.4),
        row("shifted", 36, 0.1), row("shifted", 72, 0.1), row("permuted", 36, 0.0),
        row("permuted", 72, 0.0)]


def colours(picture: Image.Image) -> set:
    return {colour for _, colour in picture.getcolors(2 ** 24)}


def colour_of(mode: str) -> tuple:
    return ImageColor.getrgb(plot.line_of(mode).colour)


def has_colour(picture: Image.Image, mode: str, box: tuple) -> bool:
    return colour_of(mode) in colours(picture.crop(tuple(int(v) for v in box)))


def test_every_mode_has_its_colour_in_the_axes_and_its_name_below():
    picture = plot.draw_panels(ROWS)
    axes = plot.axes_of(0, 1, 0.7, ROWS[1:])
    assert picture.width == plot.WIDTH
    for mode in ("full", "gap", "shifted", "permuted"):
        assert has_colour(picture, mode, (axes.left, axes.top, axes.right, axes.bottom + 12))
        assert has_colour(picture, mode, (0, axes.bottom + 70, plot.WIDTH, picture.height))
    assert colour_of("gap") == ImageColor.getrgb(STYLES["gap"][0])


def test_a_point_stands_where_its_tokens_and_accuracy_are():
    """54 is the middle of 36 and 72; 0.4 is four sevenths of the way up to 0.7."""
    rows = [row("gap", 36, 0.0), row("gap", 54, 0.4), row("gap", 72, 0.62)]
    axes = plot.axes_of(0, 1, 0.7, rows)
    x, y = axes.x(54), axes.y(0.4)
    assert (x, y) == ((axes.left + axes.right) / 2,
                      pytest.approx(axes.bottom - (axes.bottom - axes.top) * 4 / 7))
    around = plot.draw_panels(rows).crop((int(x) - 20, int(y) - 12, int(x) + 20, int(y) + 12))
    blue = colour_of("gap")
    assert sum(count for count, colour in around.getcolors(2 ** 16) if colour == blue) > 100


def test_all_tokens_are_a_line_across_every_panel_with_their_interval_as_a_band():
    rows = [row("full", 144, 0.55, "none"), row("gap", 36, 0.2), row("gap", 36, 0.2, "trim")]
    picture = plot.draw_panels(rows)
    for index in range(2):
        axes = plot.axes_of(index, 2, 0.7, rows[1:2])
        for x in (axes.left + 3, axes.right - 3):
            assert picture.getpixel((int(x), int(axes.y(0.55)))) == colour_of("full")
            assert picture.getpixel((int(x), int(axes.y(0.58)))) == ImageColor.getrgb(plot.BAND)
            assert picture.getpixel((int(x), int(axes.y(0.62)))) == ImageColor.getrgb(PAGE)


def test_every_mode_has_a_style_and_no_two_look_alike():
    assert set(plot.MARKERS) == set(MODES) - {"full"}
    drawn = set()
    for mode in [*plot.MARKERS, "another program's"]:
        page = plot.Page(60)
        style = plot.line_of(mode)
        page.marker((30, 30), style._replace(colour="#ffffff"))
        drawn.add(page.picture.tobytes())
    assert len(drawn) == len(MODES)                                            # full has none
    assert len({plot.line_of(mode).colour for mode in MODES}) == len(MODES)


def test_a_row_for_each_case_is_longer_the_surer_it_is_not():
    rows = [row("IDs permuted", 144, 0.5, "none"), row("gap", 72, 0.5)]
    rows[1] |= {"low": 0.4, "high": 0.6}
    picture, blue = plot.draw_rows(rows), colour_of("gap")
    ys = [plot.TOP + plot.TITLE + plot.ROW // 2 + plot.ROW * i for i in range(2)]
    lengths = [sum(picture.getpixel((x, y)) == blue for x in range(plot.WIDTH)) for y in ys]
    assert lengths[1] > 1.5 * lengths[0] > 0


def test_rows_are_drawn_where_there_are_no_lines():
    assert not plot.are_cases(ROWS)
    assert plot.are_cases([*ROWS, row("IDs permuted", 144, 0.5, "none")])
    unknown = row("given", 0, 0.5, "given") | {"visual_tokens": None}
    assert plot.are_cases([unknown])
    assert plot.draw_rows([unknown]).width == plot.WIDTH


def test_several_strategies_have_a_panel_each_to_one_scale_and_one_legend():
    rows = [row("full", 144, 0.55, "none")]
    rows += [row(mode, tokens, 0.4, prune) for prune in ("random", "trim")
             for mode in ("gap", "shifted") for tokens in (36, 72)]
    picture = plot.draw_panels(rows)
    panels = []
    for index in range(2):
        axes = plot.axes_of(index, 2, 0.7, rows[1:])
        place = (axes.left, axes.top, axes.right, axes.bottom + 40)
        panels.append(picture.crop(tuple(int(v) for v in place)).tobytes())
    assert panels[0] == panels[1]
    more = plot.draw_panels([*rows, row("permuted", 72, 0.1)])
    assert more.size == picture.size                                           # a row of the legend


@pytest.mark.parametrize("panels, columns", [
    (1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 3), (7, 2), (8, 2), (9, 3), (10, 2), (11, 3),
    (12, 3)])
def test_no_third_of_the_page_is_empty(panels: int, columns: int):
    assert plot.columns_of(panels) == columns
    cells = columns * math.ceil(panels / columns)
    assert (cells - panels) / cells < 1 / 5
