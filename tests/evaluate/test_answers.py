"""Answers of any program: each notation by hand, three expressions, the evaluator's own file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from nanogap.evaluate.answers import FORMATS
from tests.evaluate.asking import BOX, write_lines

# A picture of 640 x 480, and the box 64..320 x 96..432 in it: 0.1 to 0.5 of its width, 0.2 to 0.9
# of its height.  In the padded square of 640 it begins 80 pixels down: 0.275 to 0.8.
PHOTO, RIGHT = (640, 480), (64, 96, 320, 432)
SAID = {
    "llava": "[0.10, 0.28, 0.50, 0.80]", "llava-next": "[0.10, 0.28, 0.50, 0.80]",
    "shikra": "Answer: [0.100,0.275,0.500,0.800] .", "minigpt-v2": "{<10><20><50><90>}",
    "qwen-vl": "<box>(100,200),(500,900)</box>",
    "qwen2-vl": "<|box_start|>(100,200),(500,900)<|box_end|>",
    "qwen2.5-vl": '```json\n[{"bbox_2d": [64.4, 95.2, 322, 428.4], "label": "man"}]\n```',
    "qwen3-vl": '{"bbox_2d": [100, 200, 500, 900], "label": "man"}',
    "cogvlm": "the man [[100,200,500,900]]", "ferret": "The man [100, 200, 500, 900].",
    "internvl": "<ref>the man</ref><box>[[100, 200, 500, 900]]</box>",
    "paligemma": "<loc0205><loc0102><loc0922><loc0512> the man",
}


@pytest.mark.parametrize("name, text", [
    *SAID.items(),
    ("minigpt-v2", "It is {<1 0><20> <50><unk><90>}."),
    ("qwen-vl", "( 100 , 200 ), (500,900) and (1,2),(3,4)")])
def test_one_right_box_in_every_notation_and_in_odd_clothes(name: str, text: str):
    assert FORMATS[name].read(text, PHOTO, (644, 476)) == pytest.approx(RIGHT, abs=3.5)


@pytest.mark.parametrize("name, text", [
    ("ferret", "[100, 100, 1001, 500]"), ("ferret", "[500, 100, 100, 500]"),
    ("cogvlm", "[[1,2,3,4]]"), ("paligemma", "<loc102><loc102><loc512><loc512>"),
    ("qwen-vl", "(100,100)"), ("minigpt-v2", "{<10><10><50><500>}"), ("ferret", "9" * 400)])
def test_what_is_no_box_is_never_guessed(name: str, text: str):
    """Out of range, without area, or in another notation."""
    assert FORMATS[name].read(text, PHOTO) is None


# ----- files --------------------------------------------------------------------------------------

# A picture of 200 x 100: in the padded square of 200 x 200 it begins 50 pixels down.
# BOX, which is of the square, is 20..100 x 0..70 of the picture.
BOXES = [[20, 0, 100, 70], [20, 0, 100, 35], [120, 0, 190, 70]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three expressions; the picture itself is not there."""
    return write_lines(tmp_path / "data.jsonl", [
        {"image": "a.jpg", "expression": f"thing {i}", "box": box, "width": 200, "height": 100}
        for i, box in enumerate(BOXES)])


@pytest.fixture
def rows(given, printed) -> Callable[..., list[dict]]:
    """The rows of their report."""
    return lambda *given_: json.loads(printed(*given(*given_), "--json"))["runs"]


ALL = [{"id": i, "text": BOX} for i in (1, 2, 3)]


def test_three_answers_by_hand(given, printed):
    """The first box is the true one, the second is twice as large, and the third is elsewhere."""
    said = printed(*given([{"id": i, "text": f"It is at {BOX}."} for i in (1, 2, 3)]))
    head, protocol, columns, line = said.splitlines()
    assert head.endswith("given.jsonl, data.jsonl (nanogap): 3 expressions about 1 images, "
                         "3 expressions")
    assert protocol == "pixels: boxes in pixels of the original image, continuous areas, IoU >= 0.5"
    assert columns.split()[0] == "prune" and not columns.endswith("decode")
    assert line.split() == ["given", "-", "-", "given", "0.667", "0.208..0.939", "0.500", "0.000",
                            "-"]


def test_a_box_is_in_pixels_and_its_words_are_not_read(rows):
    items = [{"id": str(i), "box": box} for i, box in enumerate(BOXES, 1)]
    assert rows(items)[0]["mean_iou"] == 1.0
    row, = rows([items[0], items[1] | {"text": BOX}, {"id": 3, "box": None}])
    assert row["mean_iou"] == pytest.approx(2 / 3) and row["no_box"] == pytest.approx(1 / 3)


def test_a_box_without_area_is_none(rows):
    items = [{"id": 1, "box": [100, 70, 20, 0]}, {"id": 2, "text": "[0.5, 0.5, 0.1, 0.1]"},
             {"id": 3, "text": "[0.10, 0.00, 0.50, 0.20]"}]                    # in the padding
    assert rows(items)[0]["no_box"] == 1.0


def test_the_protocol_decides_how_boxes_are_counted(given, rows, printed):
    """20 x 25 to 100 x 60 as lmms-eval takes it; MiniGPT-v2 reads a format of its own."""
    row, = rows(ALL, "--protocol", "lmms-eval")
    assert row["mean_iou"] == pytest.approx((0.5 + 10 / 60 + 0) / 3)
    minigpt = [{"id": i, "text": "{<10><0><50><70>}"} for i in (1, 2, 3)]
    row, = rows(minigpt, "--protocol", "minigpt")
    assert row["mean_iou"] == pytest.approx((1 + 36 / 71 + 0) / 3)
    assert "hardly any of these answers" in printed(*given(ALL, "--protocol", "minigpt"))


