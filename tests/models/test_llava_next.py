"""LLaVA-1.6: which tiles a picture is cut into, where its tokens stand, and what pruning keeps.

Worked examples on a tiny random model: a square of 56 x 56 pixels is 4 x 4 patches.  A picture of
100 x 60 pixels lies on a canvas of 112 x 112, as 112 x 68 pixels in the middle: 2 x 2 tiles, 8 x 8
patches, of which the upper and the lower two rows show only black.

    base view    4 x 4            tokens  0 .. 15
    grid         4 x 8            token   16 + 9 row + column; a newline is 16 + 9 row + 8
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import nanogap
from nanogap import gap
from nanogap.errors import NanogapError
from nanogap.models.llava_next import (
    TEMPLATES,
    EncodedTiles,
    LlavaNext,
    Tiles,
    close_rows,
    shared_out,
)
from nanogap.models.saving import save
from nanogap.show.explain import explain
from tests.reference.make_next import noise
from tests.tiny import tiny_next_config, write_checkpoint

# (height, width) of the published canvases
HUB = Tiles(pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
SIZE = (100, 60)
N = 16 + 4 * 9
NEWLINES = [24, 33, 42, 51]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlavaNext:
    folder = write_checkpoint(tmp_path_factory.mktemp("next"), tiny_next_config())
    return nanogap.load(folder, "cpu")


@pytest.fixture(scope="module")
def image(model: LlavaNext) -> EncodedTiles:
    return model.encode_image(noise(*SIZE))


@pytest.fixture(scope="module")
def pixels(model: LlavaNext) -> Tensor:
    return model.prepare_image(noise(*SIZE))


@pytest.mark.parametrize("size, expected", [
    ((640, 480), 2340), ((480, 640), 2352), ((640, 427), 2144), ((427, 640), 2160),
    ((1024, 899), 2634), ((336, 336), 1176), ((900, 300), 2328), ((250, 700), 2276),
    ((2000, 500), 1890), ((1100, 808), 2340), ((640, 640), 576 + 48 * 49)])
def test_the_number_of_visual_tokens_is_that_of_the_hubs_processor(size, expected):
    _, rows, columns = HUB.number(*size)
    assert 576 + rows * (columns + 1) == expected


def test_the_picture_lies_in_the_middle_of_its_canvas_and_what_is_around_it_is_black(model):
    """60 * 112 / 100 = 67.2 are 68 pixels, and 22 lie above them and 22 below."""
    assert model.frame.canvas(*SIZE) == (112, 112)
    assert model.frame.placed(*SIZE) == (0, 22, 112, 68)
    white = (255, 255, 255)
    base, *tiles = model.frame.views(Image.new("RGB", SIZE, white))
    assert base.getcolors() == [(56 * 56, white)]                             # stretched
    assert [tile.getbbox() for tile in tiles] == 2 * [(0, 22, 56, 56)] + 2 * [(0, 0, 56, 34)]
    for tile in tiles:
        assert tile.crop(tile.getbbox()).getcolors() == [(56 * 34, white)]


@pytest.mark.parametrize("size, rows, columns", [
    (SIZE, (2, 6), (0, 8)),           # 4.8 rows of 8 show something: (8 - 4) // 2 = 2 go above
    ((60, 100), (0, 8), (2, 6)),
    ((110, 69), (1, 7), (0, 8)),      # 5: 1 and 1 go, 6 stay
    ((80, 80), (0, 8), (0, 8)),
    ((900, 7), (0, 0), (0, 0)),       # none is left
])
def test_rows_of_padding_are_cut_off_by_the_proportions_of_the_picture(model, size, rows, columns):
    canvas, _, _ = model.frame.number(*size)
    expected = torch.zeros_like(canvas).bool()
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(canvas >= 0, expected)


def test_the_base_view_comes_first_and_every_row_of_the_grid_ends_in_a_newline(model, image):
    assert image.n_visual == len(image.features) == N == 52
    assert image.n_patches == N - 4
    assert image.row_end.tolist() == [-1] * 16 + [end for end in NEWLINES for _ in range(9)]
    base, *tiles = model.views(image)
    assert torch.equal(base, torch.arange(16).view(4, 4))
    assert [view.tolist() for view in tiles] == [
        [[16, 17, 18, 19], [25, 26, 27, 28]], [[20, 21, 22, 23], [29, 30, 31, 32]],   # upper tiles
        [[34, 35, 36, 37], [43, 44, 45, 46]], [[38, 39, 40, 41], [47, 48, 49, 50]]]   # lower tiles


def test_where_a_token_lies_in_the_picture(model, image):
    """A patch of the base view is 25 x 15 pixels of the picture, one of a tile 12.5 x 12.4.

    68 pixels of the canvas are 60 of the picture; row 2 of the canvas begins at 28 - 22 = 6.
    """
    at, down = model.cells(image), 60 / 68
    assert at[[0, 5]].tolist() == [[0, 0, 25, 15], [25, 15, 50, 30]]
    expected = torch.tensor([[0, 6 * down, 12.5, 20 * down], [87.5, 48 * down, 100, 62 * down]])
    assert torch.allclose(at[[16, 50]], expected, atol=1e-4)
    assert (at[NEWLINES] == 0).all()
    assert model.padding(image, torch.tensor(NEWLINES)) == 0


def test_a_picture_so_long_that_its_rows_round_to_none_is_a_base_view_alone(model):
    long = model.encode_image(noise(900, 7))
    assert long.n_visual == 16 and len(model.views(long)) == 1
    assert model.ground(long, "the man", keep=4).visual_tokens == 4


def test_logits_depend_on_the_size_of_the_picture_and_a_wrong_one_is_refused(model, pixels):
    ids = model.prompt("the man")
    assert model(ids, pixels, size=SIZE).shape == (len(ids) - 1 + N, 640)
    with pytest.raises(NanogapError, match="3 squares, and pixel_values holds 5: give its "):
        model(ids, pixels)
    square = model.prepare_image(noise(56, 56))
    assert model(ids, square).shape == model(ids, square, size=(56, 56)).shape


def test_keeping_everything_is_no_pruning_bit_for_bit(model, pixels):
    ids = model.prompt("the man")
    for mode in gap.MODES:
        everything = model(ids, pixels, torch.arange(N), mode, size=SIZE)
        assert torch.equal(everything, model(ids, pixels, size=SIZE))


@pytest.mark.parametrize("ranked, closed", [
    # a patch of each view: 24 closes the row of 17, 33 that of 29, 42 that of 34, 51 that of 50
    ([5, 17, 29, 34, 50], [5, 17, 24, 29, 33, 34, 42, 50, 51]),
    # in order of rank: 18 and 16 share a row, and the base view has no rows to close
    ([18, 50, 3, 16, 40], [18, 50, 51, 3, 16, 24, 40, 42])])
def test_a_newline_stands_behind_the_last_patch_of_its_row(image, ranked, closed):
    assert close_rows(ranked, image.row_end.tolist()) == closed


def of_each_part(image: EncodedTiles, keep: Tensor) -> list[int]:
    return [len(set(keep.tolist()) & set(view.flatten().tolist())) for view in image.views]


def test_each_view_has_its_share_of_the_budget_and_newlines_are_not_counted(model, image):
    """12 of 48: 4 of the base view's 16 patches, and 2 of the 8 that are left of each tile."""
    assert shared_out(12, [16, 8, 8, 8, 8]) == [4, 2, 2, 2, 2]
    result = model.ground(image, "the man", "cls_attention", 12, "gap")
    assert of_each_part(image, result.keep) == [4, 2, 2, 2, 2]
    best = set()
    for part, view, share in zip(image.parts, image.views, [4, 2, 2, 2, 2], strict=True):
        scores = part.fields["cls_attention"].mean(0)
        best |= set(view.flatten()[scores.argsort(descending=True)[:share]].tolist())
    newlines = set(image.row_end[sorted(best)].tolist()) - {-1}
    assert set(result.keep.tolist()) == best | newlines
    assert result.visual_tokens == len(result.keep) == 12 + len(newlines)


