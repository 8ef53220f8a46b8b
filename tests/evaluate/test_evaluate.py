"""The evaluator on checkpoints of which the answers are known, and on the mini model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from nanogap.evaluate import ablate, ask, plot
from nanogap.evaluate.data import drawn_data, first
from nanogap.evaluate.score import run_of
from nanogap.models import VLM
from tests.evaluate.asking import BOX, MINI, ROOT, read_lines, run, timeless, write_lines
from tests.tiny import tiny_config, write_checkpoint


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Four expressions about a picture of 200 x 100, and one about another, which is not there.

    `finder` always says [0.10, 0.25, 0.50, 0.60] of the square of 200 x 200, in which the picture
    begins 50 pixels down: in its own pixels that is 20..100 x 0..70.
    """
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg")
    boxes = [[20, 0, 100, 70], [20, 0, 100, 35], [20, 0, 100, 34], [120, 0, 190, 70]]
    entries = [{"img_path": "a.jpg", "expression": f"thing {i}", "bbox": box, "width": 200,
                "height": 100} for i, box in enumerate(boxes)]
    return write_lines(tmp_path / "shikra.jsonl", [*entries, entries[0] | {"img_path": "gone.jpg"}])


# ----- what is asked ------------------------------------------------------------------------------


def test_a_split_is_a_word_that_seeds_the_scenes():
    one, again, other = (drawn_data(split, 1).examples[0] for split in ("val", "val", "test"))
    assert one.questions == again.questions != other.questions
    assert one.questions[0][0] == "val/0/0"
    assert one.image().tobytes() == again.image().tobytes() != other.image().tobytes()


def test_the_limit_counts_expressions_and_not_images():
    examples = drawn_data("val", 15).examples
    assert [len(e.questions) for e in examples] == [7, 4, 4]
    assert [len(e.questions) for e in first(examples, 9)] == [7, 2]
    assert first(examples, None) == examples


def test_a_picture_that_is_asked_about_is_not_drawn_over(folder, annotations: Path, refused):
    picture = next(annotations.parent.rglob("*.jpg"))
    before = picture.read_bytes()
    said = refused("--weights", folder, "--data", annotations, "--plot", picture)
    assert "is a picture that is asked about" in said and picture.read_bytes() == before


# ----- scores that are known ----------------------------------------------------------------------


@pytest.mark.parametrize("protocol, ious, box", [
    ("pixels", [1, 35 / 70, 34 / 70, 0], [20, 0, 100, 70]),
    ("lmms-eval", [0.5, 10 / 60, 9 / 60, 0], [20, 25, 100, 60])])
def test_boxes_are_mapped_back_and_scored_by_the_protocol_and_json_is_one_document(
        finder, annotations: Path, printed, protocol: str, ious: list, box: list):
    out, picture = annotations.with_name("answers.jsonl"), annotations.with_name("plot.png")
    document = json.loads(printed("--weights", finder, "--data", annotations, "--mode", "full",
                                  "--protocol", protocol, "--out", out, "--json", "--plot",
                                  picture))
    lines = timeless(out)
    assert [line["iou"] for line in lines] == pytest.approx(ious)
    assert lines[0]["box"] == pytest.approx(box)
    assert lines[1] | {"box": 0, "iou": 0} == {
        "id": "2", "image": "a.jpg", "expression": "thing 1", "mode": "full", "prune": "none",
        "keep": 16, "box": 0, "text": BOX, "truth": [20, 0, 100, 35], "iou": 0, "cut_off": False,
        "visual_tokens": 16, "kept": list(range(16)), "padding": 0.5, "prefill_ms": 0,
        "decode_ms": 0}
    assert set(document) == {"device", "dtype", "weights", "data", "seed", "protocol",
                             "max_new_tokens", "picture", "expressions", "of", "missing_images",
                             "left_out", "runs", "cannot_run"}
    assert document["missing_images"] == ["gone.jpg"] and document["of"] == 5
    assert document["protocol"] == protocol and Image.open(picture).width == plot.WIDTH
    assert document["runs"][0]["accuracy"] == (0.5 if protocol == "pixels" else 0.25)


def test_the_report_says_what_it_covers_and_how_it_counts(finder, annotations: Path, capsys):
    assert run("--weights", finder, "--data", annotations, "--keep", "50%", 8, "08") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].endswith("shikra.jsonl (Shikra): 5 expressions about 2 images, 4 expressions, "
                             "seed 0, cpu, float32")
    assert lines[1] == "pixels: boxes in pixels of the original image, continuous areas, IoU >= 0.5"
    assert lines[2] == "covers 4 of 5 expressions: 1 images are missing, such as gone.jpg"
    assert [line.split()[:6] for line in lines[4:6]] == [
        ["none", "16", "16", "full", "0.500", "0.150..0.850"],
        ["random", "50%", "8", "shifted", "0.500", "0.150..0.850"]]
    assert len(lines) == 4 + 1 + 2 * 3
    assert said.err == f"{lines[2]}\n"


