"""A run that was killed goes on, and loses the line that it was writing at most."""

import json
from pathlib import Path

import pytest

from nanogap.errors import NanogapError
from nanogap.evaluate import journal

SETTINGS = {"weights": "mini 1234", "seed": 0}


def record(id_: str) -> dict:
    return {"id": id_, "image": "a.jpg", "expression": "the man", "mode": "gap", "prune": "random",
            "keep": 8, "text": "", "box": None, "truth": [0, 0, 8.5, 9], "iou": 0.0,
            "cut_off": False, "visual_tokens": 8, "kept": [0, 3], "padding": 0.25,
            "prefill_ms": 1.5, "decode_ms": None}


def write(path: Path, *ids: str, rank: int = 0, world: int = 1) -> None:
    put = journal.begin(path, SETTINGS, rank, world)
    for id_ in ids:
        put(record(id_))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "answers.jsonl", "a", "b", "c")
    return tmp_path / "answers.jsonl"


@pytest.fixture
def one_process(monkeypatch):
    """The parts of several processes, without the processes."""
    monkeypatch.setattr(journal.dist, "barrier", lambda: None)


def test_killed_at_any_byte_at_most_the_last_line_is_lost(path: Path):
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    for size in (*range(0, len(whole), 40), *ends, *(end + 1 for end in ends)):
        path.write_bytes(whole[:size])
        found = [r["id"] for r in journal.earlier(path, SETTINGS)[0]]
        assert found == ["a", "b", "c"][:whole[:size].count(b"\n")]
        write(path, *["a", "b", "c"][len(found):])
        assert path.read_bytes() == whole


def test_the_settings_come_first_so_there_is_no_file_without_them(path: Path):
    settings = journal.settings_of(path)
    assert json.loads(settings.read_text()) == SETTINGS
    settings.unlink()
    with pytest.raises(NanogapError, match="settings.json is not there, which says how"):
        journal.check_out(path, resume=True)


def test_killed_before_the_first_line_it_starts_again(tmp_path: Path):
    path = tmp_path / "new.jsonl"
    for _ in range(2):
        journal.check_out(path, resume=True)
        assert journal.earlier(path, SETTINGS) == ([], set())
        write(path)


@pytest.mark.parametrize("name, message", [
    ("answers.jsonl", "answers.jsonl exists; continue it with --resume, or"),
    ("no/folder/x.jsonl", "in a folder that does not exist; make it with `mkdir -p .*no/folder`"),
    (".", "is a folder; give the path of a file to write")])
def test_a_file_that_cannot_be_begun_is_refused(path: Path, name: str, message: str):
    journal.check_out(path, resume=True)
    with pytest.raises(NanogapError, match=message):
        journal.check_out(path.parent / name, resume=False)


@pytest.mark.parametrize("line", ['{"id": "b"}', "5", "{", ""])
def test_a_broken_line_in_the_middle_is_named_and_nothing_is_cut(path: Path, line: str):
    first, second, third = path.read_text().split("\n")[:3]
    path.write_text("\n".join([first, line, third, ""]))
    with pytest.raises(NanogapError, match="answers.jsonl, line 2 is no answer"):
        journal.earlier(path, SETTINGS)
    assert path.read_text().split("\n")[1] == line


def test_the_same_answer_counts_once(path: Path):
    write(path, "b", "d")
    assert [r["id"] for r in journal.earlier(path, SETTINGS)[0]] == ["a", "b", "c", "d"]


def test_parts_of_several_processes_are_read_and_put_together(path: Path, one_process):
    """Also where a kill in there left the whole file, and a part of it still."""
    write(path, "d", rank=0, world=2)
    write(path, "e", rank=1, world=2)
    parts = [path.with_name(f"answers.jsonl.part-{rank}") for rank in (0, 1)]
    assert journal.parts_of(path) == [path, *parts]
    part = parts[0].read_text()
    journal.put_together(path, journal.earlier(path, SETTINGS)[0])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == list("abcde")
    assert journal.parts_of(path) == [path]
    parts[0].write_text(part)
    assert [r["id"] for r in journal.earlier(path, SETTINGS)[0]] == list("abcde")


def test_a_strategy_that_was_edited_loses_its_answers_when_the_run_begins(tmp_path, capsys):
    path, own = tmp_path / "x.jsonl", SETTINGS | {"strategies": {"a.py:f": "1", "b.py:g": "2"}}
    put = journal.begin(path, own, 0, 1)
    for prune in ("random", "a.py:f", "b.py:g"):
        put(record(prune) | {"prune": prune})
    now = SETTINGS | {"strategies": {"a.py:f": "9"}}
    records, edited = journal.earlier(path, now)
    assert [r["prune"] for r in records] == ["random", "b.py:g"] and edited == {"a.py:f"}
    journal.begin(path, now, 0, 1, edited)
    assert [r["prune"] for r in journal.read_lines(path)] == ["random", "b.py:g"]
    made = json.loads(journal.settings_of(path).read_text())
    assert made["strategies"] == {"a.py:f": "9", "b.py:g": "2"}    # what is not asked now as well
    assert "a.py:f was edited: 1 answers are asked again" in capsys.readouterr().err