def test_views_may_share_equally_as_published_codes_have_it(model, image):
    assert shared_out(12, [16, 8, 1], equally=True) == [6, 5, 1]  # what one cannot hold goes round
    result = model.ground(image, "the man", "cls_attention(crops=equal)", 15)
    assert of_each_part(image, result.keep) == [3, 3, 3, 3, 3]


@pytest.mark.parametrize("size, of_160, of_320", [
    ((640, 300), 12, 6), ((640, 480), 18, 10), ((300, 1000), 28, 18)])
def test_what_newlines_cost_in_the_real_model(size: tuple[int, int], of_160: int, of_320: int):
    canvas, _, _ = HUB.number(*size)
    rows = (canvas >= 0).nonzero()[:, 0]                                      # of each patch
    rows = torch.cat([torch.full((576,), -1), rows])
    for budget, percent in ((160, of_160), (320, of_320)):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:budget]
        newlines = len(set(rows[chosen].tolist()) - {-1})
        assert round(100 * newlines / (budget + newlines)) == percent


def test_a_strategy_sees_each_tile_as_the_tower_saw_it_alone(model, image, pixels):
    """The upper right tile's own CLS, and of its patches the lower two rows."""
    names = ("cls", "cls_attention", "keys", "last_queries", "last_keys", "projected")
    seen = model.see(image.parts[2], names, "the man")
    before, after = model.vision_tower(pixels[2:3])
    alone = model.vision_tower.fields(before[0], after[0], names)
    with_cls = [0, *range(9, 17)]
    expected = {
        "cls": alone["cls"], "cls_attention": alone["cls_attention"][:, 8:],
        "keys": alone["keys"][8:], "last_queries": alone["last_queries"][with_cls],
        "last_keys": alone["last_keys"][with_cls], "projected": model.project(after[0, 9:])}
    assert seen.rows * seen.columns == len(seen.features) == 8
    for name, value in expected.items():
        assert torch.allclose(seen.fields[name], value, atol=1e-5), name


