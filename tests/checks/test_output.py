"""What commands write and tell, where it cannot be written or told: one line, or all, or nothing.

In:  each command, in this process, with a place to write that is none, or a reader that has left.
"""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

import nanogap
import run
from nanogap import NanogapError
from nanogap.bench import __main__ as bench
from nanogap.checks import output
from nanogap.checks.command import answer_for
from nanogap.checks.output import claim, save_picture, whole_checkpoint, write_whole
from nanogap.convert import __main__ as convert
from nanogap.evaluate import __main__ as evaluate
from nanogap.evaluate import journal
from nanogap.show import figures
from nanogap.train import __main__ as train
from nanogap.train import scenes
from tests.tiny import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PICTURE = Image.new("RGB", (90, 60), "orange")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("photo.png")
    return tmp_path


def commands(weights: Path) -> dict[str, Callable[[str], int]]:
    """Every flag that says where to write: what runs the command with it."""
    asked = ["--weights", str(weights), "--limit", "1", "--mode", "full", "--device", "cpu"]

    def of(name: str, command: Callable) -> Callable[[list[str]], int]:
        return lambda argv: answer_for(name, command, argv)

    return {
        "run --out": lambda out: run.main(["photo.png", "x", "--weights", str(weights), "--out",
                                           out]),
        "evaluate --out": lambda out: of("e", evaluate.main)([*asked, "--out", out]),
        "evaluate --resume": lambda out: of("e", evaluate.main)([*asked, "--out", out,
                                                                "--resume"]),
        "evaluate --plot": lambda out: of("e", evaluate.main)([*asked, "--plot", out]),
        "scenes": lambda out: of("s", scenes.command)(["val", "0", out]),
        "figures --out": lambda out: of("f", figures.command)(["--out", out]),
        "train --out": lambda out: of("t", train.command)(["--out", out, "--minutes", "1",
                                                           "--device", "cpu"]),
        "convert --out": lambda out: of("c", convert.command)([
            "llava", "--base", str(weights), "--clip", str(weights), "--out", out]),
        "bench --save": lambda out: of("b", bench.command)(["--random", "350m", "--save", out])}


FLAGS = list(commands(Path()))
PICTURES = ("run --out", "evaluate --plot", "scenes")
FOLDERS = ("figures --out", "train --out", "convert --out", "bench --save")


def ending(flag: str) -> str:
    return ".png" if flag in PICTURES else ".jsonl" if "evaluate" in flag else ""


# ----- H, K: places that are none -----------------------------------------------------------------


def below_a_file(place: Path, flag: str) -> str:
    (place / "file").write_text("x")
    return f"file/x{ending(flag)}"


def link_to_nothing(place: Path, flag: str) -> str:
    (place / f"link{ending(flag)}").symlink_to(place / "nowhere" / "x")
    return f"link{ending(flag)}"


def of_the_other_kind(place: Path, flag: str) -> str:
    """A folder for a file, and a file for a folder."""
    path = place / f"other{ending(flag)}"
    path.write_text("x") if flag in FOLDERS else path.mkdir()
    return path.name


def pipe(place: Path, flag: str) -> str:
    os.mkfifo(place / f"pipe{ending(flag)}")
    return f"pipe{ending(flag)}"


BAD: dict[str, Callable[[Path, str], str]] = {
    "nothing": lambda place, flag: "", "too long": lambda place, flag: "x" * 300 + ending(flag),
    "no folder": lambda place, flag: f"/proc/no/x{ending(flag)}",
    "of zeros": lambda place, flag: f"x\0{ending(flag)}", "below a file": below_a_file,
    "link to nothing": link_to_nothing, "of the other kind": of_the_other_kind, "pipe": pipe}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("bad", BAD)
def test_a_place_that_cannot_be_written_is_one_line_before_the_work_begins(
        bad: str, flag: str, place: Path, weights: Path, capsys, monkeypatch):
    if bad == "link to nothing" and flag in PICTURES:
        pytest.skip("a link is replaced")

    def load(*args: object, **options: object) -> None:
        raise AssertionError("the work began")

    for module in (nanogap, evaluate, figures, bench.weights):
        monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(train, "train_stages", load)
    monkeypatch.setattr(convert, "convert", load)
    out, before = BAD[bad](place, flag), sorted(place.rglob("*"))
    begun = time.time()
    assert commands(weights)[flag](out) == 2
    assert time.time() - begun < 5
    heard = capsys.readouterr()
    assert heard.err.count("\n") == 1 and heard.out == "" and "Traceback" not in heard.err
    assert sorted(place.rglob("*")) == before, "something is left behind"


