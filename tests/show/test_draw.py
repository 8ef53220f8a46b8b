"""The picture, on a 4 x 4 grid: what is bright, what is dimmed, where lines and names go.

A 96 x 48 picture lies over the two middle rows, a 48 x 96 one over the two middle columns:

    . . . .        .  1  2  .
    4 5 6 7        .  5  6  .
    8 9 . .        .  9 10  .
    . . . .        . 13 14  .
"""

import math
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor

from nanogap.errors import NanogapError
from nanogap.gap import MODES
from nanogap.models.frames import Padded
from nanogap.show import figures
from nanogap.show.draw import (
    MARGIN,
    PAGE,
    STYLES,
    TRUTH,
    DrawnBox,
    dim_dropped,
    draw_answers,
    place_tag,
    shared_area,
    shortened,
    sides,
)
from tests.tiny import tiny_model

PINK = (250, 150, 200)
WHITE, BLUE, ORANGE = (255, 255, 255), (86, 180, 233), (230, 159, 0)      # full, gap, shifted
MINT = (176, 255, 208)                                                    # the truth


# ----- patches ------------------------------------------------------------------------------------


def dimmed_pixels(size: tuple[int, int], keep: list[int]) -> set[tuple[int, int]]:
    image = Image.new("RGB", size, PINK)
    drawn = dim_dropped(image, keep, Padded().cells(4, 4, *size))
    assert drawn.size == size
    return {at for at in product(*map(range, size)) if drawn.getpixel(at) != PINK}


@pytest.mark.parametrize("size, kept, columns, rows", [
    ((96, 48), 5, range(24, 48), range(0, 24)), ((48, 96), 9, range(0, 24), range(48, 72))])
def test_the_grid_reaches_into_the_padding_of_a_wide_or_a_tall_picture(
        size: tuple[int, int], kept: int, columns: range, rows: range):
    every = set(product(*map(range, size)))
    assert dimmed_pixels(size, [kept]) == every - set(product(columns, rows))


@pytest.mark.parametrize("size", [(37, 90), (90, 37), (100, 61), (77, 77)])
def test_keeping_all_patches_leaves_the_picture_as_it_is(size: tuple[int, int]):
    assert dimmed_pixels(size, list(range(16))) == set()


def test_what_any_kept_token_shows_is_bright_wherever_the_tokens_lie():
    """Two views of one picture, as tiles are: the whole of it, and its right half in two rows."""
    at = torch.tensor([[0.0, 0, 20, 20], [10, 0, 20, 10], [10, 10, 20, 20]])
    image = Image.new("RGB", (20, 20), PINK)
    lower = dim_dropped(image, [2], at)
    assert lower.getpixel((10, 10)) == lower.getpixel((19, 19)) == PINK
    assert PINK not in {lower.getpixel(at) for at in ((9, 19), (19, 9), (0, 0))}
    assert dim_dropped(image, [2, 0], at).tobytes() == image.tobytes()


def test_a_dropped_patch_is_grey_and_much_darker():
    drawn = dim_dropped(Image.new("RGB", (40, 40), PINK), [0], Padded().cells(4, 4, 40, 40))
    red, green, blue = drawn.getpixel((35, 35))
    assert red == green == blue == 74                # 0.4 of its brightness, 185
    assert drawn.getpixel((5, 5)) == PINK


# ----- boxes --------------------------------------------------------------------------------------


def page(size: tuple[int, int], *answers: DrawnBox, caption: str = "x",
         truth: tuple[float, float, float, float] | None = None) -> Image.Image:
    """On the page a picture 96 wide is ten times as large, below and right of the margin."""
    image, at = Image.new("RGB", size, (0, 60, 0)), Padded().cells(4, 4, *size)
    return draw_answers(image, range(16), at, answers, caption, truth)


def colours(picture: Image.Image, box: tuple[int, int, int, int]) -> set[tuple[int, int, int]]:
    return {colour for _, colour in picture.crop(box).getcolors(1 << 24)}


