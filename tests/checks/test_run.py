"""The command, run in this process on tiny checkpoints, and once as a person runs it.

One checkpoint, `weights`, is random and babbles.  The other, `finder`, always says the same box:
its layers add nothing to the last token of the prompt, and the table of tokens does the rest.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import nanogap
import run
from nanogap.checks import loading
from nanogap.gap import MODES
from nanogap.prune import STRATEGIES
from nanogap.show.table import print_table
from tests.tiny import lines_of, write_checkpoint, write_finder

ROOT = Path(run.__file__).parent
BOX = "[0.10, 0.25, 0.50, 0.60]"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def finder(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers every question with BOX, one token, and stops."""
    return write_finder(weights, tmp_path_factory.mktemp("finder"), BOX)


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A 100 x 50 picture in an empty folder, from which the command is run."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 50), (90, 140, 60)).save("photo.png")
    return "photo.png"


@pytest.fixture
def said(photo: str, finder: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """What the command prints, asked with these flags and --keep 4."""
    def ask(*flags: str, of: str = photo, where: str = "x", weights: Path | str = finder) -> str:
        assert run.main([of, where, "--weights", str(weights), "--keep", "4", *flags]) == 0
        return capsys.readouterr().out
    return ask


# ----- what comes out -----------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_mode_and_the_picture_is_saved(
        said: Callable[..., str], finder: Path):
    lines = said(where="the man").splitlines()
    assert lines[0] == f"{finder} on cpu, float32"
    assert " ".join(lines[1].split()) == (
        "mode tokens position IDs box (pixels) IoU with full prefill decode KV MB words")
    # 33 tokens before, 16 patches, 20 after; (0.10, 0.25) of the square is pixel (10, 25 - 25)
    shown = [re.split(r"  +", line)[:5] for line in lines[2:5]]
    assert shown == [["full", "16", "0..68", "10, 0, 50, 35", "1.00"],
                     ["shifted", "4", "0..56", "10, 0, 50, 35", "1.00"],
                     ["gap", "4", "0..68", "10, 0, 50, 35", "1.00"]]
    assert all(line.endswith(f"  {BOX}") for line in lines[2:5])
    assert re.fullmatch(r"The image was encoded once \(\d+ ms\).  "
                        r"IoU is with the box of the full run, which may be wrong itself.",
                        lines[5])
    assert lines[6:] == ["picture: answer.png"]
    assert all(len(line) <= 123 for line in lines[1:])
    assert Image.open("answer.png").width == 988 and not list(Path().glob("*.partial"))


def test_json_is_one_document_and_nothing_else(said: Callable[..., str], finder: Path):
    document = json.loads(said("--json", "--explain", "--keep", "25%", "--prune", "spatial",
                               "--out", "a.jpg", where="the man"))
    runs = document.pop("runs")
    assert document == {"image": "photo.png", "expression": "the man", "weights": str(finder),
                        "device": "cpu", "dtype": "float32", "prune": "spatial", "keep": 4,
                        "seed": 0, "true_box": None, "picture": "a.jpg"}
    timings = [r.pop("timings") for r in runs]
    assert [r.pop("kv_bytes") for r in runs] == [2 * 3 * 64 * 4 * rows for rows in (70, 58, 58)]
    assert runs == [
        {"mode": mode, "visual_tokens": tokens, "box": [10.0, 0.0, 50.0, 35.0], "text": BOX,
         "cut_off": False, "iou_with_full": 1.0, "position_ids": [0, last],
         "next_position": last + 1, "kept": [5, 7, 13, 15] if tokens == 4 else list(range(16))}
        for mode, tokens, last in (("full", 16, 68), ("shifted", 4, 56), ("gap", 4, 68))]
    for timing in timings:
        assert set(timing) == {"vision_ms", "prefill_ms", "decode_ms", "new_tokens", "passes"}
        assert (timing["new_tokens"], timing["passes"]) == (2, 1)


def test_an_answer_that_was_cut_off_is_told_from_one_without_a_box(said: Callable[..., str]):
    """It says a box, which is one token, and its end."""
    short = ["--mode", "full", "gap", "--max-new-tokens", "1"]
    assert said(*short, where="the man").splitlines()[5:7] == [
        f"{mode}: the answer was cut off before its end; give it more room than "
        "--max-new-tokens 1." for mode in ("full", "gap")]
    assert [r["cut_off"] for r in json.loads(said(*short, "--json"))["runs"]] == [True, True]
    assert "cut off" not in said(*short, "--max-new-tokens", "2")


