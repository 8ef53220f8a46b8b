"""What commands write and tell, where it cannot be written or told: one line, or all, or nothing.

In:  each command, in this process, with a place to write that is none, or a reader that has left.
"""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

import run
from nanogap import NanogapError
from nanogap.checks import output
from nanogap.checks.command import answer_for
from nanogap.checks.output import claim, save_picture, whole_checkpoint, write_whole
from nanogap.evaluate import __main__ as evaluate
from nanogap.evaluate import ask
from nanogap.train import __main__ as train
from nanogap.train import scenes
from tests.tiny import lines_of, write_checkpoint

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
    """Flags that say where to write: what runs the command with one."""
    asked = ["--weights", str(weights), "--limit", "1", "--mode", "full", "--device", "cpu"]
    return {
        "run --out": lambda out: run.main(["photo.png", "x", "--weights", str(weights), "--out",
                                           out]),
        "evaluate --out": lambda out: answer_for("e", evaluate.main, [*asked, "--out", out]),
        "evaluate --plot": lambda out: answer_for("e", evaluate.main, [*asked, "--plot", out]),
        "scenes": lambda out: answer_for("s", scenes.command, ["val", "0", out]),
        "train --out": lambda out: answer_for("t", train.command, ["--out", out, "--minutes", "1",
                                                                   "--device", "cpu"])}


def broken_pipe() -> int:
    """The number of a stream whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


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


@pytest.mark.parametrize("room", [0, 1, 4096])
@pytest.mark.parametrize("flag", ["run --out", "evaluate --plot", "scenes"])
def test_a_disk_that_fills_up_leaves_nothing_half_written(
        flag: str, room: int, place: Path, weights: Path, capsys, monkeypatch):
    there = place / "x.png"
    there.write_bytes(b"before")

    def full(path: Path, how: str) -> io.BufferedWriter:
        open(path, how).close()
        return io.BufferedWriter(Full(room))

    monkeypatch.setattr(output, "open", full, raising=False)
    assert commands(weights)[flag]("x.png") == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and lines_of(said) == 1
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


@pytest.mark.parametrize("same", ["x.png", "./x.png", "link.png"])
def test_two_outputs_that_are_one_file_are_refused(same: str, place: Path, weights: Path, capsys):
    (place / "link.png").symlink_to(place / "x.png")
    argv = ["--weights", str(weights), "--limit", "1", "--out", "x.png", "--plot", same]
    assert answer_for("e", evaluate.main, argv) == 2
    assert "--out and --plot are the same file" in capsys.readouterr().err


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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_weights_that_stand_are_not_trained_over(
        name: str, place: Path, weights: Path, capsys, monkeypatch):
    """Those that ship least of all."""
    monkeypatch.setattr(train, "train_stages", pytest.fail)
    (place / "out").mkdir()
    (place / "out" / name).write_text("mine")
    assert commands(weights)["train --out"]("out") == 2
    assert f"--out out holds weights already ({name})" in capsys.readouterr().err
    assert (place / "out" / name).read_text() == "mine"
    assert commands(weights)["train --out"](str(ROOT / "weights" / "mini")) == 2


# ----- readers that have left ------------------------------------------------------------------


def telling(weights: Path) -> dict[str, Callable[[], int]]:
    """Commands that print something at their end."""
    made = commands(weights)
    return {"run": lambda: made["run --out"]("x.png"),
            "run --json": lambda: run.main(["photo.png", "x", "--weights", str(weights), "--json"]),
            "evaluate": lambda: made["evaluate --plot"]("x.png"),
            "scenes": lambda: made["scenes"]("x.png"),
            "help": lambda: run.main(["--help"])}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("name", telling(Path()))
@pytest.mark.parametrize("kind, status", [("full", 2), ("left", 141)])
def test_a_result_that_cannot_be_told_is_no_success(
        name: str, kind: str, status: int, place: Path, weights: Path, monkeypatch, capsys):
    """A full disk is one line; of a reader that has left the status says enough."""
    stream = open("/dev/full", "w") if kind == "full" else os.fdopen(broken_pipe(), "w")
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        got = telling(weights)[name]()
    except SystemExit as error:                                               # after --help
        got = int(error.code or 0)
    assert got == status
    said = capsys.readouterr().err
    assert "Traceback" not in said and lines_of(said) == (1 if kind == "full" else 0)
    with suppress(OSError):
        stream.close()


def test_progress_that_cannot_be_told_does_not_end_the_work(
        place: Path, weights: Path, monkeypatch, capsys):
    """stderr is gone; all answers are there, and the report."""
    monkeypatch.setattr(ask, "TELL_EVERY", 0.0)
    monkeypatch.setattr(sys, "stderr", os.fdopen(broken_pipe(), "w"))
    assert commands(weights)["evaluate --out"]("x.jsonl") == 0
    assert len(Path("x.jsonl").read_text().splitlines()) == 1
    assert "1 expressions" in capsys.readouterr().out


# ----- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.1, 0.4, 1.0])
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