@pytest.mark.parametrize("name, text", [
    ("minigpt-v2", "{<10><0><50><70>}"), ("qwen2.5-vl", '{"bbox_2d": [40, 0, 200, 140]}')])
def test_answers_in_another_notation_are_told_and_count_where_the_format_is_given(
        given, rows, printed, refused, name: str, text: str):
    answers = [{"id": i, "text": text, "resized": [400, 200]} for i in (1, 2, 3)]
    assert "hardly any of these answers can be read as a box: they may want another format" in (
        printed(*given(answers)))
    row, = rows(answers, "--format", name)
    assert row["mean_iou"] == pytest.approx((1 + 0.5 + 0) / 3)
    if name == "qwen2.5-vl":
        said = refused(*given([{"id": 1, "text": text}], "--format", name))
        assert 'give "resized": [width, height] in each line' in said


def test_boxes_most_of_which_are_no_pixels_are_refused(given, printed, refused):
    def boxes(*of: list) -> list:
        return given([{"id": i, "box": box} for i, box in enumerate(of, 1)])

    shares, wide = [0.1, 0.2, 0.3, 0.4], [100, 0, 500, 700]
    said = refused(*boxes(shares, BOXES[0], wide))
    assert "2 of 3 boxes are no pixels of their images, such as [0.1, 0.2, 0.3, 0.4]; give" in said
    printed(*boxes(shares, *BOXES[1:]))


def test_what_is_not_answered_counts_as_wrong_and_is_said(given, rows, printed):
    said = printed(*given(ALL[:1])).splitlines()
    assert said[2] == "given, given: 2 of 3 expressions have no answer, and count as wrong"
    assert said[4].split()[4:6] == ["0.333", "0.061..0.792"]
    row, = rows(ALL[:1])
    assert (row["unanswered"], row["expressions"], row["no_box"]) == (2, 3, 0)


def test_an_answer_to_what_cannot_be_asked_does_not_count(data: Path, rows):
    one = {"image": "a.jpg", "expression": "thing", "box": BOXES[0], "width": 200, "height": 100}
    data.with_name("b.jpg").write_text("hello")
    write_lines(data, [one, {"image": "b.jpg", "expression": "thing", "box": BOXES[0]}, one])
    row, = rows(ALL)
    assert (row["expressions"], row["mean_iou"], row["unanswered"]) == (2, 1.0, 0)


def test_lines_may_name_their_runs_and_what_was_measured(rows):
    measured = {"prune": "mine", "keep": 64, "visual_tokens": 64, "padding": 0.5}
    items = [line | measured | {"mode": mode} for mode in ("gap", "shifted") for line in ALL]
    assert [(r["prune"], r["keep"], r["mode"], r["visual_tokens"], r["padding"], r["unanswered"])
            for r in rows(items[:-1])] == [
        ("mine", 64, "gap", 64, 0.5, 0), ("mine", 64, "shifted", 64, 0.5, 1)]


@pytest.mark.parametrize("items, flags, message", [
    ([{"id": 4, "text": "x"}], [], "line 1: '4' is none of the 3 expressions of data.jsonl"),
    ([{"id": 2, "text": "x"}], ["--limit", "1"], "line 1: '2' is none of the 1 expressions"),
    ([{"id": 1, "text": "x"}] * 2, [], "line 2 answers '1' again; take one of the lines out"),
    ([{"text": "x"}], [], "line 1: id cannot be None; give lines of"),
    ([5], [], "line 1 is no answer; give lines of"),
    ([{"id": 1}], [], "line 1: text cannot be None; give lines of"),
    ([{"id": 1, "box": [1, 2, 3, float("nan")]}], [], "line 1: box cannot be [1, 2, 3, nan]"),
    ([{"id": 1, "text": "x", "keep": [1]}], [], "line 1: keep cannot be [1]"),
    ([{"id": 1, "box": None}], ["--protocol", "lmms-eval"], "line 1: text cannot be None"),
    ([{"id": 1, "text": "x", "resized": [0, 9]}], [], "line 1: resized cannot be [0, 9]"),
    ([], [], "holds no answer; give lines of"),
    ([{"id": 1, "text": "x"}], ["--resume"], "--score asks no model, so --resume has nothing to"),
    ([{"id": 1, "text": "x"}], ["--format", "best"], "invalid choice: 'best'"),
])
def test_a_mistake_is_one_line_and_status_2(given, refused, items, flags, message):
    assert message in refused(*given(items, *flags))


def test_an_image_whose_size_nobody_knows_is_refused(data: Path, given, printed, refused):
    write_lines(data, [{"image": "a.jpg", "expression": "thing", "box": BOXES[0]}])
    assert "a.jpg" in refused(*given(ALL[:1]))
    Image.new("RGB", (200, 100)).save(data.with_name("a.jpg"))
    printed(*given(ALL[:1]))


@pytest.mark.parametrize("protocol", ["pixels", "vlmevalkit", "lmms-eval"])
def test_the_evaluators_own_file_gives_the_same_table(
        finder: Path, data: Path, printed, refused, protocol: str):
    Image.new("RGB", (200, 100)).save(data.with_name("a.jpg"))
    out = data.with_name("answers.jsonl")
    shared = ["--data", data, "--protocol", protocol]
    asked = printed(*shared, "--weights", finder, "--out", out, "--keep", 4, 8).splitlines()
    scored = printed(*shared, "--score", out).splitlines()
    assert scored[1:] == asked[1:] and len(scored) == 3 + 7
    if protocol != "pixels":
        assert f"holds boxes as {protocol} reads them" in refused("--data", data, "--score", out)