# ----- every strategy, budget and mode ------------------------------------------------------------


def test_each_image_is_looked_at_once_and_asked_in_all_runs_at_once(folder, tmp_path, monkeypatch):
    """Seven expressions about one scene, and two about the next, each with its seed."""
    encoded, asked = [], []
    encode_pixels, ground_runs = VLM.encode_pixels, VLM.ground_runs

    def encode(self, *args):
        encoded.append(args)
        return encode_pixels(self, *args)

    def ask(self, image, runs, seed, *args):
        asked.append([seed, *(len(run.expressions) for run in runs)])
        return ground_runs(self, image, runs, seed, *args)

    monkeypatch.setattr(VLM, "encode_pixels", encode)
    monkeypatch.setattr(VLM, "ground_runs", ask)
    out = tmp_path / "answers.jsonl"
    command = ["--weights", folder, "--keep", 4, 8, "--mode", "full", "gap", "--out", out]
    assert run(*command, "--limit", 9) == 0
    assert len(encoded) == 1 + 2
    assert asked == [[0, 1], [0, 1, 1], [0, 7, 7, 7], [1, 2, 2, 2]]
    keeps = [line["keep"] for line in read_lines(out)]
    assert keeps == [16] * 7 + [4] * 7 + [8] * 7 + [16, 16, 4, 4, 8, 8]
    encoded.clear()
    assert run(*command, "--limit", 11, "--resume") == 0
    assert len(encoded) == 1 + 1


def test_the_ablation_is_one_table_and_one_picture(folder, tmp_path, printed):
    picture = tmp_path / "plot.png"
    said = json.loads(printed("--weights", folder, "--limit", 1, "--keep", 4, "--ablate", "--plot",
                              picture, "--json"))
    assert [row["mode"] for row in said["runs"]] == [*ablate.WHOLE, *ablate.PRUNED]
    assert Image.open(picture).height > 14 * 40


def test_a_strategy_of_ones_own_is_measured_and_an_edited_one_refused_by_name(
        folder, tmp_path, printed, refused):
    file, out = tmp_path / "mine.py", tmp_path / "answers.jsonl"
    file.write_text("import torch\nfrom nanogap.prune import Kept\n\n"
                    "def top_left(seen, budget, generator):\n"
                    "    return Kept(torch.arange(budget))\n")
    own = f"{file}:top_left"
    asked = ["--weights", folder, "--limit", 1, "--keep", 3, "--mode", "gap", "--out", out]
    assert "top_left" in printed(*asked, "--prune", own)
    answer, = read_lines(out)
    assert (answer["prune"], answer["kept"]) == (own, [0, 1, 2])
    printed(*asked, "--prune", own, "--resume")
    file.write_text(file.read_text() + "# edited\n")
    said = refused(*asked, "--prune", own, "random", "--resume")
    assert "was made with another " in said and "mine.py:top_left" in said
    assert read_lines(out) == [answer]


# ----- long runs ----------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(folder, tmp_path, printed):
    out = tmp_path / "answers.jsonl"
    asked = ["--weights", folder, "--limit", 4, "--keep", 4, "--json", "--out", out]
    told, whole = json.loads(printed(*asked)), timeless(out)
    eleven = out.read_bytes().splitlines(keepends=True)[:11]
    out.write_bytes(b"".join(eleven)[:-30])
    again = json.loads(printed(*asked, "--resume"))
    assert timeless(out) == whole and len(whole) == 16
    assert [(r["no_box"], r["expressions"]) for r in again["runs"]] == [
        (r["no_box"], 4) for r in told["runs"]]


@pytest.mark.parametrize("other, what", [
    (["--seed", "1"], "seed, 0 and not 1"),
    (["--data", "scenes:test"], "data, scenes:val and not scenes:test;"),
    (["--protocol", "minigpt"], "protocol, pixels and not minigpt"),
    (["--dtype", "bfloat16"], "dtype, float32 and not bfloat16"),
    (["--max-new-tokens", "2"], "max_new_tokens, 64 and not 2"),
    (["--weights", "{other}"], "weights, ")])
