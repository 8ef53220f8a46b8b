"""The picture of an evaluation."""

from PIL import Image, ImageColor

from nanogap.evaluate import plot
from nanogap.gap import MODES
from nanogap.show.draw import STYLES


def row(mode: str, accuracy: float, prune: str = "random", keep: int | None = 72) -> dict:
    return {"mode": mode, "prune": prune, "keep": keep, "accuracy": accuracy,
            "visual_tokens": keep, "low": max(accuracy - 0.1, 0), "high": min(accuracy + 0.1, 1)}


def columns(picture: Image.Image, colour: str) -> list[int]:
    """The x of every pixel of that colour, the legend left out."""
    above = picture.crop((0, 0, picture.width, picture.height - 2 * plot.LINE)).convert("RGB")
    wanted = bytes(ImageColor.getrgb(colour))
    data = above.tobytes()
    return [i // 3 % above.width for i in range(0, len(data), 3) if data[i:i + 3] == wanted]


def test_a_mark_stands_at_the_share_found_on_a_line_as_long_as_its_interval():
    """All tokens at 0 and at 1 show where the axis begins and ends."""
    rows = [row("full", 0.0, "none"), row("full", 1.0, "none"), row("gap", 0.5)]
    picture = plot.draw(plot.panels_of(rows))
    white = columns(picture, STYLES["full"][0])
    start, end = min(white), max(white)
    blue = columns(picture, STYLES["gap"][0])
    for found, share in ((min(blue), 0.4), (max(blue), 0.6), (max(blue, key=blue.count), 0.5)):
        assert abs(found - (start + share * (end - start))) <= 4


def test_all_tokens_are_a_line_down_every_panel_with_their_interval_as_a_band():
    whole = row("full", 0.6, "none", 144)
    one = plot.draw(plot.panels_of([whole, row("gap", 0.2)]))
    two = plot.draw(plot.panels_of([whole, row("gap", 0.2), row("gap", 0.2, "trim")]))
    line, band = columns(one, STYLES["full"][0]), columns(one, plot.BAND)
    assert min(band) < min(line) - 50 and max(line) + 50 < max(band)
    assert len(columns(two, STYLES["full"][0])) == 2 * len(line)


def test_every_mode_has_a_style_and_no_two_look_alike():
    assert set(plot.MARKERS) == set(MODES) - {"full"}
    assert len(set(plot.MARKERS.values())) == len(plot.MARKERS)
    assert len({STYLES[mode][0] for mode in MODES}) == len(MODES)


def test_there_is_a_panel_for_each_strategy_and_a_row_for_each_budget():
    rows = [row(mode, 0.5, prune, keep) for prune in ("random", "trim") for keep in (72, None)
            for mode in ("shifted", "gap")]
    whole = row("full", 0.9, "none", 144)
    random, trim = plot.panels_of([whole, *rows])
    assert (random.title, trim.title, random.whole) == ("random", "trim", [whole])
    assert list(random.rows) == ["keep 72", "keep -"]
    assert trim.rows["keep 72"] == {"shifted": rows[4], "gap": rows[5]}
    assert plot.panels_of([whole])[0].rows == {}
    assert plot.draw(plot.panels_of([whole])).width == plot.WIDTH


def test_cases_that_are_no_modes_have_a_row_each():
    """Those of --ablate, and of answers that nobody named."""
    rows = [row("IDs permuted", 0.1, "none"), row("gap", 0.5), row("given", 0.5, "a\nb", None)]
    panel, = plot.panels_of(rows)
    assert list(panel.rows) == ["IDs permuted", "random 72: gap", "a\\nb -: given"]
    assert columns(plot.draw([panel]), plot.FAINT)


def test_several_models_have_a_panel_each_and_what_one_of_them_cannot_do_is_said():
    whole, gap, trim = row("full", 0.9, "none", 144), row("gap", 0.5), row("gap", 0.5, "trim")
    budgets = {"random 50%": ("random", 72), "trim 50%": ("trim", 72)}
    mini = plot.panel_of("mini", [whole, gap, trim], budgets)
    other = plot.panel_of("other", [whole, gap], budgets)
    assert mini == ("mini", [whole], {"random 50%": {"gap": gap}, "trim 50%": {"gap": trim}})
    assert list(other.rows) == ["random 50%"]
    picture = plot.draw([mini, other])
    assert columns(picture, plot.FAINT) and not columns(plot.draw([mini]), plot.FAINT)


def test_a_page_grows_with_its_rows_and_lines_of_panels():
    panels = [plot.Panel(f"strategy {i}", [], {"/path/" * 30: {"gap": row("gap", 0.5)}})
              for i in range(5)]
    heights = [plot.draw(panels[:count]).height for count in (1, 4, 5)]
    assert heights[0] == heights[1] < heights[2]
