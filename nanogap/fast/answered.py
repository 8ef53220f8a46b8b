"""An answer that shows itself: print(result) is a line, result.draw(image) a picture.

In:  a result of the lesson, and what was asked.  Out: the same result, with that beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from PIL import Image
from torch import Tensor

from nanogap.checks.command import visible
from nanogap.ground import Result


@dataclass(frozen=True)
class Answered(Result):
    expression: str
    prune: str               # name of the strategy; empty where none chose
    mode: str
    cells: Tensor            # (N, 4) which part of the picture each visual token shows, pixels
    cuts: list[tuple[int, int]] = field(default_factory=list)   # (layer, visual tokens from it on)

    draw: ClassVar[Callable[..., Image.Image]]   # draw(image); see nanogap/show

    def __str__(self) -> str:
        box = "no box" if self.box is None else ", ".join(f"{v:.0f}" for v in self.box)
        by = f" by {self.prune}" if self.prune else ""
        return (f"\"{' '.join(self.expression.split())}\": {box} ({self.mode}, "
                f"{self.visual_tokens:g} of {len(self.cells)} visual tokens{by}); "
                f"the model said {visible(self.text)}")