def test_other_settings_are_not_mixed_into_a_file(folder, tmp_path, refused, other, what):
    """Weights are told apart by their numbers, and not by their folder's name."""
    another = write_checkpoint(tmp_path / folder.name, tiny_config(), seed=1)
    other = [argument.format(other=another) for argument in other]
    out, asked = tmp_path / "answers.jsonl", ["--weights", folder, "--limit", 1, "--mode", "full"]
    assert run(*asked, "--out", out) == 0
    before = out.read_bytes()
    assert f"was made with another {what}" in refused(*asked, "--out", out, "--resume", *other)
    assert out.read_bytes() == before


def test_progress_says_the_time_to_go_behind_each_picture(folder, capsys, monkeypatch):
    monkeypatch.setattr(ask, "TELL_EVERY", 0.0)
    assert run("--weights", folder, "--limit", 9, "--mode", "full") == 0
    one, two = capsys.readouterr().err.splitlines()
    assert one.startswith("1 of 2 pictures, ") and two == "2 of 2 pictures, 0 s to go ..."


def test_two_processes_share_the_images_and_report_once(folder, tmp_path):
    asked = ["--weights", str(folder), "--limit", "9", "--keep", "4", "--mode", "full", "gap"]
    alone, out = tmp_path / "alone.jsonl", tmp_path / "answers.jsonl"
    assert run(*asked, "--out", alone) == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "nanogap.evaluate", *asked, "--out", str(out), "--device", "cpu"],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mine, others = ({(line["id"], *run_of(line)): line for line in timeless(path)}
                    for path in (out, alone))
    assert mine == others and len(read_lines(out)) == 9 * 2
    assert [line.split()[:2] for line in done.stdout.splitlines()[2:5]] == [
        ["prune", "keep"], ["none", "16"], ["random", "4"]]
    assert sorted(p.name for p in tmp_path.iterdir() if "answers" in p.name) == [
        "answers.jsonl", "answers.jsonl.settings.json"]


def test_weights_are_told_apart_by_all_files_that_answers_depend_on(tmp_path):
    folder = tmp_path / "mini"
    shutil.copytree(MINI, folder)
    seen = [ask.identified(folder, None, [])["weights"]]
    for file in [each for each in folder.rglob("*") if each.is_file()]:
        file.write_bytes(file.read_bytes() + b" ")
        seen.append(ask.identified(folder, None, [])["weights"])
    assert len({*seen}) == 9 and seen[-1].startswith("mini ")


# ----- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    (["--data", "coco.json"], "--data coco.json is no file; give scenes:val or annot"),
    (["--keep", "17"], "cannot keep 17 of 16 visual tokens"),
    (["--prune", "best"], "unknown strategy 'best': choose from random, "),
    (["--prune", "random", "--keep", "auto"], "random cannot keep auto of 1"),
    (["--ablate", "--mode", "gap"], "--ablate has its own modes"),
    (["--prune", "fastv(layer=3)"], "fastv(layer=3) cannot cut before layer 3 of 3"),
    (["--prune", "random", "sparsevlm", "--keep", "6"], "sparsevlm cannot keep 6 of 16 visual "
     "tokens in the mean over 3 layers, of which 1 see all: keep from 7 to 16"),
    (["--format", "llava"], "--format says how --score reads answers"),
    (["--score", "a.jsonl"], "--score asks no model, so --weights, --out has nothing"),
    (["--plot", "a.jsonl", "--out", "a.jsonl"], "--out and --plot are the same file; give two"),
    (["--weights", "mini", "nowhere"], "--weights nowhere holds no config.json; give the folder"),
    (["--split", "val"], "for drawn scenes give --data scenes:SPLIT"),
    (["--plot", "x.txt"], "--plot x.txt: a picture cannot be written with that ending; use .png "
     "or .jpg"),
])
def test_a_mistake_is_one_line_and_status_2_and_leaves_no_file(
        folder, tmp_path, refused, arguments: list, message: str):
    assert message in refused("--weights", folder, "--out", tmp_path / "answers.jsonl", *arguments)
    assert not list(tmp_path.glob("answers*"))


# ----- one bad item of thousands ------------------------------------------------------------------


@pytest.mark.parametrize("how, sized", [
    ("gone", True), ("gone", False), ("cut off", True), ("cut off", False),
    ("of another size", True)])
