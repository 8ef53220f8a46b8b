"""What commands write: the whole of it or nothing, and one writer at a time."""

import errno
from pathlib import Path

import pytest
from PIL import Image

from nanogap import NanogapError
from nanogap.checks.command import answer_for
from nanogap.checks.output import claim, save_picture, whole
from nanogap.train import __main__ as train
from tests.tiny import lines_of

PICTURE = Image.new("RGB", (90, 60), "orange")


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path: Path, monkeypatch, capsys):
    there = tmp_path / "x.png"
    there.write_bytes(b"before")

    def full(picture: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        assert answer_for("run.py", lambda _: save_picture("--out", there, PICTURE), []) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and lines_of(said) == 1
    assert there.read_bytes() == b"before" and list(tmp_path.iterdir()) == [there]
    save_picture("--out", there, PICTURE)
    assert Image.open(there).size == (90, 60) and list(tmp_path.iterdir()) == [there]


@pytest.mark.parametrize("folder", [False, True])
def test_only_one_may_write_to_a_place(tmp_path: Path, folder: bool):
    path = tmp_path / "there"
    if folder:
        path.mkdir()
    with claim("--out", path):
        with pytest.raises(NanogapError, match="--out .*there is being written by another process"):
            with claim("--out", path):
                pass
    with claim("--out", path):
        pass
    assert list(tmp_path.rglob("*")) == ([path] if folder else [])


def test_the_files_of_a_checkpoint_come_together_or_not_at_all(tmp_path: Path):
    (tmp_path / ".killed.partial").mkdir()
    with pytest.raises(NanogapError), whole("--out", tmp_path) as partial:
        (partial / "tokenizer.json").write_text("x")
        raise OSError
    assert list(tmp_path.iterdir()) == []
    with whole("--out", tmp_path) as partial:
        (partial / "config.json").write_text("x")
        assert not (tmp_path / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_weights_that_stand_are_not_trained_over(name: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", pytest.fail)
    (tmp_path / name).write_text("mine")
    argv = ["--out", str(tmp_path), "--minutes", "1", "--device", "cpu"]
    assert answer_for("train", train.command, argv) == 2
    assert f"holds weights already ({name})" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
