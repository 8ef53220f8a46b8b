"""How models say a box, for `--score --format NAME`: the answers of any of them can be scored.

In:  what a model said, and the size of its picture.  Out: the first box in it, in pixels.
Sources: nanogap/models for the first four; Qwen-VL eval_mm/evaluate_grounding.py (which divides by
999); model cards of the later Qwen-VL; InternVL eval/refcoco/evaluate_grounding.py; CogVLM's
README; Ferret ferret/eval/eval_refexp.py; PaliGemma big_vision, `<loc....>`.
"""

import re
from dataclasses import dataclass

from nanogap.evaluate.refcoco import Size
from nanogap.image import Box, Pad
from nanogap.models import MiniGPT, Shikra
from nanogap.models.frames import Stretch
from nanogap.prompt import TWO_DECIMALS


@dataclass(frozen=True)
class Format:
    """The notation of one family of models."""

    pattern: re.Pattern[str]           # four groups, one for each number
    one: float | None = 1000           # what is said for a whole side; None: pixels, as resized
    frame: Pad | Stretch = Stretch()
    drop: tuple[str, ...] = ()         # what is taken out of a text before it is read
    y_first: bool = False

    def read(self, text: str, size: Size, resized: Size | None = None) -> Box | None:
        """The first box of a text, in pixels of the picture.

        None where there is none, or it has no area in the picture or lies outside: never guessed

        size:    of the picture
        resized: of the picture as the model saw it, where boxes are in pixels of that one
        """
        for piece in self.drop:
            text = text.replace(piece, "")
        match = self.pattern.search(text)
        if match is None:
            return None
        a, b, c, d = map(float, match.groups())
        x1, y1, x2, y2 = (b, a, d, c) if self.y_first else (a, b, c, d)
        width, height = (self.one, self.one) if self.one else resized or size
        x1, y1, x2, y2 = x1 / width, y1 / height, x2 / width, y2 / height
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            return None
        box = self.frame.to_pixels((x1, y1, x2, y2), *size)
        return box if box[0] < box[2] and box[1] < box[3] else None       # not in the padding


N = r"\s*([0-9]+(?:\.[0-9]+)?)\s*"
JSON_BOX = re.compile(rf'"bbox_2d"\s*:\s*\[{N},{N},{N},{N}\]')
BRACKET = re.compile(rf"\[{N},{N},{N},{N}\]")
PAIRS = re.compile(rf"\({N},{N}\)\s*,\s*\({N},{N}\)")
FORMATS = {                            # the strictest first of those that resemble one another
    "llava": Format(TWO_DECIMALS.pattern, 1, Pad()),
    "llava-next": Format(TWO_DECIMALS.pattern, 1, Pad()),
    "shikra": Format(Shikra.box_format.pattern, 1, Pad()),
    "minigpt-v2": Format(MiniGPT.box_format.pattern, 100, drop=("<unk>", " ")),
    "qwen-vl": Format(PAIRS),
    "qwen2-vl": Format(PAIRS),
    "qwen2.5-vl": Format(JSON_BOX, None),
    "qwen3-vl": Format(JSON_BOX),
    "cogvlm": Format(re.compile(r"\[\[\s*(\d{3}),\s*(\d{3}),\s*(\d{3}),\s*(\d{3})\s*\]", re.ASCII)),
    "internvl": Format(BRACKET),
    "ferret": Format(BRACKET),
    "paligemma": Format(re.compile(r"<loc(\d{4})>" * 4, re.ASCII), 1024, y_first=True),
}
