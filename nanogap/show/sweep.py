"""The picture that moves: fewer and fewer patches, the box under renumbered IDs beside GAP's.

Nothing is chosen by its result: it is the question of the README, seed 0, and every share from
100 % to 10 % in even steps, those in which GAP fails as well.  A smaller share keeps a part of what
a larger one keeps, for `random` takes the first so many of one random order.
"""

from PIL import Image, ImageDraw, ImageFont

from nanogap.checks.loading import TOP
from nanogap.ground import Result
from nanogap.image import iou, open_image
from nanogap.models import VLM
from nanogap.show.draw import MARGIN, PAGE, PAPER, STYLES, TRUTH, dim_dropped, stroke
from nanogap.show.table import true_box

IMAGE = TOP / "image.jpg"
EXPRESSION = "the man on the left"
SHARES = [100 - 2.5 * step for step in range(37)]      # percent
STILLS = (100, 75, 50, 25, 10)
SIDES = {"shifted": "renumbered position IDs", "gap": "GAP: original position IDs"}
WIDTH, PANEL, STILL = 900, 430, 168                    # of a frame, and of pictures in it, pixels
LINE = 40                                              # height of a line of text
GREY = "#5a5a5a"
MS = 160                                               # a frame is shown so long


class Sweep:
    """image.jpg, asked one question with fewer and fewer patches."""

    def __init__(self, model: VLM) -> None:
        encoded = model.encode_image(IMAGE)
        truth = true_box(IMAGE, EXPRESSION)
        assert truth is not None
        self.truth = truth
        self.picture = open_image(IMAGE)
        self.cells = model.cells(encoded)                                     # (N, 4)
        self.results = {
            share: {mode: model.ground(encoded, EXPRESSION, "random", f"{share}%", mode)
                    for mode in SIDES} for share in SHARES}

    def panel(self, result: Result, mode: str, width: int) -> Image.Image:
        """The picture with what was kept, the box that was said, and the true one dotted."""
        scale = width / self.picture.width
        small = self.picture.resize((width, round(self.picture.height * scale)),
                                    Image.Resampling.LANCZOS)
        panel = dim_dropped(small, result.keep.tolist(), self.cells * scale)
        said = STYLES[mode][0], 5 if width == PANEL else 3, None
        for box, style in ((result.box, said), (self.truth, (TRUTH[0], 3, (1, 16)))):
            if box is not None:
                x1, y1, x2, y2 = (v * scale for v in box)
                stroke(ImageDraw.Draw(panel), [((x1, y1, x2, y2), style)])
        return panel

    def score(self, result: Result) -> str:
        """IoU with the true box, as it is written."""
        return f"IoU {iou(result.box, self.truth):.2f}" if result.box else "no box"

    def frame(self, share: float) -> Image.Image:
        """Both modes side by side, with their IoU, and how much is kept."""
        below = LINE + round(self.picture.height * PANEL / self.picture.width)
        page = Image.new("RGB", (WIDTH, below + 3 * LINE - 8), PAGE)
        pen = ImageDraw.Draw(page)
        font, large = ImageFont.load_default(22), ImageFont.load_default(28)
        x, y = MARGIN, below + LINE / 2
        for mode, result in self.results[share].items():
            colour = STYLES[mode][0]
            page.paste(self.panel(result, mode, PANEL), (x, LINE))
            pen.text((x, LINE / 2), SIDES[mode], colour, font, anchor="lm")
            pen.text((x, y), self.score(result), colour, large, anchor="lm")
            pen.text((x + 140, y), "dotted: the true box", PAPER, font, anchor="lm")
            x = WIDTH - PANEL - MARGIN
        kept, y = len(result.keep), below + 3 * LINE / 2
        told = f"\"{EXPRESSION}\": {share:.1f} % of the patches kept, {kept} of {len(self.cells)}"
        pen.text((MARGIN, y), told, PAPER, font, anchor="lm")
        full = WIDTH - 2 * MARGIN
        for length, colour in ((full, GREY), (full * share / 100, PAPER)):
            pen.rectangle((MARGIN, y + 22, MARGIN + length, y + 36), colour)
        return page

    def frames(self) -> tuple[list[Image.Image], list[int]]:
        """From all patches to the fewest and back, and how long each is shown, milliseconds."""
        down = [self.frame(share) for share in SHARES]
        frames = [*down, *down[-2:0:-1]]
        shown = [MS] * len(frames)
        shown[0] = shown[len(down) - 1] = 8 * MS
        return frames, shown

    def still(self) -> Image.Image:
        """Some of the shares beside one another, for places that do not move."""
        height = round(self.picture.height * STILL / self.picture.width)
        page = Image.new("RGB", (WIDTH, 4 * LINE + 2 * height + MARGIN), PAGE)
        pen = ImageDraw.Draw(page)
        font, small = ImageFont.load_default(22), ImageFont.load_default(18)
        y = LINE
        for mode, title in SIDES.items():
            pen.text((MARGIN, y - LINE / 2), title, STYLES[mode][0], font, anchor="lm")
            for column, share in enumerate(STILLS):
                x, result = MARGIN + column * (STILL + 8), self.results[share][mode]
                page.paste(self.panel(result, mode, STILL), (x, y))
                told = f"{share} %, {self.score(result)}"
                pen.text((x, y + height + LINE / 2 - 2), told, PAPER, small, anchor="lm")
            y += height + 2 * LINE
        told = f"\"{EXPRESSION}\"; IoU with the true box, dotted"
        pen.text((WIDTH - MARGIN, LINE / 2), told, PAPER, small, anchor="rm")
        return page