class Full(io.RawIOBase):
    """An open file on a disk that is full after some bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return len(data)


@pytest.mark.parametrize("room", [0, 1, 4095, 4096, 5000])
@pytest.mark.parametrize("flag", ["run --out", "evaluate --plot", "scenes"])
def test_a_disk_that_fills_up_leaves_nothing_half_written(
        flag: str, room: int, place: Path, weights: Path, capsys, monkeypatch):
    there = place / "x.png"
    there.write_bytes(b"before")

    def full(path: Path, how: str) -> io.BufferedWriter:
        open(path, how).close()
        return io.BufferedWriter(Full(room))

    monkeypatch.setattr(output, "open", full, raising=False)
    status = commands(weights)[flag]("x.png")
    said = capsys.readouterr().err
    if status == 0:
        pytest.fail(f"{room} bytes are not enough for a picture")
    assert status == 2 and "No space left on device" in said and said.count("\n") == 1
    assert there.read_bytes() == b"before" and not list(place.glob(".*"))


# ----- whole files, and one writer ----------------------------------------------------------------


def test_a_file_of_any_other_name_is_left_alone(place: Path):
    """Nothing is half-written under a name that somebody may have."""
    for name in ("x.png.partial", ".x.png.partial", "x.partial", "x.png.tmp", "y.png"):
        (place / name).write_text(name)
    (place / "x.png").symlink_to(place / "y.png")
    save_picture("--out", place / "x.png", PICTURE)
    assert Image.open(place / "x.png").size == (90, 60)
    assert not (place / "x.png").is_symlink()                    # replaced, and not written through
    for path in place.iterdir():
        if path.suffix != ".png":
            assert path.read_text() == path.name
    assert (place / "y.png").read_text() == "y.png"


def test_readers_see_whole_files_only_whoever_writes(place: Path):
    """Two writers, and a reader in between."""
    path, ends = place / "x.bin", threading.Event()
    contents = {bytes([65 + i]) * (20_000 + 777 * i) for i in range(2)}

    def writer(data: bytes) -> None:
        while not ends.is_set():
            write_whole("--out", path, data)

    threads = [threading.Thread(target=writer, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    seen = set()
    until = time.time() + 1
    while time.time() < until:
        if path.exists():
            seen.add(path.read_bytes())
    ends.set()
    for thread in threads:
        thread.join()
    assert seen == contents and not list(place.glob(".*"))


@pytest.mark.parametrize("folder", [False, True])
def test_only_one_may_write_to_a_place_and_a_killed_one_gives_it_free(place: Path, folder: bool):
    """The second is refused in one line, whichever process it is in."""
    path = place / "there"
    if folder:
        path.mkdir()
    code = ("import sys, time\nfrom pathlib import Path\nfrom nanogap.checks.output import claim\n"
            "with claim('--out', Path(sys.argv[1])):\n    print('mine', flush=True)\n"
            "    time.sleep(60)\n")
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE,
                             env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True)
    assert other.stdout is not None and other.stdout.readline() == "mine\n"
    with pytest.raises(NanogapError, match="--out .*there is being written by another process"):
        with claim("--out", path):
            pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    with claim("--out", path):
        with pytest.raises(NanogapError, match="another process"), claim("--out", path):
            pass
    assert sorted(place.rglob("*")) == sorted([place / "photo.png", *([path] if folder else [])])


def test_a_second_evaluation_into_one_file_is_refused_and_changes_nothing(
        place: Path, weights: Path, capsys):
    """Not even the settings of the first."""
    with journal.own(place / "x.jsonl"):
        for how in ("evaluate --out", "evaluate --resume"):
            assert commands(weights)[how]("x.jsonl") == 2
            assert "x.jsonl is being written by another process" in capsys.readouterr().err
        assert not (place / "x.jsonl").exists() and not list(place.glob("*settings*"))
    assert commands(weights)["evaluate --out"]("x.jsonl") == 0


@pytest.mark.parametrize("same", ["x.png", "./x.png", "link.png"])
def test_two_outputs_that_are_one_file_are_refused(same: str, place: Path, weights: Path, capsys):
    (place / "link.png").symlink_to(place / "x.png")
    argv = ["--weights", str(weights), "--limit", "1", "--out", "x.png", "--plot", same]
    assert answer_for("e", evaluate.main, argv) == 2
    assert "--out and --plot are the same file" in capsys.readouterr().err
    assert run.main(["photo.png", "x", "--weights", str(weights), "--out", "photo.png"]) == 2
    assert "--out photo.png is the image itself" in capsys.readouterr().err


@pytest.mark.parametrize("when", range(4))
def test_the_files_of_a_checkpoint_come_together_or_not_at_all(place: Path, when: int):
    """An error before the first file, between two of them, and after the last."""
    class Stop(Exception):
        pass

    folder = place / "new"
    folder.mkdir()
    with pytest.raises((Stop, NanogapError)), whole_checkpoint("--out", folder) as partial:
        for i, name in enumerate(("tokenizer.json", "model.safetensors", "config.json")):
            if i == when:
                raise Stop
            (partial / name).write_text("x")
        raise Stop
    assert list(folder.iterdir()) == []
    with whole_checkpoint("--out", folder) as partial:
        (partial / "config.json").write_text("x")
        assert not (folder / "config.json").exists()
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "clip_text"])
def test_weights_that_stand_are_not_trained_over(
        name: str, place: Path, weights: Path, capsys, monkeypatch):
    """Those that ship least of all."""
    monkeypatch.setattr(train, "train_stages", None)
    (place / "out").mkdir()
    (place / "out" / name).write_text("mine")
    assert commands(weights)["train --out"]("out") == 2
    assert f"--out out holds weights already ({name})" in capsys.readouterr().err
    assert (place / "out" / name).read_text() == "mine"
    assert commands(weights)["train --out"](str(ROOT / "weights" / "mini")) == 2


# ----- I: readers that have left ------------------------------------------------------------------


def telling(weights: Path) -> dict[str, Callable[[], int]]:
    """Commands that print something at their end."""
    made = commands(weights)
    return {"run": lambda: made["run --out"]("x.png"),
            "run --json": lambda: run.main(["photo.png", "x", "--weights", str(weights), "--json"]),
            "evaluate": lambda: made["evaluate --plot"]("x.png"),
            "scenes": lambda: made["scenes"]("x.png"),
            "help": lambda: run.main(["--help"])}


@pytest.fixture
def stdout_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Let stdout be full, or without a reader."""
    opened = []

    def give(kind: str) -> None:
        if kind == "full":
            stream = open("/dev/full", "w")
        else:
            reader, writer = os.pipe()
            os.close(reader)
            stream = os.fdopen(writer, "w")
        opened.append(stream)
        monkeypatch.setattr(sys, "stdout", stream)

    yield give
    for stream in opened:
        try:
            stream.close()
        except OSError:
            pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("name", telling(Path()))