def test_in_the_table_a_missing_box_is_a_dash_and_words_stay_on_their_line(
        capsys: pytest.CaptureFixture):
    common = {"visual_tokens": 4, "position_ids": [0, 56], "kv_bytes": 2 ** 20, "box": None,
              "timings": {"vision_ms": 1.0, "prefill_ms": 2.0, "decode_ms": 3.0},
              "iou_with_full": None}
    words = ["a man\n\x1b[31m in blue, to the left of the dog", f"Answer: {BOX} .", ""]
    document = {"true_box": None, "runs": [{"mode": mode, "text": text, **common} for mode, text in
                                           zip(list(MODES)[:3], words, strict=True)]}
    print_table(document)
    lines = capsys.readouterr().out.splitlines()[1:4]
    assert [re.split(r"  1\.0 *", line)[1] for line in lines] == [
        "a man\\n\\x1b[31m in blue, to the left of the dog", f"Answer: {BOX} .", ""]
    assert all(re.search(r"0\.\.56 +- +2 ms +3 ms +1\.0", line) for line in lines)
    assert len({line.index("  2 ms") for line in lines}) == 1            # one below the other


def test_a_strategy_of_ones_own_is_given_by_its_file_and_name(said: Callable[..., str]):
    Path("mine.py").write_text("import torch\nfrom nanogap.prune import Kept, strategy\n\n"
                               "@strategy()\ndef corner(seen, budget, generator):\n"
                               "    return Kept(torch.arange(budget))\n")
    own = ["--prune", "mine.py:corner", "--keep", "3", "--mode", "gap"]
    assert "      # # # .\n      . . . .\n" in said(*own, "--explain")
    document = json.loads(said(*own, "--json"))
    assert document["prune"] == "mine.py:corner"
    assert document["runs"][0]["iou_with_full"] is None


def test_every_mode_is_answered_in_the_order_given_and_once_each(said: Callable[..., str]):
    order = [*reversed(MODES)]
    runs = json.loads(said("--json", "--mode", *order, "gap"))["runs"]
    assert [(r["mode"], r["text"]) for r in runs] == [(mode, BOX) for mode in order]


