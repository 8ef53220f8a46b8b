"""How a command ends: a lack of memory is one line, Ctrl-C and a reader that has left are none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanogap.checks.command import answer_for
from nanogap.gap import MODES

ROOT = Path(__file__).resolve().parents[2]


def failing(error: Exception):
    """A command that ends in an error."""
    def command(argv: object) -> None:
        raise error
    return command


@pytest.mark.parametrize("error", [
    RuntimeError("could not create a primitive"), RuntimeError("can't start new thread"),
    RuntimeError("CUDA: Out of memory"), OSError(12, "Cannot allocate memory")])
def test_every_library_that_lacks_memory_is_told_in_one_line(error: Exception, capsys):
    assert answer_for("ask", failing(error), []) == 2
    assert capsys.readouterr().err == (f"ask: memory ran out ({error}); end other programs, or "
                                       "take smaller weights or another --dtype\n")


def test_another_error_is_not_called_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        answer_for("ask", failing(RuntimeError("shapes cannot be multiplied")), [])


def test_an_interrupt_is_status_130_and_no_traceback(tmp_path: Path):
    """Also while torch is imported."""
    slow = ["--no-draft", "--mode", *MODES, "--max-new-tokens", "999"]
    asked = [[sys.executable, "run.py", "image.jpg", "x", "--out", str(tmp_path / "a.png"), *slow],
             [sys.executable, "-m", "nanogap.evaluate", "--limit", "9999"]]
    running = [subprocess.Popen(one, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE) for one in asked]
    time.sleep(1)
    for process in running:
        process.send_signal(signal.SIGINT)
    for process in running:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in said


def test_a_reader_that_leaves_ends_a_command_without_a_traceback():
    """`| head -1` closes the pipe before the table is written."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, str(ROOT / "run.py"), "--prune", "list"]
    done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


def test_a_command_ends_well_where_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch):
    """As with `>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    assert answer_for("x", print, ["told to nobody"]) == 0