@pytest.mark.parametrize("kind, status", [("full", 2), ("left", 141)])
def test_a_result_that_cannot_be_told_is_no_success(
        name: str, kind: str, status: int, place: Path, weights: Path, stdout_to, capsys):
    """A full disk is one line; of a reader that has left the status says enough."""
    stdout_to(kind)
    try:
        got = telling(weights)[name]()
    except SystemExit as error:                                               # after --help
        got = int(error.code or 0)
    assert got == status
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("\n") == (1 if kind == "full" else 0)


def test_progress_that_cannot_be_told_does_not_end_the_work(
        place: Path, weights: Path, monkeypatch, capsys):
    """stderr is gone; all answers are there, and the report."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(evaluate, "TELL_EVERY", 0.0)
    monkeypatch.setattr(sys, "stderr", os.fdopen(writer, "w"))
    assert commands(weights)["evaluate --out"]("x.jsonl") == 0
    assert len(Path("x.jsonl").read_text().splitlines()) == 1
    assert "1 expressions" in capsys.readouterr().out


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_in_a_status(closed: str, place: Path):
    """Without stdout nothing can be told, so that is a mistake; and no picture becomes stderr."""
    line = f"'{sys.executable}' -m nanogap.train.scenes val 0 x.png {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == (2 if ">&-" in closed.replace("2>&-", "") else 0)
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        assert Image.open(place / "x.png").format == "PNG"


# ----- where a program runs -----------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    {"HOME": None, "LANG": None, "LC_ALL": "C", "PYTHONUTF8": "0", "TERM": None, "PATH": ""},
    {"HOME": "/nowhere", "PYTHONOPTIMIZE": "2", "WORLD_SIZE": "8", "RANK": "3"}],
    ids=["bare", "other"])
def test_a_bare_environment_changes_no_answer(change: dict, place: Path, weights: Path):
    """No home, no locale, python -OO, a scheduler's variables."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **{k: v for k, v in change.items() if v}}
    for key in change:
        if change[key] is None:
            env.pop(key, None)
    asked = [sys.executable, str(ROOT / "run.py"), "photo.png", "the mann", "--weights",
             str(weights), "--json", "--mode", "gap", "--keep", "4", "--max-new-tokens", "3"]
    done = subprocess.run(asked, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == ""
    model = nanogap.load(weights, "cpu")
    said = model.ground("photo.png", "the mann", "random", 4, "gap", max_new_tokens=3).text
    assert json.loads(done.stdout)["runs"][0]["text"] == said


# ----- L: answers' files that someone has changed -------------------------------------------------


def test_each_field_of_an_answer_is_asked_for_its_type_once(place: Path):
    """On --resume a line of other types is named; seeded, all fields against all types."""
    good = {"id": "a", "image": "a.jpg", "expression": "x", "mode": "gap", "prune": "random",
            "keep": 8, "text": "", "box": None, "truth": [0, 0, 8.5, 9], "iou": 0.0,
            "cut_off": False, "visual_tokens": 8, "kept": [0, 3], "padding": 0.25,
            "prefill_ms": 1.5, "decode_ms": None}
    assert set(good) == journal.KEYS
    others = [None, True, 1, 1.5, "x", [], {}, [[1]], {"a": 1}, [1, 2, 3, 4], "9" * 400,
              float("nan"), float("inf")]
    path, draw, refused = place / "x.jsonl", random.Random(3), 0
    for key in good:
        for other in others:
            line = json.dumps(good | {key: other})
            path.write_text(json.dumps(good) + "\n" + line + "\n")
            try:
                records = journal.read_lines(path)
            except NanogapError as error:
                assert "x.jsonl, line 2 is no answer" in str(error) and "\n" not in str(error)
                refused += 1
            else:
                evaluate.summary(records, ("random", 8, "gap"), "pixels")
    assert refused > len(good) * len(others) / 2
    for line in ("9" * 5000, '"x"', "null",
                 json.dumps(good)[:draw.randrange(5, 90)]):
        path.write_text(line + "\n")
        with pytest.raises(NanogapError, match="line 1 is no answer"):
            journal.read_lines(path)


# ----- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.1, 0.4, 1.0, 2.0])
def test_an_interrupt_at_any_time_is_one_line_or_nothing(seconds: float, place: Path):
    """Also while torch is imported.  Before Python itself is there, the system's status is -2."""
    asked = [[sys.executable, str(ROOT / "run.py"), "photo.png", "x"],
             [sys.executable, "-m", "nanogap.evaluate", "--limit", "99"]]
    running = [subprocess.Popen(one, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for one in asked]
    time.sleep(seconds)
    for process in running:
        process.send_signal(signal.SIGINT)
    for process in running:
        _, said = process.communicate(timeout=60)
        assert process.returncode in (130, 0, -2)
        assert "Traceback" not in said and len(said.splitlines()) <= 4       # progress, and no more


def test_what_a_killed_training_left_goes_when_the_next_one_is_written(tmp_path: Path):
    left = tmp_path / ".0123abcd.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half of it")
    with output.whole_checkpoint("--out", tmp_path) as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
