"""What the tests of the evaluation share: its command, and lines of JSON."""

import json
from collections.abc import Iterable
from pathlib import Path

from nanogap.checks.command import answer_for
from nanogap.evaluate import __main__ as command

ROOT = Path(__file__).resolve().parents[2]
MINI, SHIKRA = ROOT / "weights" / "mini", ROOT / "weights" / "mini-shikra"
BOX = "[0.10, 0.25, 0.50, 0.60]"       # what the model `finder` always says


def run(*arguments: object) -> int:
    """The exit status of a command."""
    argv = [*map(str, arguments), "--device", "cpu"]
    return answer_for("nanogap.evaluate", command.main, argv)


def write_lines(path: Path, items: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path: Path) -> list[dict]:
    """The answers in a file, but for how long they took."""
    return [line | {"prefill_ms": 0, "decode_ms": 0} for line in read_lines(path)]
