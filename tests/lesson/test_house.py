"""How the house is built: a lesson that stands alone, and imports that run downwards."""

import ast
import json
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nanogap"
FILES = sorted(PACKAGE.rglob("*.py"))
LESSON = sorted(PACKAGE.glob("*.py"))
SHARED = {"__init__", "base", "saving", "eva"}      # in models/
MODEL_FILES = {path.stem for path in (PACKAGE / "models").glob("*.py")} - SHARED


def module(path: Path) -> str:
    """The name by which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in NAMES else node.module)
    return found


# ----- the lesson ---------------------------------------------------------------------------------


def test_a_query_runs_with_only_the_lesson_there(tmp_path: Path):
    """Its files alone, under an empty __init__.py, say the golden words in every mode."""
    (tmp_path / "nanogap").mkdir()
    for path in LESSON:
        shutil.copy(path, tmp_path / "nanogap")
    (tmp_path / "nanogap/__init__.py").write_text("")
    (tmp_path / "nanogap/__main__.py").unlink()
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
    others = {name for name in imported(path) if name.split(".")[0] not in packages}
    assert others <= set(map(module, LESSON)) - {"nanogap", "nanogap.__main__"}


# ----- the whole ----------------------------------------------------------------------------------


def test_no_imports_run_in_a_circle():
    """Also none behind TYPE_CHECKING or inside a function: every import statement counts."""
    graph = {name: imported(path) & set(NAMES) - {name, "nanogap"} for name, path in NAMES.items()}
    TopologicalSorter(graph).prepare()            # or CycleError, which names those in the circle


def test_nothing_but_models_imports_a_models_file():
    """What differs between two models is in models/; others ask MODELS or the model itself."""
    crossings = [f"{name} imports {other}" for name, path in NAMES.items()
                 if not name.startswith("nanogap.models") for other in imported(path)
                 if other.startswith("nanogap.models.") and other.split(".")[2] in MODEL_FILES]
    assert crossings == []


def test_ground_is_one_function_that_fits_on_a_screen():
    """From the picture to the box: at most 36 lines below its docstring."""
    tree = ast.parse((PACKAGE / "ground.py").read_text())
    ground = next(node for node in tree.body
                  if isinstance(node, ast.FunctionDef) and node.name == "ground")
    assert ground.end_lineno - ground.body[1].lineno + 1 <= 36
