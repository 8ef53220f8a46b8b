"""The commands, listed; and the question itself, for whoever has a wheel and no run.py.

    python -m nanogap
    python -m nanogap IMAGE EXPRESSION ...      the same as `python run.py IMAGE EXPRESSION ...`
"""

import runpy

from nanogap import __version__
from nanogap.checks.command import answer_for
from nanogap.checks.loading import HERE, TOP

COMMANDS = f"""nanogap {__version__}: Grounding-Aware Token Pruning (arXiv 2506.21873)

python -m nanogap IMAGE EXPRESSION   ask where something is, in three modes; the same as run.py
python -m nanogap.evaluate           measure accuracy on drawn scenes or RefCOCO, or of your answers
python -m nanogap.train              train a small model on drawn scenes
python -m nanogap.train.scenes       draw one scene
python -m nanogap.convert            make one folder of weights that are published in pieces
python -m nanogap.bench              time a model
python -m nanogap.show.figures       draw the figures of README.md and tutorial.md

Each has --help.  Small models are in {HERE}; --weights knows them as
{', '.join(sorted(path.name for path in HERE.glob('mini*')))}.
To begin with: python -m nanogap {TOP / "image.jpg"} "the man on the left\""""


def main(argv: list[str]) -> int:
    """Tell the commands or the version, or do what run.py does."""
    if argv in ([], ["--help"], ["-h"], ["--version"]):
        told = f"nanogap {__version__}" if argv == ["--version"] else COMMANDS
        return answer_for("nanogap", lambda _: print(told), argv)
    runpy.run_path(str(TOP / "run.py"), run_name="__main__")    # it ends the process
    return 0

