"""Answers of other models: each notation by hand, told apart, and files as people hold them."""

from pathlib import Path

import pytest

from nanogap.evaluate.formats import FORMATS
from tests.evaluate.asking import write_lines

# A picture of 640 x 480, and the box 64..320 x 96..432 in it: 0.1 to 0.5 of its width, 0.2 to 0.9
# of its height.  In the padded square of 640 it begins 80 pixels down: 0.275 to 0.8.
SIZE, BOX = (640, 480), (64, 96, 320, 432)
SAID = {
    "llava": "[0.10, 0.28, 0.50, 0.80]", "llava-next": "[0.10, 0.28, 0.50, 0.80]",
    "shikra": "Answer: [0.100,0.275,0.500,0.800] .", "minigpt-v2": "{<10><20><50><90>}",
    "qwen-vl": "<ref>a man</ref><box>(100,200),(500,900)</box>",
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
    assert FORMATS[name].read(text, SIZE, (644, 476)) == pytest.approx(BOX, abs=3.5)


@pytest.mark.parametrize("name, text", [
    ("ferret", "[100, 100, 1001, 500]"), ("ferret", "[500, 100, 100, 500]"),
    ("cogvlm", "[[1,2,3,4]]"),
    ("paligemma", "<loc102><loc102><loc512><loc512>"), ("qwen-vl", "(100,100)"),
    ("llava", "[0.1, 0.0, 0.5, 0.1]"), ("minigpt-v2", "{<10><10><50><500>}"),
    ("ferret", "9" * 400)])
def test_what_is_no_box_is_never_guessed(name: str, text: str):
    """Out of range, without area, in the padding, or in another notation."""
    assert FORMATS[name].read(text, SIZE) is None


# ----- files --------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six expressions about one box."""
    return write_lines(tmp_path / "data.jsonl", [
        {"image": "a.jpg", "expression": f"thing {i}", "box": BOX, "width": 640, "height": 480}
        for i in range(6)])


RIGHT = " 1.000  0.610..1.000 "        # accuracy of six, and its interval


def six(text: str, **more: object) -> list[dict]:
    return [{"id": i, "text": text, **more} for i in range(1, 7)]


@pytest.mark.parametrize("name", list(FORMATS)[3:])
def test_a_file_in_another_notation_is_told_and_counts_where_the_format_is_given(
        given, printed, name: str):
    answers = six(SAID[name], resized=[644, 476])
    said = printed(*given(answers))
    assert "hardly any of these answers can be read as a box: they may be in another" in said
    said = printed(*given(answers, "--format", name))
    assert RIGHT in said and "hardly" not in said


def test_boxes_in_pixels_of_the_resized_picture_need_its_size(given, refused):
    said = refused(*given(six(SAID["qwen2.5-vl"]), "--format", "qwen2.5-vl"))
    assert 'give "resized": [width, height] in each line' in said


def boxes(*of: list) -> list[dict]:
    return [{"id": i, "box": box} for i, box in enumerate(of, 1)]


def test_shares_of_the_answers_decide_whether_boxes_are_pixels(given, printed, refused):
    said = refused(*given(boxes(*[[0.1, 0.2, 0.3, 0.4]] * 5, BOX)))
    assert "5 of 6 boxes are no pixels of their images, such as [0.1, 0.2, 0.3, 0.4]; give" in said
    wide = [100, 100, 900, 900]
    assert "6 of 6 boxes are no pixels of their images" in refused(*given(boxes(*[wide] * 6)))
    printed(*given(boxes(*[wide] * 2, *[BOX] * 4)))
