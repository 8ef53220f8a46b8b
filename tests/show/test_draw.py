"""The picture, on a 4 x 4 grid: what is bright, what is dimmed, where lines and names go.

A 96 x 48 picture lies over the two middle rows, a 48 x 96 one over the two middle columns:

    . . . .        .  1  2  .
    4 5 6 7        .  5  6  .
    8 9 . .        .  9 10  .
    . . . .        . 13 14  .
"""

from collections.abc import Sequence
from itertools import combinations, product

import pytest
import torch
from PIL import Image

from nanogap.fast.ground_all import Answered
from nanogap.gap import MODES
from nanogap.image import iou
from nanogap.models.base import Padded
from nanogap.show.draw import MARGIN, STYLES, TRUTH, dim_dropped, draw_results, place_tag

PINK = (250, 150, 200)
WHITE, BLUE, ORANGE = (255, 255, 255), (86, 180, 233), (230, 159, 0)      # full, gap, shifted
MINT = (176, 255, 208)                                                    # the truth


# ----- patches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, kept, columns, rows", [
    ((96, 48), [5], range(24, 48), range(0, 24)), ((48, 96), [9], range(0, 24), range(48, 72)),
    ((37, 90), range(16), range(37), range(90)), ((100, 61), range(16), range(100), range(61))])
def test_all_is_dimmed_but_the_kept_patches_which_may_lie_in_the_padding(
        size: tuple[int, int], kept: Sequence[int], columns: range, rows: range):
    drawn = dim_dropped(Image.new("RGB", size, PINK), kept, Padded().cells(4, 4, *size))
    grey = (74, 74, 74)                                   # 0.4 of PINK's brightness, 185
    for at in product(*map(range, size)):
        assert drawn.getpixel(at) == (PINK if at[0] in columns and at[1] in rows else grey)


# ----- boxes --------------------------------------------------------------------------------------


def page(size: tuple[int, int], boxes: dict, truth: tuple | None = None,
         expression: str = "x") -> Image.Image:
    """On the page a picture 96 wide is ten times as large, below and right of the margin."""
    results = {}
    for mode, box in boxes.items():
        results[mode] = Answered(
            box, "", torch.arange(16), visual_tokens=16, position_ids=torch.arange(30),
            next_position=30, tokens=[], timings={}, kv_bytes=0, cut_off=False,
            expression=expression, prune="random", mode=mode, cells=Padded().cells(4, 4, *size))
    return draw_results(Image.new("RGB", size, (0, 60, 0)), results, truth)


def colours(picture: Image.Image, box: tuple[int, int, int, int]) -> set[tuple[int, int, int]]:
    return {colour for _, colour in picture.crop(box).getcolors(1 << 24)}


def test_every_mode_has_a_style_of_its_own():
    assert set(STYLES) == set(MODES) and len(STYLES) == 7
    styles = [*STYLES.values(), TRUTH]
    assert len({colour for colour, _, _ in styles}) == len(styles)
    assert len({(width, dash) for _, width, dash in styles}) == len(styles)
    widths = [width for _, width, _ in STYLES.values()]
    assert widths == sorted(widths, reverse=True)             # the widest is drawn first


BOX = (20, 10, 70, 40)


def test_a_box_is_drawn_where_it_is_on_the_enlarged_picture():
    picture = page((96, 48), {"gap": BOX, "shifted": None})
    left, top, right, bottom = (10 * v + MARGIN for v in BOX)
    for at in ((left, 250), (right, 250), (400, top), (400, bottom)):
        assert picture.getpixel(at) == BLUE
    assert picture.getpixel((400, 350)) == picture.getpixel((left - 20, 350)) == (0, 60, 0)
    legend = MARGIN + 480 + MARGIN                           # there alone is who gave no box
    assert ORANGE not in colours(picture, (0, 0, picture.width, legend))
    assert ORANGE in colours(picture, (0, legend, picture.width, picture.height))


def test_boxes_that_coincide_all_show_and_the_true_one_dotted():
    left_side = (20 * 10, 200, 23 * 10, 380)
    picture = page((96, 48), {"full": BOX, "shifted": BOX, "gap": BOX})
    assert {WHITE, BLUE, ORANGE} <= colours(picture, left_side)
    assert MINT not in colours(picture, (0, 0, *picture.size))
    told = page((96, 48), {"gap": BOX}, truth=BOX)
    assert {BLUE, MINT} <= colours(told, left_side)
    last_line = told.height - MARGIN - 46
    assert MINT in colours(told, (0, last_line, 100, told.height))


def test_a_box_at_the_border_keeps_its_line_on_the_page():
    picture = page((96, 48), {"full": (0, 0, 96, 48)})
    for strip in ((0, 0, MARGIN, 494), (MARGIN + 960, 0, MARGIN * 2 + 960, 494),
                  (100, 0, 900, MARGIN), (100, 494, 900, 480 + 2 * MARGIN)):
        assert WHITE in colours(picture, strip)
    assert colours(picture, (0, 0, 2, 494)) == {(27, 27, 27)}          # and inside it


@pytest.mark.parametrize("box", [(0, 0, 5, 5), (955, 595, 960, 600), (0, 0, 960, 600),
                                 (300, 200, 600, 400), (0, 590, 960, 600), (950, 0, 960, 600)])
def test_names_of_boxes_that_coincide_overlap_neither_each_other_nor_the_border(box: tuple):
    tags: list = []
    for width in (60, 90, 120, 150):
        tags.append(place_tag(width, box, (960, 600), tags))
    assert all(iou(a, b) == 0 for a, b in combinations(tags, 2))
    assert all(0 <= x1 < x2 <= 960 and 0 <= y1 < y2 <= 600 for x1, y1, x2, y2 in tags)


# ----- the page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (20000, 300), (96, 48), (48, 96)])
def test_the_page_is_as_wide_as_a_screen_whatever_the_picture(size: tuple[int, int]):
    picture = page(size, {"full": (0, 0, *size), "gap": None})
    assert picture.width == 988 and picture.height <= 1500


def test_a_caption_that_is_too_long_is_cut_at_the_margin():
    picture = page((96, 48), {"gap": None}, expression="W" * 20000)
    border = (picture.width - MARGIN + 2, 0, picture.width, picture.height)
    assert colours(picture, border) == {(27, 27, 27)}