def test_every_mode_has_a_style_of_its_own():
    assert set(STYLES) == set(MODES) and len(STYLES) == 7
    styles = [*STYLES.values(), TRUTH]
    assert len({colour for colour, _, _ in styles}) == len(styles)
    assert len({(width, dash) for _, width, dash in styles}) == len(styles)
    widths = [width for _, width, _ in STYLES.values()]
    assert widths == sorted(widths, reverse=True)             # the widest is drawn first


# What a dichromat sees of linear red, green and blue, severity 1: Machado, Oliveira, Fernandes 2009
SIGHT = {
    "protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritan": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304))}


@pytest.mark.parametrize("sight", SIGHT)
def test_a_colour_blind_reader_tells_the_colours_apart(sight: str):
    seen = []
    for colour, _, _ in [*STYLES.values(), TRUTH]:
        linear = [(v / 255) ** 2.2 for v in ImageColor.getrgb(colour)]
        mixed = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in SIGHT[sight]]
        seen.append([255 * min(max(v, 0), 1) ** (1 / 2.2) for v in mixed])
    assert min(math.dist(a, b) for a, b in combinations(seen, 2)) > 40        # of 441


def test_a_box_is_drawn_where_it_is_on_the_enlarged_picture():
    picture = page((96, 48), DrawnBox("gap", "gap", (20, 10, 70, 40)))
    left, top, right, bottom = (10 * v + MARGIN for v in (20, 10, 70, 40))
    for at in ((left, 250), (right, 250), (400, top), (400, bottom)):
        assert picture.getpixel(at) == BLUE
    assert picture.getpixel((400, 350)) == picture.getpixel((left - 20, 350)) == (0, 60, 0)


def test_boxes_that_coincide_all_show():
    box = (20, 10, 70, 40)
    picture = page((96, 48), *(DrawnBox(mode, mode, box) for mode in ("full", "shifted", "gap")))
    left_side = colours(picture, (20 * 10, 200, 23 * 10, 380))
    assert {WHITE, BLUE, ORANGE} <= left_side


def test_the_true_box_is_dotted_and_named_in_the_legend():
    answer = DrawnBox("gap", "gap", (20, 10, 70, 40))
    picture = page((96, 48), answer, truth=(20, 10, 70, 40))          # it coincides, and shows
    assert picture.height - page((96, 48), answer).height == 46
    left_side = (20 * 10, 200, 23 * 10, 380)
    assert {BLUE, MINT} <= colours(picture, left_side)
    assert MINT not in colours(page((96, 48), answer), (0, 0, 988, 600))
    below = picture.height - MARGIN - 46
    assert MINT in colours(picture, (0, below, 100, picture.height))


def test_an_answer_without_a_box_is_in_the_legend_only():
    full, shifted = DrawnBox("full", "full", (20, 10, 70, 40)), DrawnBox("shifted", "s", None)
    picture = page((96, 48), full, shifted)
    legend = MARGIN + 480 + MARGIN
    assert ORANGE not in colours(picture, (0, 0, picture.width, legend))
    assert ORANGE in colours(picture, (0, legend, picture.width, picture.height))


def test_a_box_at_the_border_keeps_its_line_on_the_page():
    picture = page((96, 48), DrawnBox("full", "full", (0, 0, 96, 48)))
    for strip in ((0, 0, MARGIN, 494), (MARGIN + 960, 0, MARGIN * 2 + 960, 494),
                  (100, 0, 900, MARGIN), (100, 494, 900, 480 + 2 * MARGIN)):
        assert WHITE in colours(picture, strip)
    assert colours(picture, (0, 0, 2, 494)) == {(27, 27, 27)}          # and inside it


# ----- names --------------------------------------------------------------------------------------


def tags_of(boxes: list) -> list:
    """The places of the names of some boxes, each wider than the one before."""
    tags: list = []
    for i, box in enumerate(boxes):
        tags.append(place_tag(60 + 30 * i, 36, box, (960, 600), tags, boxes))
    assert all(shared_area(a, b) == 0 for a, b in combinations(tags, 2))
    return tags


