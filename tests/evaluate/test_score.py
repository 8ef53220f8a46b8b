"""What counts as found, worked by hand."""

import pytest

from nanogap.evaluate.score import PADDED, is_hit, score, summary, table, wilson
from nanogap.models import MODELS

TRUTH = (20.0, 0.0, 100.0, 70.0)   # in a picture of 200 x 100


def test_wilsons_interval_by_hand():
    """8 of 10 (z = 1.96): centre 0.7167, half width 0.2266; and none of 20 is not surely none."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    low, high = wilson(0, 20)
    assert low == pytest.approx(0.0) and high == pytest.approx(0.161, abs=1e-3)


def test_a_share_is_never_below_none_or_above_all():
    """Rounding leads just below 0 for 0 of 15, which would be printed as -0.000."""
    for count in range(1, 200):
        low, high = wilson(0, count)
        assert f"{low:.3f}" == "0.000" and 0 < high < 1
        low, high = wilson(count, count)
        assert high <= 1 and 0 < low < 1


def test_in_pixels_half_a_box_is_just_found():
    assert score("pixels", "", (20, 0, 100, 35), TRUTH, 200, 100) == ((20, 0, 100, 35), 0.5)
    assert is_hit(0.5, "pixels") and not is_hit(0.499, "pixels")


def test_minigpt_adds_a_pixel_to_every_side_and_wants_more_than_half():
    """81 x 36 of 81 x 71 pixels."""
    _, iou = score("minigpt", "", (20, 0, 100, 35), TRUTH, 200, 100)
    assert iou == pytest.approx(36 / 71)
    assert not is_hit(0.5, "minigpt") and is_hit(0.501, "minigpt")


def test_lmms_eval_takes_shares_of_the_square_for_shares_of_the_picture():
    """0.25 and 0.60 of the height of 100 are 25 and 60: half of the truth, which is 0 to 70."""
    box, iou = score("lmms-eval", "[0.10, 0.25, 0.50, 0.60]", TRUTH, TRUTH, 200, 100)
    assert box == pytest.approx((20, 25, 100, 60)) and iou == pytest.approx(0.5)


def test_shikra_counts_in_the_padded_square_in_thousandths():
    """200 x 100 pixels: 50 of padding above, so (20, 25, 100, 60) is at (75, 110) of 200 down."""
    truth = (20.0, 25.0, 100.0, 60.2)
    said, pixels = "Answer: [0.100,0.375,0.500,0.550] .", (20.0, 25.0, 100.0, 60.0)
    parse = MODELS["shikra"].box_format.parse
    assert PADDED.from_pixels(truth, 200, 100) == (0.1, 0.375, 0.5, 0.551)
    box, overlap = score("shikra", said, pixels, truth, 200, 100, parse)
    assert box == pixels and overlap == pytest.approx(0.175 / 0.176)
    for bad in ("[0.100,0.375,0.500,0.550;0.1,0.1,0.2,0.2]", said + " [0.1,0.1,0.2,0.2]", "no"):
        assert score("shikra", bad, pixels, truth, 200, 100, parse) == (None, 0.0)
    assert not is_hit(0.5, "shikra") and is_hit(0.5, "pixels")


def test_lmms_eval_reads_the_numbers_in_the_format_of_the_model():
    box, _ = score("lmms-eval", "anything", None, TRUTH, 200, 100, lambda text: (0, 0, 0.5, 0.7))
    assert box == (0, 0, 100, 70)


@pytest.mark.parametrize("protocol", ["pixels", "minigpt", "lmms-eval"])
def test_no_box_overlaps_nothing(protocol: str):
    assert score(protocol, "over there", None, TRUTH, 200, 100) == (None, 0.0)


def record(iou: float, box: list | None, tokens: float = 8, keep: int | None = 8) -> dict:
    return {"prune": "trim", "keep": keep, "mode": "gap", "iou": iou, "box": box,
            "cut_off": False, "padding": 0.25, "visual_tokens": tokens, "prefill_ms": 10 * tokens,
            "decode_ms": 50.0}


BOX = [0, 0, 1, 1]
FOUR = [record(0.5, BOX), record(0.49, BOX), record(0.0, None), record(1.0, BOX)]


def test_a_row_counts_hits_boxes_and_means_of_its_own_run_only():
    row = summary(FOUR + [record(1.0, BOX, keep=4)], ("trim", 8, "gap"), "pixels")
    low, high = row.pop("low"), row.pop("high")
    assert (low, high) == wilson(2, 4)
    assert row == {"prune": "trim", "keep": 8, "mode": "gap", "expressions": 4, "accuracy": 0.5,
                   "mean_iou": 0.4975, "no_box": 0.25, "cut_off": 0.0, "padding": 0.25,
                   "visual_tokens": 8.0, "prefill_ms": 80.0, "decode_ms": 50.0}


def test_the_protocol_decides_whether_just_half_counts():
    assert summary(FOUR, ("trim", 8, "gap"), "minigpt")["accuracy"] == 0.25


def test_a_budget_that_the_strategy_finds_is_auto_and_its_tokens_are_a_mean():
    auto = [record(1.0, BOX, tokens, None) for tokens in (10, 13)]
    line = table([summary(auto, ("trim", None, "gap"), "pixels")]).split("\n")[1]
    assert line.split() == ["trim", "auto", "11.5", "gap", "1.000", "0.342..1.000", "1.000",
                            "0.000", "0.250", "115", "ms", "50", "ms"]


def test_where_no_times_were_taken_there_is_no_column_for_them():
    untimed = [r | {"prefill_ms": None, "decode_ms": None} for r in FOUR]
    head, line = table([summary(untimed, ("trim", 8, "gap"), "pixels")]).split("\n")
    assert "prefill" not in head and line.endswith("0.497   0.250    0.250")


def test_times_of_some_rows_only_have_no_column_either():
    rows = [summary(FOUR, ("trim", 8, "gap"), "pixels")]
    rows.append(rows[0] | {"prefill_ms": None, "decode_ms": None})
    assert "prefill" in table(rows[:1]) and "ms" not in table(rows)


def test_what_nobody_measured_is_a_dash():
    unknown = {"padding": None, "visual_tokens": None, "keep": None}
    row = summary([r | unknown for r in FOUR], ("trim", None, "gap"), "pixels")
    assert table([row]).split("\n")[1].split()[:4] == ["trim", "-", "-", "gap"]
    assert table([row]).split("\n")[1].split()[8] == "-"


def test_a_long_name_widens_its_column():
    row = summary([r | {"prune": "x" * 30} for r in FOUR], ("x" * 30, 8, "gap"), "pixels")
    head, line = table([row]).split("\n")
    assert len(head) == len(line) and head.index("mode") == line.index("gap")
