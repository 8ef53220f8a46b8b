"""What the README says stands in the code, and its commands are real."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import run
from nanogap.evaluate import __main__ as evaluate
from nanogap.train import __main__ as train
from tests.markdown import broken_links, commands, is_the_evaluators, what_is_wrong_with

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def block(start: str) -> str:
    return next(text for _, text in BLOCKS if text.startswith(start))


def test_the_two_commands_do_their_own_set_up():
    set_up = "pip install -r requirements.txt && python"
    assert f'{set_up} run.py image.jpg "the man on the left"\n' in README
    assert "pip install -r requirements.txt && python -m pytest\n" in README
    needed = [re.split("[=>]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()]
    assert needed == ["torch", "safetensors", "tokenizers", "pillow", "pytest"]


def test_the_quoted_lines_of_gap_stand_in_gap():
    lines = block("    visual =")
    assert "GAP, 1" in lines and "GAP, 2" in lines
    assert lines in (ROOT / "nanogap" / "gap.py").read_text()


def test_the_readme_is_at_most_150_lines():
    assert README.count("\n") <= 150


def test_every_source_file_is_in_the_reading_order_and_every_link_leads_somewhere():
    named = set(re.findall(r"`(nanogap/\w+\.py|run\.py)`", README))
    there = {f"nanogap/{p.name}" for p in (ROOT / "nanogap").glob("*.py")} - {"nanogap/__init__.py"}
    assert named == there | {"run.py"}
    folders = {f"nanogap/{p.parent.name}/" for p in (ROOT / "nanogap").glob("*/__init__.py")}
    assert folders == set(re.findall(r"`(nanogap/\w+/)`", README))
    assert [f"README.md:{line}: {link}" for line, link in broken_links(README)] == []


def test_the_printed_output_is_what_the_command_prints(capsys, tmp_path, monkeypatch):
    """All but the times: those are this machine's."""
    def timeless(text: str) -> str:
        return re.sub(r" +\d+ ms|\(\d+ ms\)", " ms", text).replace(str(tmp_path) + "/", "")

    monkeypatch.chdir(ROOT)
    assert run.main(["image.jpg", "the man on the left", "--device", "cpu",
                     "--out", str(tmp_path / "answer.png")]) == 0
    assert timeless(capsys.readouterr().out) == timeless(block("weights/mini on cpu"))


def test_the_python_example_says_what_the_command_says(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = next(text for kind, text in BLOCKS if kind == "python" and "nanogap.load" in text)
    exec(compile(ast.parse(code), "README.md", "exec"), {})
    box = ast.literal_eval(re.search(r"\] (\(.*\))", capsys.readouterr().out).group(1))
    lines = block("weights/mini on cpu").split("\n")
    line = next(line for line in lines if line.startswith("gap "))
    assert ", ".join(f"{v:.0f}" for v in box) in line


def test_the_other_commands_take_the_arguments_that_are_given_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = block("python -m nanogap.evaluate").replace("\\\n", " ").split()[3:]
    at = words.index("--limit") + 1
    words[at] = "1"
    evaluate.main(words)
    steps = " ".join(str(stage.steps) for stage in train.CPU.stages)
    training = "torchrun --nproc-per-node 2 -m nanogap.train --device cpu --out weights/mini"
    log = (ROOT / "nanogap" / "train" / "LOG.md").read_text()
    assert f"{training} --steps {steps}" in README and f"{training} --steps {steps}\n" in log


def test_every_command_is_real():
    """Its program, module, files and flags are there, and the strategies and modes it names."""
    wrong = [f"README.md:{line}: {command}: {what_is_wrong_with(command)}"
             for line, command in commands(README) if what_is_wrong_with(command)]
    assert not wrong, "\n".join(wrong)


def test_the_measured_table_looks_like_the_evaluators():
    assert any(text.startswith("Acc@0.5") and is_the_evaluators(text) for _, text in BLOCKS)


def test_the_tutorial_is_linked():
    assert "(tutorial.md)" in README


def test_image_jpg_is_the_scene_that_the_readme_names(tmp_path):
    from PIL import Image, ImageChops
    split, index = re.search(r"nanogap\.scenes (\w+) (\d+) image\.jpg", README).groups()
    command = [sys.executable, "-m", "nanogap.train.scenes", split, index, str(tmp_path / "image.jpg")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    shipped, drawn = Image.open(ROOT / "image.jpg"), Image.open(tmp_path / "image.jpg")
    assert shipped.size == drawn.size
    assert max(high for _, high in ImageChops.difference(shipped, drawn).getextrema()) <= 8