def test_a_bad_picture_is_left_out_and_counted_and_resume_goes_past_it(
        finder, tmp_path, printed, how: str, sized: bool):
    """b.jpg is the bad one; it comes first, for the first is looked at to begin with."""
    size = {"width": 200, "height": 100} if sized else {}
    data = write_lines(tmp_path / "own.jsonl", [
        {"image": name, "expression": "thing", "box": [20, 0, 100, 70]} | size
        for name in ("b.jpg", "a.jpg", "b.jpg", "a.jpg", "a.jpg")])
    good, bad = tmp_path / "a.jpg", tmp_path / "b.jpg"
    Image.effect_noise((200, 100), 50).save(good)
    if how == "cut off":
        bad.write_bytes(good.read_bytes()[:-1000])
    elif how == "of another size":
        Image.new("RGB", (100, 200)).save(bad)
    asked = ["--weights", finder, "--data", data, "--out", tmp_path / "x.jsonl", "--mode", "full"]
    for again in ((), ("--resume",)):
        said = printed(*asked, *again)
        assert "covers 3 of 5 expressions: " in said and "b.jpg" in said
        assert "5 expressions about 2 images, 3 expressions" in said
    bad.write_bytes(good.read_bytes())
    said = printed(*asked, "--resume")                               # mended, it is asked after all
    assert "covers" not in said and "2 images, 5 expressions" in said


@pytest.mark.parametrize("bad", ["", 5, "\ud800", "thing " * 5000])
def test_an_expression_that_cannot_be_asked_is_left_out_and_counted_and_may_be_mended(
        finder, annotations: Path, printed, refused, bad: str):
    lines = read_lines(annotations)[:4]
    out = annotations.with_name("x.jsonl")
    asked = ["--weights", finder, "--data", annotations, "--out", out, "--mode", "full", "gap"]
    write_lines(annotations, [lines[0], lines[1] | {"expression": bad}, *lines[2:]])
    for again in ((), ("--resume",)):
        said = printed(*asked, *again).splitlines()
        assert said[2].startswith("covers 3 of 4 expressions: 1 cannot be asked, such as 2: ")
        assert [line.split()[4] for line in said[4:6]] == ["0.333", "0.333"]
    document = json.loads(printed(*asked, "--resume", "--json"))
    assert list(document["left_out"]) == ["2"]
    assert [row["expressions"] for row in document["runs"]] == [3, 3]
    first = out.read_text()
    write_lines(annotations, lines)
    assert "covers" not in printed(*asked, "--resume")
    assert out.read_text().startswith(first) and len(read_lines(out)) == 8
    for change in ({"expression": "other"}, {"bbox": [20, 0, 100, 69]}):
        write_lines(annotations, [lines[0] | change, *lines[1:]])
        assert "x.jsonl answers 1 of other data; " in refused(*asked, "--resume")


@pytest.mark.parametrize("change, message", [
    ({"expression": " "}, "holds nothing that can be asked: "),
    ({"expression": "thing " * 5000}, "none of the expressions can be asked, such as 1: 'thing"),
    ({"img_path": "broken.jpg"}, "none of the 1 images can be opened: ")])
def test_where_nothing_can_be_asked_that_is_an_error(
        finder, annotations: Path, refused, change: dict, message: str):
    annotations.with_name("broken.jpg").write_bytes(b"hello")
    write_lines(annotations, [read_lines(annotations)[0] | change])
    assert message in refused("--weights", finder, "--data", annotations, "--mode", "full")


# ----- answers that are none ----------------------------------------------------------------------


def test_an_answer_that_was_cut_off_is_told_from_one_without_a_box(finder, annotations, printed):
    """`finder` says a box, which is one token, and the end."""
    out = annotations.with_name("x.jsonl")
    asked = ["--weights", finder, "--data", annotations, "--mode", "full", "gap"]
    assert ("8 of 8 answers were cut off before their end; give them more room with "
            "--max-new-tokens") in printed(*asked, "--max-new-tokens", 1, "--out", out)
    assert all(line["cut_off"] for line in read_lines(out))
    assert "cut off" not in printed(*asked, "--max-new-tokens", 2)


def test_what_stands_in_a_file_cannot_move_the_cursor(finder, annotations: Path, capsys):
    """Names of pictures, splits, strategies; an escape sequence is spelled out."""
    entry = read_lines(annotations)[0]
    gone = entry | {"img_path": "\x1b[2Jgone\u202e.jpg"}
    write_lines(annotations, [entry, gone])
    given = write_lines(annotations.with_name("given.jsonl"), [
        {"id": 1, "box": [1, 2, 3, 4], "prune": "\x1b[2J", "mode": "\x07"}])
    assert run("--weights", finder, "--data", annotations, "--mode", "full") == 0
    assert run("--score", given, "--data", annotations) == 0
    write_lines(annotations, [gone])
    assert run("--weights", finder, "--data", annotations) == 2
    heard = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in heard.out + heard.err)
    assert heard.out.count("\\x1b[2J") == 3 and heard.err.count("\\x1b[2J") == 2