def test_the_help_names_every_strategy_and_mode_and_list_says_a_sentence_on_each(
        capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in (*STRATEGIES, *MODES, "FILE.py:NAME"))
    with pytest.raises(SystemExit):
        run.main(["--prune", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STRATEGIES)
    assert all(line.endswith(".") for line in lines)


def test_of_a_drawn_scene_the_true_box_is_told_and_a_word_that_was_never_taught(
        said: Callable[..., str]):
    def of_scene(expression: str) -> str:
        return said("--mode", "full", of=str(ROOT / "image.jpg"), where=expression, weights="mini")

    out = of_scene("the man on the left")
    assert "true box of this drawn scene is 8, 150, 107, 376; IoU with it: full 0.83." in out
    assert "never taught" not in out and Image.open("answer.png").height > 700
    out = of_scene("the zebra on the left")
    assert 'They were never taught "zebra", so the box is a guess; ' in out and "true" not in out


def test_an_answer_shows_itself_in_a_line_and_in_a_picture(photo: str, finder: Path):
    result = nanogap.load(finder, "cpu").ground(photo, "the  man", prune="spatial", keep="25%")
    assert str(result) == (f'"the man": 10, 0, 50, 35 (gap, 4 of 16 visual tokens by spatial); '
                           f"the model said {BOX}")
    assert result.draw(photo).size == (988, 660)


@pytest.mark.parametrize("argv, cuts", [
    (["fastv(layer=2)", "--keep", "12"], "4 from layer 2 on"),
    (["pyramiddrop", "--keep", "auto"], "8 from layer 1 on, 4 from layer 2 on")])
def test_the_table_says_where_the_decoder_cuts(
        argv: list[str], cuts: str, said: Callable[..., str]):
    line = f"{argv[0]} in 3 layers, counted from 0: visual tokens cut to {cuts}."
    assert line in said("--prune", *argv).splitlines()
    assert "counted from 0" not in said("--prune", "random")


def test_no_draft_means_a_pass_for_each_token_and_the_same_words(said: Callable[..., str]):
    drafted, plain = (json.loads(said("--json", "--mode", "full", *more, weights="mini"))["runs"][0]
                      for more in ([], ["--no-draft"]))
    assert drafted["text"] == plain["text"]
    assert drafted["timings"]["passes"] < plain["timings"]["passes"] == (
        plain["timings"]["new_tokens"] - 1)


@pytest.mark.parametrize("expression", [
    "左边的人", "\x1b[31mred\x07\n\ton the left", "<image>", "{0} {x} %s \\", "x" * 90])
def test_any_expression_works_and_is_explained_in_80_columns(
        expression: str, said: Callable[..., str], weights: Path):
    out = said("--explain", "--mode", "gap", "--keep", "50%", where=expression, weights=weights)
    lines = out.split("\n")[1:]
    table = next(i for i, line in enumerate(lines) if line.startswith("mode  "))
    assert max(len(line) for line in lines[:table]) <= 80
    assert all(line.isprintable() for line in lines)
    assert Image.open("answer.png").size == (988, 660)        # with two lines of caption


# ----- mistakes -----------------------------------------------------------------------------------


def refused(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr with which the command refuses; nothing is written anywhere."""
    before = sorted(Path().rglob("*"))
    assert run.main(argv) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines(True) if not line.endswith(" ...\n")]
    err = "".join(lines)                                      # without those of a slow machine
    assert err.startswith("run.py: ") and lines_of(err) == 1 and err.endswith("\n")
    assert "picture:" not in out and sorted(Path().rglob("*")) == before
    return err.removeprefix("run.py: ").removesuffix("\n")


def test_the_default_weights_are_found_from_any_folder(
        photo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """And named as seen from there; of drawn scenes one is told only where they are meant."""
    monkeypatch.setattr(loading, "REAL", Path("nowhere").resolve())
    assert run.main([photo, "the man", "--mode", "gap"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{ROOT / 'weights/mini'} on cpu, float32"
    assert lines[1].startswith("These weights know drawn scenes only")
    monkeypatch.chdir(ROOT)
    assert loading.default_weights() == Path("weights/mini")


FORM = "is not a number of visual tokens such as 64, nor a share such as 25% or 9.8%"
RANGE = "of 16 visual tokens: give a whole number from 1 to 16, or a share such as 25%"


@pytest.mark.parametrize("argv, message", [
    ("missing.png x", "missing.png cannot be read as an image (No such file or directory); give "),
    ("photo.png", "the following arguments are required: EXPRESSION; see `python run.py --help`"),
    ("photo.png x y", "unrecognized arguments: y (several words want quotes around them); "),
    ("photo.png ' '", "the expression is empty; name a thing, such as "),
    (f"photo.png {'a' * 20000}", "the expression is too long: with the image and room for the "),
    ("photo.png x --prune magic", "unknown strategy 'magic': choose from random, spatial, "),
    ("photo.png x --prune nowhere.py:f", "'nowhere.py:f': there is no file nowhere.py"),
    ("photo.png x --mode gap Full", "argument --mode: invalid choice: 'Full' (choose from "),
    ("photo.png x --device tpu", "argument --device: invalid choice: 'tpu' (choose from "),
    ("photo.png x --seed -1", "argument --seed: '-1' is not a whole number from 0 on"),
    *((f"photo.png x --keep {keep}", f"argument --keep: {keep!r} {FORM}")
      for keep in ("0", "-3", "1.5", "0%", "nan")),
    *((f"photo.png x --mode {mode} --keep {keep}", f"random cannot keep {keep} {RANGE}")
      for keep in ("auto", "17", "101%") for mode in ("gap", "full")),
    ("photo.png x --weights nowhere", "nowhere is not a folder; get the published weights with "),
    ("photo.png x --weights .", ". has no config.json, so it is not a checkpoint; get the "),
    # before any work
    *((f"photo.png x --weights nowhere --out {out}", f"--out {out}{message}") for out, message in (
        ("answer", ": a picture cannot be written with that ending; use .png or .jpg"),
        ("no/such/a.png", " would be in a folder that does not exist; make it with `mkdir -p "),
        ("folder.png", " is a folder; give the path of a picture to write"),
        ("photo.png", " is a picture that is asked about; give another path")))])
def test_a_mistake_is_one_line_and_status_2_and_a_picture_of_before_stays(
        argv: str, message: str, photo: str, finder: Path, capsys: pytest.CaptureFixture):
    Path("folder.png").mkdir()
    Path("answer.png").write_bytes(b"from before")
    asked = ["--weights", str(finder), *shlex.split(argv)]
    assert refused(asked, capsys).startswith(message)
    assert Path("answer.png").read_bytes() == b"from before"


def test_as_a_command_stdout_is_the_document_and_stderr_is_quiet(photo: str, finder: Path):
    done = subprocess.run([sys.executable, "-W", "default", ROOT / "run.py", photo, "x",
                           "--weights", finder, "--json"], capture_output=True, timeout=120)
    progress = re.compile(rb"(loading|looking|warming|answering) .* \.\.\.")
    assert done.returncode == 0, done.stderr.decode()
    assert all(progress.fullmatch(line) for line in done.stderr.splitlines())
    assert json.loads(done.stdout)["runs"][2]["mode"] == "gap" and done.stdout.count(b"\n") == 1
    assert Image.open("answer.png").format == "PNG"