def test_boxes_are_said_in_the_padded_square(model):
    box = (0.1, 0.3, 0.6, 0.7)
    assert model.to_pixels(box, *SIZE) == pytest.approx((10, 10, 60, 50))
    assert model.frame.from_pixels((10, 10, 60, 50), *SIZE) == pytest.approx(box)


def test_a_mistral_is_asked_in_its_own_template(tmp_path: Path):
    model = nanogap.load(write_checkpoint(tmp_path, tiny_next_config("mistral")), "cpu")
    assert model.template == TEMPLATES["mistral"]
    before, after = model.template.around(model.question("the man on the left"))
    assert before + "<image>" + after == (
        "[INST] <image>\nPlease provide the bounding box coordinate of the region this sentence "
        "describes: the man on the left. [/INST]")
    before, _ = TEMPLATES["llama"].around("?")
    assert before.startswith("A chat between a curious human and") and before.endswith(" USER: ")
    assert model.follow("Why?") == "[INST] Why? [/INST]"


def test_explain_shows_views_rows_and_newlines(model, image, capsys):
    """Kept: 5 of the base view, 17 and 29 of the upper tiles, and newlines 24 and 33."""
    keep = torch.tensor([5, 17, 24, 29, 33])
    explain(model, image, "the man", {
        "gap": model.ground(image, "the man", keep=keep, mode="gap", max_new_tokens=3)})
    said = capsys.readouterr().out
    for lines in (
            "canvas of 112 x 112, cut into tiles:\n   pixel_values (5, 3, 56, 56)\n",
            "of the tiles 4 x 8 patches show more than black, and a\n"
            "   newline closes each row: N = 16 + 4 x (8 + 1) = 52\n",
            "   3 of 48 patches, and 2 of 4 newlines (/), stay:\n"
            "   view 1 of 5\n      . . . .\n      . # . .\n      . . . .\n      . . . .\n"
            "   view 2 of 5\n      . # . .\n      . . . .\n"
            "   view 3 of 5\n      . . . . /\n      # . . . /\n"
            "   view 4 of 5\n      . . . .\n      . . . .\n"
            "   view 5 of 5\n      . . . . .\n      . . . . .\n",
            "| K = 5 kept | A = "):
        assert lines in said


@pytest.mark.parametrize("decoder", ["llama", "mistral"])
def test_what_is_saved_is_read_again(decoder: str, tmp_path: Path):
    config = tiny_next_config(decoder, num_key_value_heads=2, rope_theta=1e6)
    config = replace(config, image_grid_pinpoints=((56, 112), (112, 112)), other_ends=(5,))
    read = nanogap.load(write_checkpoint(tmp_path / "first", config), "cpu")
    save(tmp_path / "again", read, torch.float32)
    again = nanogap.load(tmp_path / "again", "cpu")
    assert again.config == read.config == config
    assert again.frame == Tiles(pinpoints=config.image_grid_pinpoints, size=56, grid=4)
    for name, value in read.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
