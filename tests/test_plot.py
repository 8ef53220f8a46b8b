"""The picture of an evaluation."""

from pathlib import Path

import pytest
from PIL import Image, ImageColor

from nanogap.evaluate import plot
from nanogap.draw import STYLES
from nanogap.cli import NanogapError
from nanogap.draw import check_picture, save_picture


def row(mode: str, tokens: float, accuracy: float, prune: str = "random") -> dict:
    return {"mode": mode, "prune": prune, "visual_tokens": tokens, "accuracy": accuracy,
            "low": max(accuracy - 0.05, 0), "high": accuracy + 0.05}


ROWS = [row("full", 144, 0.55, "none"), row("gap", 36, 0.2), row("gap", 72, 0.4),
        row("shifted", 36, 0.1), row("shifted", 72, 0.1), row("permuted", 36, 0.0),
        row("permuted", 72, 0.0)]


def colours(picture: Image.Image) -> set:
    return {colour for _, colour in picture.getcolors(2 ** 24)}


def test_every_mode_has_its_colour_in_the_axes_and_its_name_below():
    picture = plot.draw_lines(ROWS)
    assert picture.size == (1000, 560 + 4 * 40)
    inside = picture.crop((plot.LEFT, plot.TOP, plot.RIGHT, plot.BOTTOM + 12))
    for mode in ("full", "gap", "shifted", "permuted"):
        assert ImageColor.getrgb(STYLES[mode][0]) in colours(inside)
    named = picture.crop((plot.LEFT + 150, plot.HEIGHT, 1000, picture.height))
    assert len(colours(named)) > 5                                             # text has soft edges


def test_a_point_stands_where_its_tokens_and_accuracy_are():
    """72 of 144 tokens is the middle; 0.4 of 0.7, the next tenth above all, is 240 of 420."""
    picture = plot.draw_lines([row("full", 144, 0.55, "none"), row("gap", 72, 0.4)])
    x, y = (plot.LEFT + plot.RIGHT) / 2, plot.BOTTOM - 240
    blue = ImageColor.getrgb(STYLES["gap"][0])
    around = picture.crop((int(x) - 20, int(y) - 12, int(x) + 20, int(y) + 12))
    assert sum(count for count, colour in around.getcolors(2 ** 16) if colour == blue) > 100
    away = picture.crop((int(x) - 20, int(y) + 40, int(x) + 20, plot.BOTTOM - 2))
    assert blue not in colours(away)


def test_lines_that_coincide_stand_a_little_apart():
    """Two intervals from 0.1 to 0.5, one over the other, would show one colour between marks."""
    same = [row(mode, 72, 0.3) | {"low": 0.1, "high": 0.5} for mode in ("gap", "shifted")]
    picture = plot.draw_lines(same)
    between = colours(picture.crop((plot.LEFT, plot.TOP, plot.RIGHT + 20, plot.BOTTOM - 240)))
    assert {ImageColor.getrgb(STYLES[mode][0]) for mode in ("gap", "shifted")} <= between


def test_more_lines_than_markers_are_still_told_apart():
    drawn = []
    for index in range(2 * len(plot.MARKERS)):
        picture, pen, _ = plot.page(60)
        plot.marker(pen, (30, 30), index, "#ffffff")
        drawn.append(picture.tobytes())
    assert len(set(drawn)) == 10


def test_a_row_for_each_case_is_longer_the_surer_it_is_not():
    rows = [row("IDs permuted", 144, 0.5, "none"), row("raster, compact", 72, 0.5)]
    rows[1] |= {"low": 0.4, "high": 0.6}
    picture, blue = plot.draw_rows(rows), ImageColor.getrgb(STYLES["gap"][0])
    ys = [plot.TOP + plot.ROW // 2 + plot.ROW * i for i in range(2)]
    lengths = [sum(picture.getpixel((x, y)) == blue for x in range(1000)) for y in ys]
    assert lengths[1] > 1.5 * lengths[0] > 0


@pytest.mark.parametrize("name, message", [
    ("x.jsonl", "a picture cannot be written with that ending; use .png or .jpg"),
    ("x", "a picture cannot be written with that ending"),
    ("no/x.png", "would be in a folder that does not exist; make it with `mkdir -p "),
    ("folder.png", "is a folder; give the path of a picture to write")])
def test_a_picture_that_cannot_be_written_is_refused_at_once(tmp_path, name: str, message: str):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(NanogapError, match=message):
        check_picture("--plot", tmp_path / name)


def test_the_picture_is_written_whole(tmp_path: Path):
    save_picture("--plot", tmp_path / "x.png", plot.draw_lines(ROWS))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert Image.open(tmp_path / "x.png").size == (1000, 720)


def test_several_strategies_have_a_panel_each_to_one_scale_and_one_legend():
    rows = [row("full", 144, 0.55, "none")]
    rows += [row(mode, 72, 0.4, prune) for prune in ("random", "trim") for mode in ("gap", "shifted")]
    picture = plot.draw_panels(rows)
    assert picture.size == (1500, 280 + 3 * plot.ROW)
    first, second = (picture.crop((x, 30, x + 500, 240)) for x in (0, 500))
    assert first.tobytes() == second.tobytes()                                 # but for the title
    assert plot.draw_panels(rows[:3]).size == plot.draw_lines(rows[:3]).size
