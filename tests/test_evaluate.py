"""Accuracy: what counts, and how sure it is."""

import json

import pytest

from nanogap import evaluate
from nanogap.evaluate import drawn_examples, settings, table, wilson
from tests.tiny import tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(path, tiny_config())
    return path


def test_wilsons_interval_by_hand():
    """8 of 10 (z = 1.96): centre 0.7167, half width 0.2266; and none of 20 is not surely none."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    low, high = wilson(0, 20)
    assert low == pytest.approx(0.0) and high == pytest.approx(0.161, abs=1e-3)


def record(iou: float, box: list | None, mode: str = "gap") -> dict:
    return {"prune": "random", "keep": 8, "mode": mode, "iou": iou, "box": box}


def test_half_overlap_counts_and_an_answer_without_a_box_is_wrong():
    line = table([record(0.5, [0, 0, 1, 1]), record(0.49, [0, 0, 1, 1]), record(0.0, None), record(1.0, [0, 0, 1, 1])],
                 [("random", 8, "gap")]).split("\n")[1].split()
    assert line[:4] == ["random", "8", "gap", "0.500"]
    assert line[-2:] == ["0.497", "0.250"]


def test_mode_full_comes_once_however_many_strategies():
    class Args:
        mode, prune, keep = ["full", "gap"], ["random", "spatial"], ["50%", "4"]
    assert settings(Args, 16) == [("none", 16, "full"), ("random", 8, "gap"), ("random", 4, "gap"),
                                  ("spatial", 8, "gap"), ("spatial", 4, "gap")]


def test_a_split_is_a_word_that_seeds_the_scenes():
    first, again, other = (next(drawn_examples(split)) for split in ("val", "val", "test"))
    assert first.questions == again.questions != other.questions
    assert first.questions[0][0] == "val/0/0"


def test_a_line_for_each_answer(folder, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    evaluate.command(["--weights", str(folder), "--limit", "3", "--keep", "4", "--out", str(out), "--device", "cpu"])
    lines = [json.loads(line) for line in out.read_text().split("\n") if line]
    assert [line["mode"] for line in lines] == ["full", "shifted", "permuted", "gap"] * 3
    assert set(lines[0]) == {"id", "expression", "mode", "prune", "keep", "text", "box", "truth", "iou"}
    assert capsys.readouterr().out.count("\n") == 6


@pytest.mark.parametrize("arguments, message", [
    (["--data", "coco.json"], "--data coco.json: only drawn scenes can be evaluated so far"),
    (["--keep", "0"], "'0' is not a number of visual tokens such as 64"),
    (["--prune", "best"], "invalid choice: 'best'"),
])
def test_a_mistake_is_one_line_and_status_2(folder, capsys, arguments, message):
    from nanogap.cli import answer_for
    status = answer_for("nanogap.evaluate", evaluate.command, ["--weights", str(folder), *arguments])
    heard = capsys.readouterr().err
    assert status == 2 and heard.count("\n") == 1 and message in heard
