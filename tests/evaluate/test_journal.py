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


def go_on(path: Path, *ids: str) -> list[str]:
    """The IDs of the answers that were there, before those of `ids` are written."""
    records, put = journal.go_on(path, SETTINGS)
    for id_ in ids:
        put(record(id_))
    return [r["id"] for r in records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    go_on(tmp_path / "answers.jsonl", "a", "b", "c")
    return tmp_path / "answers.jsonl"


def test_killed_at_any_byte_at_most_the_last_line_is_lost(path: Path):
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    for size in (*range(0, len(whole), 40), *ends, *(end + 1 for end in ends)):
        path.write_bytes(whole[:size])
        found = go_on(path)
        assert found == ["a", "b", "c"][:whole[:size].count(b"\n")]
        go_on(path, *["a", "b", "c"][len(found):])
        assert path.read_bytes() == whole


def test_a_file_is_only_gone_on_with_and_only_where_its_settings_are_known(path: Path):
    journal.check_out(path, resume=True)
    with pytest.raises(NanogapError, match="answers.jsonl exists; continue it with --resume, or"):
        journal.check_out(path, resume=False)
    settings = journal.settings_of(path)
    assert json.loads(settings.read_text()) == SETTINGS
    settings.unlink()
    with pytest.raises(OSError, match="answers.jsonl.settings.json"):
        go_on(path)


def test_killed_before_the_first_line_it_starts_again(tmp_path: Path):
    path = tmp_path / "new.jsonl"
    for _ in range(2):
        journal.check_out(path, resume=True)
        assert go_on(path) == []


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_cut(path: Path):
    first, _, third = path.read_text().split("\n")[:3]
    broken = "\n".join([first, "{", third, ""])
    path.write_text(broken)
    with pytest.raises(NanogapError, match="answers.jsonl, line 2 cannot be read"):
        go_on(path)
    assert path.read_text() == broken


def test_strategies_of_ones_own_may_come_and_go_and_may_not_change(tmp_path: Path):
    path, first, second = tmp_path / "x.jsonl", {"a.py:f": "1"}, {"b.py:g": "2"}
    for own in (first, second):
        journal.go_on(path, SETTINGS | own)
    assert json.loads(journal.settings_of(path).read_text()) == SETTINGS | first | second
    with pytest.raises(NanogapError, match="was made with another a.py:f, 1 and not 3; give that"):
        journal.go_on(path, SETTINGS | {"a.py:f": "3"})
