"""Questions for another program: `--questions FILE`, which `--score` reads back when answered.

In:  data.  Out: a line {"id", "image", "expression", "width", "height"} for each expression; drawn
scenes as pictures in a folder beside the file.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from nanogap.checks.output import check_folder, save_picture, write_whole
from nanogap.errors import NanogapError
from nanogap.evaluate.data import Example


def write_questions(path: Path, examples: Sequence[Example], same: Sequence[str]) -> str:
    """Write the file and the pictures; what to do with them, in a line.

    same: arguments of the command that say what data it is
    """
    if path.exists():
        raise NanogapError(f"--questions {path} exists, and may have answers in it; give a new "
                           "file")
    folder = path.with_name(f"{path.stem}_images")
    lines = []
    for example in examples:
        image = example.file or folder / f"{example.name.partition(':')[2].replace('/', '-')}.png"
        if example.file is None:
            check_folder("--questions", folder)
            save_picture("--questions", image, example.image())
        width, height = example.size
        lines += [json.dumps({"id": id_, "image": str(image), "expression": expression,
                              "width": width, "height": height}) + "\n"
                  for id_, expression, _ in example.questions]
    write_whole("--questions", path, "".join(lines).encode())
    score = shlex.join(["python", "-m", "nanogap.evaluate", "--score", str(path), *same])
    return (f"{len(lines)} questions about {len(examples)} pictures: {path}\n"
            "add to each line \"text\", what was answered, or \"box\", x1, y1, x2, y2 in pixels; "
            f"then\n{score}")
