"""What the README says stands in the code, and its commands are real.

    python -m tests.checks.test_readme     counts the lines of the lesson's files again
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from tests.markdown import (
    ROOT,
    blocks,
    broken_links,
    commands,
    is_the_evaluators,
    what_is_wrong_with,
)

README = (ROOT / "README.md").read_text()
BLOCKS = blocks(README)
COUNTED = r"^\| `(nanogap/\w+\.py)` \| (\d+) \|"


def block(start: str) -> str:
    return next(block.text for block in BLOCKS if block.text.startswith(start))


def test_the_two_commands_do_their_own_set_up():
    set_up = "pip install -r requirements.txt && python"
    assert f'{set_up} run.py image.jpg "the man on the left"\n{set_up} -m pytest\n' in README
    needed = [re.split("[=>]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()]
    assert needed == ["torch", "safetensors", "tokenizers", "pillow", "pytest"]


def test_the_three_places_of_gap_are_quoted_from_the_code():
    """They are the only ones in the lesson that say so."""
    quoted = block("    visual =")
    in_gap, in_ground = quoted.split("...\n")
    assert in_gap in (ROOT / "nanogap" / "gap.py").read_text()
    assert in_ground in (ROOT / "nanogap" / "ground.py").read_text()
    places = re.findall(r"# GAP, (\d)", quoted)
    marked = [mark for path in sorted((ROOT / "nanogap").glob("*.py"))
              for mark in re.findall(r"# GAP, (\d):", path.read_text())]
    assert places == marked == ["1", "2", "3"]


def test_the_readme_is_at_most_150_lines():
    assert README.count("\n") <= 150


def test_the_reading_order_names_every_file_and_folder_with_its_lines():
    there = {f"nanogap/{path.name}": path.read_text().count("\n")
             for path in (ROOT / "nanogap").glob("*.py") if path.name[:2] != "__"}
    said = {name: int(lines) for name, lines in re.findall(COUNTED, README, re.MULTILINE)}
    assert said == {name: there[name] for name in there if name != "nanogap/errors.py"}, (
        "`python -m tests.checks.test_readme` counts again")
    folders = {f"nanogap/{path.parent.name}/" for path in (ROOT / "nanogap").glob("*/__init__.py")}
    assert folders == set(re.findall(r"`(nanogap/\w+/)`", README))


def test_every_link_leads_somewhere():
    assert [f"README.md:{line}: {link}" for line, link in broken_links(README)] == []


def test_the_printed_output_is_what_the_command_prints(
        capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All but the times: those are this machine's."""
    import run

    def timeless(text: str) -> str:
        return re.sub(r" +\d+ ms|\(\d+ ms\)", " ms", text).replace(str(tmp_path) + "/", "")

    monkeypatch.chdir(ROOT)
    assert run.main(["image.jpg", "the man on the left", "--device", "cpu",
                     "--out", str(tmp_path / "answer.png")]) == 0
    assert timeless(capsys.readouterr().out) == timeless(block("weights/mini on cpu"))


def test_the_python_example_says_what_the_command_says(
        capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    code = block("import nanogap").replace("answer.png", str(tmp_path / "answer.png"))
    exec(compile(ast.parse(code), "README.md", "exec"), {})
    box = re.search(r": ([\d, ]+) \(gap", capsys.readouterr().out)[1]
    assert re.search(rf"^gap .* {box} ", block("weights/mini on cpu"), re.MULTILINE)


def test_the_call_and_the_loop_for_transformers_say_what_nanogap_says(
        capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """The loop for older releases stands in the tutorial and goes on from the README's block."""
    pytest.importorskip("transformers")
    import nanogap

    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(block("import torch\nfrom PIL"), names)
    assert block("[0.01, 0.39, 0.17, 0.74]\nkept") == capsys.readouterr().out
    loop = next(block for block in blocks((ROOT / "tutorial.md").read_text()) if block.info == "py")
    exec(loop.text, names)
    ours = nanogap.load("weights/mini", "cpu", "float32").ground(
        "image.jpg", "the man on the left", keep=names["layout"].kept, mode="gap")
    assert names["said"] == ours.tokens


def test_the_words_that_the_small_models_know_are_those_of_the_scenes():
    from nanogap.train.scenes import COLOURS, KINDS
    said = re.search(r"was taught these words, .*: (.*?); (.*?); (.*?);", README)
    assert set(said[1].split(", ")) == set(KINDS) | {"person"}
    assert set(said[2].split(", ")) == set(COLOURS)


def test_the_training_that_is_named_is_that_of_the_log():
    from nanogap.train import __main__ as train
    steps = " ".join(str(stage.steps) for stage in train.RECIPE.stages)
    training = "torchrun --nproc-per-node 2 -m nanogap.train --device cpu --out weights"
    log = (ROOT / "nanogap" / "train" / "LOG.md").read_text()
    assert f"{training}/mine --steps {steps}" in README
    assert f"{training}/mini --steps {steps}\n" in log


def test_every_command_is_real():
    """Its program, module, files and flags are there, and the strategies and modes it names."""
    wrong = [f"README.md:{line}: {command}: {what_is_wrong_with(command)}"
             for line, command in commands(README) if what_is_wrong_with(command)]
    assert not wrong, "\n".join(wrong)


def test_the_measured_table_looks_like_the_evaluators():
    assert is_the_evaluators(block("Acc@0.5"))


def test_image_jpg_is_the_scene_that_the_readme_names(tmp_path: Path):
    split, index = re.search(r"train\.scenes (\w+) (\d+) image\.jpg", README).groups()
    drawn = tmp_path / "image.jpg"
    subprocess.run([sys.executable, "-m", "nanogap.train.scenes", split, index, str(drawn)],
                   check=True, cwd=ROOT, capture_output=True)
    shipped, again = Image.open(ROOT / "image.jpg"), Image.open(drawn)
    assert shipped.size == again.size
    assert max(high for _, high in ImageChops.difference(shipped, again).getextrema()) <= 8


def count_again() -> None:
    """Write how many lines each file of the lesson has."""
    def counted(row: re.Match) -> str:
        return f"| `{row[1]}` | {(ROOT / row[1]).read_text().count(chr(10))} |"
    (ROOT / "README.md").write_text(re.sub(COUNTED, counted, README, flags=re.MULTILINE))


if __name__ == "__main__":
    count_again()
