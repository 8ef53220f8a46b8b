"""The picture of an evaluation."""

from PIL import Image, ImageColor

from nanogap.evaluate import plot
from nanogap.gap import MODES
from nanogap.show.draw import STYLES


def row(mode: str, accuracy: float, prune: str = "random", keep: int | str | None = 72) -> dict:
    return {"mode": mode, "prune": prune, "keep": keep, "accuracy": accuracy,
            "visual_tokens": keep, "low": max(accuracy - 0.1, 0), "high": min(accuracy + 0.1, 1)}


WHOLE, GAP, TRIM = row("full", 0.6, "none", 144), row("gap", 0.2), row("gap", 0.2, "trim")


def columns(picture: Image.Image, colour: str) -> list[int]:
    """The x of every pixel of that colour, the legend left out."""
    above = picture.crop((0, 0, picture.width, picture.height - 2 * plot.LINE)).convert("RGB")
    wanted = bytes(ImageColor.getrgb(colour))
    data = above.tobytes()
    return [i // 3 % above.width for i in range(0, len(data), 3) if data[i:i + 3] == wanted]


def test_a_mark_stands_at_the_share_found_on_a_line_as_long_as_its_interval():
    """All tokens at 0 and at 1 show where the axis begins and ends."""
    start, end = (columns(plot.draw({"mini": [row("full", share, "none"), row("gap", 0.5)]}),
                          STYLES["full"][0]) for share in (0.0, 1.0))
    blue = columns(plot.draw({"mini": [row("gap", 0.5)]}), STYLES["gap"][0])
    for found, share in ((min(blue), 0.4), (max(blue), 0.6), (max(blue, key=blue.count), 0.5)):
        assert abs(found - (min(start) + share * (max(end) - min(start)))) <= 4


def test_all_tokens_are_a_line_down_every_panel_with_their_interval_as_a_band():
    one, two = (plot.draw(dict.fromkeys(names, [WHOLE, GAP])) for names in ("a", "ab"))
    line, band = columns(one, STYLES["full"][0]), columns(one, plot.BAND)
    assert min(band) < min(line) - 50 and max(line) + 50 < max(band)
    assert len(columns(two, STYLES["full"][0])) == 2 * len(line)


def test_every_mode_has_a_style_and_no_two_look_alike():
    assert set(plot.MARKERS) == set(MODES) - {"full"}
    assert len(set(plot.MARKERS.values())) == len(plot.MARKERS)
    assert len({STYLES[mode][0] for mode in MODES}) == len(MODES)


def test_strategy_and_budget_have_a_row_and_so_has_each_case_that_is_no_mode():
    """Those of --ablate, and of answers that nobody named."""
    case, given = row("IDs permuted", 0.1, "none", 144), row("given", 0.5, "a\nb", None)
    whole = {"full": WHOLE}
    assert plot.put_together([WHOLE, GAP, TRIM, case, given]) == {
        "random 72": whole | {"gap": GAP}, "trim 72": whole | {"gap": TRIM},
        "none 144: IDs permuted": whole | {"IDs permuted": case},
        "a\nb -: given": whole | {"given": given}}
    assert plot.put_together([WHOLE]) == {"none 100%": whole}
    two = [row("full", share, name) for name, share in (("a", 0.2), ("b", 0.9))]
    assert [*plot.put_together(two).values()] == [{"full": each} for each in two]
    assert columns(plot.draw({"mini": [case, given]}), plot.FAINT)


def test_what_a_model_cannot_do_is_said_and_a_page_grows_with_models_and_rows():
    mini, other = [WHOLE, GAP, TRIM], [WHOLE, GAP]
    assert columns(plot.draw({"mini": mini, "other": other}), plot.FAINT)
    alone = plot.draw({"mini": mini})
    assert not columns(alone, plot.FAINT) and alone.width == plot.WIDTH
    many = plot.draw(dict.fromkeys(["/path/" * 30, *"abcdefg"], [*mini, row("gap", 0, "/p/" * 40)]))
    assert many.width > alone.width and many.height > alone.height
