"""What counts as found: each project's way to read an answer, worked by hand.

A picture of 200 x 100; the true box is 20..100 x 0..70.  In the padded square of 200 x 200 the
picture begins 50 pixels down.
"""

import json

import pytest

from nanogap.evaluate.score import PROTOCOLS, READERS, is_hit, score, summary, table, wilson

TRUTH, SIZE = (20.0, 0.0, 100.0, 70.0), (200, 100)


def box_of(protocol: str, text: str) -> tuple | None:
    box, _ = score(protocol, text, None, TRUTH, *SIZE)
    return box and tuple(round(v, 6) for v in box)


def test_wilsons_interval_by_hand():
    """8 of 10 (z = 1.96): centre 0.7167, half width 0.2266; and none of 20 is not surely none."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    low, high = wilson(0, 20)
    assert low == pytest.approx(0.0) and high == pytest.approx(0.161, abs=1e-3)


def test_a_share_is_never_below_none_or_above_all():
    """Rounding leads just below 0 for 0 of 15, which would be printed as -0.000."""
    for count in range(1, 200):
        assert f"{wilson(0, count)[0]:.3f}" == "0.000"
        assert wilson(count, count)[1] <= 1


READINGS: dict[str, list[tuple[str, tuple | None]]] = {
    "minigpt": [
        ("{<10><0><50><70>}", (20, 0, 100, 70)),
        (" {< 1 0 ><0> <50><70>}</s>", (20, 0, 100, 70)),          # blanks go, also in a number
        ("{<10><0><unk><50><70>}", (20, 0, 100, 70)),
        ("{<10><0><50><70>} a man", (20, 0, 100, 70)),
        ("{<10><0><50><70>} one of 2", None),                      # five numbers
        ("It is {<10><0><50><70>}", None),                         # not at the start
        ("{<1000><0><50><70>}", None), ("[0.10, 0.00, 0.50, 0.70]", None),
        ("{<10><0><500><70>}", (20, 0, 1000, 70)),                 # no range is asked
        ("{<50><70><10><0>}", (100, 70, 20, 0)),                   # nor an order
        ("", None), ("{<10><0><50><70>} " + "9" * 5000, None)],
    "shikra": [
        ("Answer: [0.100,0.250,0.500,0.600] .", (20, 0, 100, 70)),
        ("[0.1,0.25,0.5,0.6]", (20, 0, 100, 70)),                  # as many digits as it likes
        ("[0.100, 0.250, 0.500, 0.600]", None),                    # a blank
        ("[.1,.25,.5,.6]", None), ("[10.1,0.2,0.5,0.6]", None), ("[-0.1,0.2,0.5,0.6]", None),
        ("[0.1,0.25,0.5,0.6;0.1,0.1,0.2,0.2]", None),              # two boxes
        ("[0.1,0.25,0.5,0.6] or [0.1,0.1,0.2,0.2]", None),         # two brackets
        ("[the man] [0.1,0.25,0.5,0.6]; there", (20, 0, 100, 70)),  # the first is none
        ("[2.0,0.25,0.5,0.6]", (400, 0, 100, 70)),                 # no range is asked
        ("[0.1,0.25,0.5]", None), ("(0.1,0.25,0.5,0.6)", None), ("", None)],
    "lmms-eval": [
        ("[0.10, 0.25, 0.50, 0.60]", (20, 25, 100, 60)),           # of the picture, not the square
        ("[.10, .25, .50, .60]", None), ("[0.1 , 0.25, 0.5, 0.6]", None),
        ("[1, 2] [0.1, 0.25, 0.5, 0.6] [0.2, 0.2, 0.4, 0.4]", (20, 25, 100, 60)),   # the first
        ("[0.1, 0.25, 1.2, 0.6]", (20, 25, 240, 60)), ("[-0.1, 0, 0.5, 0.6]", (-20, 0, 100, 60)),
        ("[0.1, 0.25, 0.5, 0.6, 0.7]", None), ("over there", None)],
    "vlmevalkit": [
        ("[0.1, 0.0, 0.5, .7]", (20, 0, 100, 70)), ("[100 0 500 700]", (20, 0, 100, 70)),
        ("[0.1, 0.0, 1.5, 0.7]", (20, 0, 200, 70)),                # 1.5 is a share, and clipped
        ("[0.1, 0.0, 1.6, 0.7]", (0.02, 0, 0.32, 0.07)),           # 1.6 is a thousandth
        ("[20, 0, 1001, 70]", (20, 0, 200, 70)),                   # beyond 1000: pixels
        ("[500, 700, 100, 0]", (20, 0, 100, 70)),                  # corners are put in order
        ("<box>(100,0),(500,700)</box>", (20, 0, 100, 70)),        # no bracket: the first four
        ("in 1 picture: 100, 0, 500, 700", (0, 10, 0.2, 50)),      # 1, 100, 0, 500: put in order
        ("[1, 2, 3]", None), ("[1e2, 0, 5e2, 7e2]", (20, 0, 100, 70)),
        ("[-100, 0, 500, 700]", (0, 0, 100, 70))]}


@pytest.mark.parametrize("protocol, text, box", [
    (protocol, *reading) for protocol, readings in READINGS.items() for reading in readings])
def test_each_protocol_reads_as_its_project_does(protocol: str, text: str, box: tuple | None):
    assert box_of(protocol, text) == box


@pytest.mark.parametrize("protocol, text, truth, overlap", [
    ("minigpt", "{<10><0><50><35>}", TRUTH, 36 / 71),            # 81 x 36 of 81 x 71 pixels
    # in the square it begins at 75 of 200 down and ends at 110.2, in thousandths 0.551
    ("shikra", "[0.100,0.375,0.500,0.550]", (20.0, 25.0, 100.0, 60.2), 0.175 / 0.176),
    # 0.25 and 0.60 of the height of 100 are 25 and 60, of the truth's 0 to 70
    ("lmms-eval", "[0.10, 0.25, 0.50, 0.60]", TRUTH, 0.5)])
def test_each_protocol_measures_the_overlap_in_its_own_frame(
        protocol: str, text: str, truth: tuple, overlap: float):
    assert score(protocol, text, None, truth, *SIZE)[1] == pytest.approx(overlap)


def test_half_a_box_is_found_but_by_two_protocols_that_want_more():
    assert score("pixels", "", (20, 0, 100, 35), TRUTH, *SIZE) == ((20, 0, 100, 35), 0.5)
    assert score("shikra", "[0.100,0.250,0.500,0.425]", None, TRUTH, *SIZE)[1] == 0.5
    for protocol in PROTOCOLS:
        assert is_hit(0.5, protocol) == (protocol not in ("minigpt", "shikra"))
        assert is_hit(0.501, protocol) and not is_hit(0.499, protocol)


def test_numbers_beyond_any_picture_are_no_box_and_stay_finite():
    """Of 400 digits; VLMEvalKit clips it, as its code does."""
    huge = "9" * 400
    for text in (f"{{<{huge}><0><50><70>}}", f"[0.1,0.2,{huge}.0,0.4]", f"[{huge}, 1, 2, {huge}]"):
        for protocol in READERS:
            box, overlap = score(protocol, text, None, TRUTH, *SIZE)
            json.dumps([box, overlap], allow_nan=False)
            assert box is None or protocol == "vlmevalkit" and max(box) <= 200


def record(iou: float, box: list | None, tokens: float = 8, keep: int | None = 8) -> dict:
    return {"prune": "trim", "keep": keep, "mode": "gap", "iou": iou, "box": box, "text": "",
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


def test_an_expression_without_an_answer_is_wrong_and_no_answer_without_a_box():
    row = summary([*FOUR, record(0.0, None) | {"text": None}], ("trim", 8, "gap"), "pixels")
    assert (row["accuracy"], row["no_box"]) == (2 / 5, 1 / 4)


def test_a_budget_that_the_strategy_finds_is_auto_and_its_tokens_are_a_mean():
    auto = [record(1.0, BOX, tokens, None) for tokens in (10, 13)]
    line = table([summary(auto, ("trim", None, "gap"), "pixels")]).split("\n")[1]
    assert line.split() == ["trim", "auto", "11.5", "gap", "1.000", "0.342..1.000", "1.000",
                            "0.000", "0.250", "115", "ms", "50", "ms"]


def test_times_have_a_column_where_all_rows_have_them():
    rows = [summary(FOUR, ("trim", 8, "gap"), "pixels")]
    rows.append(rows[0] | {"prefill_ms": None, "decode_ms": None})
    assert "prefill" in table(rows[:1]) and "ms" not in table(rows)
    assert table(rows[1:]).endswith("0.497   0.250    0.250")


def test_what_nobody_measured_is_a_dash_and_a_long_name_widens_its_column():
    unknown = {"padding": None, "visual_tokens": None, "keep": None, "prune": "x" * 30}
    row = summary([r | unknown for r in FOUR], ("x" * 30, None, "gap"), "pixels")
    head, line = table([row]).split("\n")
    assert line.split()[:4] == ["x" * 30, "-", "-", "gap"] and line.split()[8] == "-"
    assert head.index("mode") == line.index("gap")
