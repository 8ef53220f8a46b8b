"""How the house is built: imports run downwards, the method knows no wing, models/ names models."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nanogap"
FILES = sorted(PACKAGE.rglob("*.py"))
WINGS = ("evaluate", "bench", "train", "convert")
MODEL_FILES = {path.stem for path in (PACKAGE / "models").glob("*.py")} - {"__init__", "base"}


def module(path: Path) -> str:
    """The name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The files of this package that one imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in NAMES else node.module)
    return found & set(NAMES) - {module(path)}


def wing(name: str) -> str | None:
    """The wing in which a module stands."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in WINGS else None


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path that comes back to where it began, or nothing."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name):] + [name]
        for other in sorted(graph[name] - done):
            found = visit(other, [*way, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_imports_run_in_a_circle():
    """Also none behind TYPE_CHECKING or inside a function: every import statement counts."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({name: imported(path) - {"nanogap"} for name, path in NAMES.items()}) == []


def test_the_method_and_the_models_import_no_wing():
    crossings = [f"{name} imports {other}" for name, path in NAMES.items() if wing(name) is None
                 for other in imported(path) if wing(other)]
    assert crossings == []


@pytest.mark.parametrize("path", [p for p in FILES if wing(module(p))],
                         ids=lambda path: module(path))
def test_a_wing_that_uses_another_wings_file_says_why(path: Path):
    """A comment on the line of the import, or above it."""
    lines = path.read_text().split("\n")
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.ImportFrom) and node.module:
            there = wing(f"{node.module}.x")
            if there and there != wing(module(path)):
                above = lines[node.lineno - 2].strip().startswith("#")
                said = above or "#" in lines[node.lineno - 1]
                assert said, f"{path.name}:{node.lineno} imports from {there}/ without a reason"


def test_nothing_but_models_imports_a_models_file():
    crossings = [f"{name} imports {other}" for name, path in NAMES.items()
                 if not name.startswith("nanogap.models") for other in imported(path)
                 if other.startswith("nanogap.models.") and other.split(".")[2] in MODEL_FILES]
    assert crossings == []


def test_the_method_does_not_ask_which_model_it_has():
    """No comparison with the name of a family, and no isinstance of one."""
    asking = re.compile(r"isinstance\([^)]*\b(Llava|Shikra|MiniGPT)\w*|model_type\s*==")
    where = [f"{path.name}: {match[0]}" for path in PACKAGE.glob("*.py")
             if (match := asking.search(path.read_text()))]
    assert where == []


def test_a_query_crosses_into_each_file_once():
    """ground.py calls prune, gap, in_decoder and decode; none of them imports it back."""
    used = imported(NAMES["nanogap.ground"])
    assert {"nanogap.prune", "nanogap.gap", "nanogap.methods.in_decoder", "nanogap.fast.decode"} <= used
    assert [name for name in used if "nanogap.ground" in imported(NAMES[name])] == []


def test_the_one_function_fits_on_a_screen():
    """From the picture to the box: at most 36 lines below its docstring."""
    tree = ast.parse((PACKAGE / "ground.py").read_text())
    ground = next(node for node in tree.body
                  if isinstance(node, ast.FunctionDef) and node.name == "ground")
    assert ground.end_lineno - ground.body[1].lineno + 1 <= 36


@pytest.mark.parametrize("path", FILES + [ROOT / "run.py"], ids=lambda path: path.name)
def test_no_line_is_wider_than_100_columns(path: Path):
    wide = [i for i, line in enumerate(path.read_text().split("\n"), 1) if len(line) > 100]
    assert wide == []
