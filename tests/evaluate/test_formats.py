"""Answers of other models: each notation by hand, told apart, and files as people hold them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from nanogap.checks.command import answer_for
from nanogap.evaluate import __main__ as evaluate
from nanogap.evaluate.formats import FORMATS, format_argument, smart_resize
from nanogap.evaluate.score import PROTOCOLS
from tests.tiny import lines_of

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


@pytest.mark.parametrize("name", FORMATS)
def test_one_right_box_in_every_notation(name: str):
    resized = (644, 476) if name == "qwen2.5-vl" else None
    assert FORMATS[name].read(SAID[name], SIZE, resized) == pytest.approx(BOX, abs=3.5)


@pytest.mark.parametrize("name, text", [
    ("minigpt-v2", "{<1 0><20> <50><unk><90>}"), ("minigpt-v2", "It is {<10><20><50><90>}."),
    ("qwen-vl", "( 100 , 200 ), (500,900) and (1,2),(3,4)"),
    ("qwen3-vl", '"bbox_2d":[100,200,500,900]')])
def test_odd_clothes_do_no_harm(name: str, text: str):
    assert FORMATS[name].read(text, SIZE) == pytest.approx(BOX)


@pytest.mark.parametrize("name, text", [
    ("ferret", "[100, 100, 1001, 500]"), ("ferret", "[500, 100, 100, 500]"),
    ("cogvlm", "[[1,2,3,4]]"),
    ("paligemma", "<loc102><loc102><loc512><loc512>"), ("qwen-vl", "(100,100)"),
    ("llava", "[0.1, 0.0, 0.5, 0.1]"), ("minigpt-v2", "{<10><10><50><500>}"),
    ("ferret", "9" * 400)])
def test_what_is_no_box_is_never_guessed(name: str, text: str):
    """Out of range, without area, in the padding, or in another notation."""
    assert FORMATS[name].read(text, SIZE) is None


def test_paligemma_says_y_first():
    box = FORMATS["paligemma"].read("<loc0256><loc0512><loc0768><loc1023>", SIZE)
    assert box == pytest.approx((320, 120, 640 * 1023 / 1024, 360))


@pytest.mark.parametrize("size, resized", [
    ((640, 480), (644, 476)), ((1000, 30), (1008, 28)), ((40, 40), (56, 56)), ((70, 98), (56, 112)),
    ((8000, 6000), (4116, 3080))])
def test_pictures_are_resized_as_qwen_does(size: tuple, resized: tuple):
    """Rounded to even: 70 is 2.5 times 28. As qwen-vl-utils 0.0.14 gave them (IDS R12)."""
    assert smart_resize(*size, 28) == resized


def test_names_may_be_spelled_as_people_spell_them():
    assert {format_argument(name) for name in ("MiniGPT-v2", "minigpt_v2")} == {"minigpt-v2"}
    assert format_argument("Qwen2.5-VL") in FORMATS


# ----- files --------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six expressions about one box."""
    return lines(tmp_path / "data.jsonl", [
        {"image": "a.jpg", "expression": f"thing {i}", "box": BOX, "width": 640, "height": 480}
        for i in range(6)])


def lines(path: Path, items: list) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def score(capsys, data: Path, answers: object, *flags: str) -> tuple[int, str]:
    """Status, and what is said, for a file of answers."""
    file = data.with_name("given.json")
    if isinstance(answers, list):
        lines(file, answers)
    else:
        file.write_text(json.dumps(answers))
    argv = ["--score", str(file), "--data", str(data), *flags]
    status = answer_for("nanogap.evaluate", evaluate.main, argv)
    heard = capsys.readouterr()
    return status, heard.err if status else heard.out


def six(text: str, **more: object) -> list[dict]:
    return [{"id": i, "text": text, **more} for i in range(1, 7)]


@pytest.mark.parametrize("name", list(FORMATS)[3:])
def test_a_file_in_another_notation_is_told_which_format_fits(data: Path, capsys, name: str):
    status, said = score(capsys, data, six(SAID[name]))
    assert status == 2 and lines_of(said) == 1
    assert "0 of 6 texts with numbers hold a box as llava says it" in said and name in said
    flags = ("--resized", "28") if name == "qwen2.5-vl" else ()
    status, said = score(capsys, data, six(SAID[name]), "--format", name, *flags)
    assert status == 0 and " 1.000 " in said


def test_a_tenth_of_them_decides_and_answers_without_numbers_are_only_wrong(data: Path, capsys):
    one = six(SAID["ferret"])[1:] + [{"id": 1, "text": SAID["llava"]}]
    assert score(capsys, data, one)[0] == 0
    status, said = score(capsys, data, six("I cannot see a man."))
    assert status == 0 and " 0.000 " in said and "--format" not in said
    status, said = score(capsys, data, six(SAID["ferret"]), "--format", "llava")
    assert status == 0 and "most do in that of internvl or ferret: --format" in said


def test_boxes_in_pixels_of_the_resized_picture_need_its_size(data: Path, capsys):
    said = six(SAID["qwen2.5-vl"])
    status, asked = score(capsys, data, said, "--format", "qwen2.5-vl")
    assert status == 2 and '"resized": [width, height]' in asked and "--resized 28" in asked
    for flags, more in ((("--resized", "644x476"), {}), ((), {"resized": [644, 476]})):
        status, table = score(capsys, data, six(SAID["qwen2.5-vl"], **more), "--format",
                              "qwen2.5-vl", *flags)
        assert status == 0 and " 1.000 " in table
    assert score(capsys, data, said, "--resized", "28")[0] == 2
    assert score(capsys, data, said, "--format", "qwen2.5-vl", "--resized", "0x5")[0] == 2


