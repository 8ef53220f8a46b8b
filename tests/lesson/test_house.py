"""How the house is built: a lesson that stands alone, and imports that run downwards."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nanogap"
FILES = sorted(PACKAGE.rglob("*.py"))
LESSON = sorted(PACKAGE.glob("*.py"))
MODEL_FILES = {path.stem for path in (PACKAGE / "models").glob("*.py")} - {"__init__", "base"}


# ----- the lesson ---------------------------------------------------------------------------------


def test_a_query_runs_with_only_the_lesson_there(tmp_path: Path):
    """Its files alone, under an empty __init__.py, say the golden words in every mode."""
    for path in LESSON:
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "nanogap").mkdir()
    for path in tmp_path.glob("*.py"):
        path.rename(tmp_path / "nanogap" / path.name)
    (tmp_path / "nanogap" / "__init__.py").write_text("")
    (tmp_path / "nanogap" / "__main__.py").unlink(missing_ok=True)
    code = """
import json, sys
from nanogap.gap import MODES
from nanogap.ground import ground
from nanogap.weights import load
model, image = load(sys.argv[1]), sys.argv[2]
print(json.dumps({mode: ground(model, image, "the man on the left", prune="random", keep="50%",
                               mode=mode, seed=0).text for mode in MODES}))
assert not any(name.startswith("nanogap.") and name.count(".") > 1 for name in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code, ROOT / "weights/mini", ROOT / "image.jpg"],
                          cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    golden = json.loads((ROOT / "tests/golden_mini.json").read_text())
    assert json.loads(said) == golden["mini"]


def test_the_lesson_has_at_most_1500_lines():
    assert sum(len(path.read_text().split("\n")) for path in LESSON) <= 1500


@pytest.mark.parametrize("path", LESSON, ids=lambda path: path.name)
def test_the_lesson_imports_itself_and_four_packages(path: Path):
    if path.stem in ("__init__", "__main__"):
        return                                    # the face that joins the two storeys
    packages = {"torch", "safetensors", "tokenizers", "PIL", *sys.stdlib_module_names}
    for name in statements(path):
        assert name.split(".")[0] in packages or re.fullmatch(r"nanogap\.[a-z]+", name), name
        assert (PACKAGE / f"{name.removeprefix('nanogap.')}.py").exists() or "nanogap" not in name


def statements(path: Path) -> set[str]:
    """The modules that the import statements of a file name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


# ----- the whole ----------------------------------------------------------------------------------


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


def test_nothing_but_models_imports_a_models_file():
    """What differs between two models is in models/; others ask MODELS or the model itself."""
    crossings = [f"{name} imports {other}" for name, path in NAMES.items()
                 if not name.startswith("nanogap.models") for other in imported(path)
                 if other.startswith("nanogap.models.")
                 and other.split(".")[2] in MODEL_FILES - {"saving", "tokenizer", "frames", "eva"}]
    assert crossings == []


def test_ground_is_one_function_that_fits_on_a_screen():
    """From the picture to the box: at most 36 lines below its docstring."""
    tree = ast.parse((PACKAGE / "ground.py").read_text())
    ground = next(node for node in tree.body
                  if isinstance(node, ast.FunctionDef) and node.name == "ground")
    assert ground.end_lineno - ground.body[1].lineno + 1 <= 36


@pytest.mark.parametrize("path", [*FILES, ROOT / "run.py"], ids=lambda path: path.name)
def test_no_line_is_wider_than_100_columns(path: Path):
    wide = [i for i, line in enumerate(path.read_text().split("\n"), 1) if len(line) > 100]
    assert wide == []
