"""python -m nanogap: what run.py does, for whoever has a wheel and no run.py."""

import runpy

from nanogap.checks.loading import TOP

if __name__ == "__main__":
    runpy.run_path(str(TOP / "run.py"), run_name="__main__")