def test_minigpts_own_file_of_answers(tmp_path: Path, capsys):
    """It leaves out what it cannot read: three expressions, two answers."""
    entries = [{"img_id": "COCO_train2014_000000000042_1", "sents": f"thing {i}",
                "bbox": [64, 96, 256, 336], "width": 640, "height": 480} for i in range(3)]
    data = lines(tmp_path / "own.json", entries)
    own = {"COCO_train2014_000000000042_1": ["{<10><20><50><90>}", "{<10><20><50><50>}"]}
    for flags in (("--protocol", "minigpt"), ("--format", "minigpt-v2")):
        status, said = score(capsys, data, own, *flags)
        assert status == 0 and " 0.333 " in said
        assert "1 of 3 expressions have no answer, and count as wrong" in said
    for other in ({"x_1": ["a"]}, {"COCO_train2014_000000000042_1": ["a"] * 4}):
        status, said = score(capsys, data, other)
        assert status == 2 and "expressions in own.json" in said and lines_of(said) == 1


def test_files_of_llava_and_of_internvl(data: Path, capsys):
    llava = [{"question_id": i, "prompt": "?", "text": SAID["llava"]} for i in range(1, 7)]
    assert " 1.000 " in score(capsys, data, llava)[1]
    internvl = [{"answer": SAID["internvl"], "gt_bbox": BOX, "hw": [480, 640]}] * 6
    assert " 1.000 " in score(capsys, data, internvl, "--format", "internvl")[1]
    status, said = score(capsys, data, [internvl[0] | {"gt_bbox": [1, 2, 3, 4]}])
    assert status == 2 and "expression 1 of data.jsonl" in said


def test_names_and_numbers_that_no_table_holds_are_one_line(data: Path, capsys):
    for key, value in (("mode", "x" * 5000), ("prune", "x" * 5000), ("padding", 10 ** 400),
                       ("keep", 10 ** 400), ("decode_ms", float("inf")), ("padding", float("nan"))):
        status, said = score(capsys, data, six(SAID["llava"], **{key: value}), "--json")
        assert status == 2 and lines_of(said) == 1 and f"{key} is " in said and len(said) < 400
    status, said = score(capsys, data, six("[" + "9" * 400 + ", 1, 2, 3]"), "--json")
    assert "NaN" not in said and "Infinity" not in said


def test_shares_of_the_answers_decide_whether_boxes_are_pixels(data: Path, capsys):
    shares = [{"id": i, "box": [0.1, 0.2, 0.3, 0.4]} for i in range(1, 6)]
    status, said = score(capsys, data, [*shares, {"id": 6, "box": list(BOX)}])
    assert status == 2 and "the boxes are normalised and not in pixels" in said
    wide = [{"id": i, "box": [100, 100, 900, 900]} for i in range(1, 7)]
    status, said = score(capsys, data, wide)
    assert status == 2 and "6 of 6 boxes reach out of their images" in said
    assert score(capsys, data, [*wide[:2], *({"id": i, "box": BOX} for i in range(3, 7))])[0] == 0
    percent = [{"id": i, "box": [10, 10, 50, 50]} for i in range(1, 7)]
    assert "hardly a box of the answers reaches beyond 100" in score(capsys, data, percent)[1]


# ----- questions for another program --------------------------------------------------------------


def test_questions_are_written_and_read_back_when_answered(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["--questions", "q.jsonl", "--data", "scenes:val", "--limit", "9"]
    assert answer_for("nanogap.evaluate", evaluate.main, asked) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "9 questions about 2 pictures: q.jsonl"
    assert said[-1] == ("python -m nanogap.evaluate --score q.jsonl --data scenes:val --limit 9")
    questions = [json.loads(line) for line in Path("q.jsonl").read_text().splitlines()]
    assert set(questions[0]) == {"id", "image", "expression", "width", "height"}
    assert [q["id"] for q in questions[6:8]] == ["val/0/6", "val/1/0"]
    for q in questions:
        assert Image.open(q["image"]).size == (q["width"], q["height"])
    lines(Path("q.jsonl"), [q | {"box": None} for q in questions])
    assert answer_for("nanogap.evaluate", evaluate.main, said[-1].split()[3:]) == 0
    assert " 1.000 " in capsys.readouterr().out                          # without a box, all
    assert answer_for("nanogap.evaluate", evaluate.main, asked) == 2
    assert "exists, and may have answers in it" in capsys.readouterr().err


# ----- one box, five scorers ----------------------------------------------------------------------


def test_no_notation_is_right_everywhere(data: Path, capsys):
    """The table of the tutorial: which notation counts under which scorer."""
    found = {}
    for name in ("llava", "shikra", "minigpt-v2", "qwen2-vl", "qwen3-vl", "internvl", "paligemma"):
        found[name] = []
        for protocol in PROTOCOLS:
            status, said = score(capsys, data, six(SAID[name]), "--protocol", protocol, "--json",
                                 *(("--format", "llava") if protocol == "pixels" else ()))
            found[name].append(json.loads(said)["runs"][0]["accuracy"])
    # pixels as LLaVA says boxes, minigpt, shikra, lmms-eval, vlmevalkit; IoU in the square and not:
    assert found == {"llava": [1, 0, 0, 1, 1], "shikra": [1, 0, 1, 1, 1],
                     "minigpt-v2": [0, 1, 0, 0, 0], "qwen2-vl": [0, 0, 0, 0, 1],
                     "qwen3-vl": [0, 0, 0, 0, 1], "internvl": [0, 0, 0, 0, 1],
                     "paligemma": [0, 0, 0, 0, 0]}