@pytest.mark.parametrize("box", [(0, 0, 5, 5), (955, 595, 960, 600), (0, 0, 960, 600),
                                 (300, 200, 600, 400), (0, 590, 960, 600), (950, 0, 960, 600)])
def test_names_of_boxes_that_coincide_overlap_neither_each_other_nor_the_border(box: tuple):
    for x1, y1, x2, y2 in tags_of([box] * 4):
        assert 0 <= x1 < x2 <= 960 and 0 <= y1 < y2 <= 600


BOX = (300, 200, 600, 400)
ABOVE_LEFT, ABOVE_RIGHT = (292, 146, 382, 186), (518, 146, 608, 186)
BELOW_LEFT, BELOW_RIGHT = (292, 414, 382, 454), (518, 414, 608, 454)


def test_a_name_stands_above_its_box_then_below_then_in_a_corner():
    taken: list = []
    for place in (ABOVE_LEFT, ABOVE_RIGHT, BELOW_LEFT, BELOW_RIGHT, (314, 214, 404, 254)):
        assert place_tag(90, 40, BOX, (960, 600), taken, [BOX]) == place
        taken.append(place)


def test_a_name_stands_in_no_other_box_where_there_is_a_place_beside_its_own():
    other = (150, 20, 450, 300)                               # around the place above left
    assert place_tag(90, 40, BOX, (960, 600), [], [BOX, other]) == ABOVE_RIGHT


@pytest.mark.parametrize("boxes", [
    [(20 + 80 * i, 30 + 10 * i, 120 + 80 * i, 200 + 30 * i) for i in range(7)],
    [(100 + 12 * i, 100 + 12 * i, 500 + 12 * i, 400 + 12 * i) for i in range(7)],
    [(10, 110, 190, 525), (15, 140, 188, 530), (290, 218, 536, 555)]])
def test_no_name_lies_over_a_line_or_another_name(boxes: list):
    lines = [(x1 - 7, y1 - 7, x2 + 7, y2 + 7) for box in boxes for x1, y1, x2, y2 in sides(box)]
    assert all(shared_area(tag, line) == 0 for tag, line in product(tags_of(boxes), lines))


# ----- the page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (20000, 300), (96, 48), (48, 96)])
def test_the_page_is_as_wide_as_a_screen_whatever_the_picture(size: tuple[int, int]):
    picture = page(size, DrawnBox("full", "full", (0, 0, *size)), DrawnBox("gap", "gap", None))
    assert 640 <= picture.width <= 1000 and picture.height <= 1500


@pytest.mark.parametrize("caption", ["the man " * 1000, "W" * 20000, "人" * 900])
def test_a_caption_that_is_too_long_is_cut_at_the_margin(caption: str):
    picture = page((12, 120), caption=caption)
    border = (picture.width - MARGIN + 2, 1200, picture.width, picture.height)
    assert colours(picture, border) == {(27, 27, 27)} and PAGE == "#1b1b1b"


def test_a_line_is_cut_where_the_room_ends_and_not_before():
    assert shortened("a man\n[0.29]", 12, len) == "a man [0.29]"
    assert shortened("a man [0.29]", 11, len) == "a man [0..."
    assert shortened("人" * 9, 9, lambda text: 2 * len(text)) == "人..."


def test_a_page_is_as_wide_as_its_legend():
    words = "gap: position IDs kept, 72 tokens, IoU with full 0.93"
    narrow = page((12, 120), DrawnBox("gap", "gap", None))
    wide = page((12, 120), DrawnBox("gap", words, None))
    border = (wide.width - MARGIN + 2, 1200, wide.width, wide.height)
    assert wide.width > narrow.width and colours(wide, border) == {(27, 27, 27)}


def test_a_figure_of_one_square_is_refused_of_a_model_that_sees_tiles(tmp_path: Path):
    with pytest.raises(NanogapError, match="a single square of patches, and the model sees tiles"):
        list(figures.make(["patches"], tiny_model("llava_next"), tmp_path))
