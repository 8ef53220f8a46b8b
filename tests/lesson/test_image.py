"""Pixels: any picture becomes the square that the model sees, and boxes find their way back.

A 400 x 200 picture in its 400 x 400 square has 100 rows of padding above and below:

    square (0, 0.25) .. (1, 0.75)   =   picture (0, 0) .. (400, 200)
"""

from pathlib import Path

import pytest
import torch
from PIL import Image

from nanogap.errors import ItemError
from nanogap.image import FORMATS, PAD_COLOUR, Pad, iou, open_image, to_pixel_values

ORANGE = (200, 100, 50)
PAD = Pad()


# ----- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, colour, seen", [
    ("RGB", ORANGE, ORANGE),
    ("RGBA", (*ORANGE, 255), ORANGE),
    ("RGBA", (*ORANGE, 0), (122, 116, 104)),         # transparent: the padding colour
    ("RGBA", (222, 16, 104, 128), (172, 66, 104)),   # half: half way between the two
    ("LA", (77, 0), (122, 116, 104)),
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("I;16", 40000, (156, 156, 156)),                # 40000 / 256
    ("CMYK", (0, 0, 255, 0), (255, 255, 0)),
])
def test_every_kind_of_pixel_becomes_rgb(mode: str, colour: object, seen: tuple[int, ...],
                                         tmp_path: Path):
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    Image.new(mode, (3, 2), colour).save(path)
    image = open_image(path)
    assert (image.mode, image.size, image.getpixel((2, 1))) == ("RGB", (3, 2), seen)


def test_a_palette_is_looked_up_and_its_transparent_entry_is_padding(tmp_path: Path):
    image = Image.new("P", (2, 1))
    image.putpalette([*ORANGE, 10, 20, 30])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "holes.png", transparency=1)
    opaque, holes = open_image(tmp_path / "opaque.png"), open_image(tmp_path / "holes.png")
    assert [opaque.getpixel((x, 0)) for x in (0, 1)] == [ORANGE, (10, 20, 30)]
    assert [holes.getpixel((x, 0)) for x in (0, 1)] == [ORANGE, PAD_COLOUR]


Turn = Image.Transpose
STORED = [None, Turn.FLIP_LEFT_RIGHT, Turn.ROTATE_180, Turn.FLIP_TOP_BOTTOM, Turn.TRANSPOSE,
          Turn.ROTATE_90, Turn.TRANSVERSE, Turn.ROTATE_270]     # how orientations 1 to 8 store it


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright_unless_it_is_asked_for_as_stored(
        orientation: int, kind: str, tmp_path: Path):
    """Annotations are about stored pixels.  Upright: 24 x 16, light in the corner above left."""
    upright, turn = Image.new("L", (24, 16), 0), STORED[orientation - 1]
    upright.paste(255, (0, 0, 8, 8))
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.convert("RGB").save(tmp_path / "photo", kind, exif=exif)
    turned, as_stored = (open_image(tmp_path / "photo", upright=way) for way in (True, False))
    for image, expected in ((turned, upright), (as_stored, stored)):
        light = image.convert("L").point(lambda level: 255 * (level > 127))
        assert (light.size, light.tobytes()) == (expected.size, expected.tobytes())
        assert open_image(image).tobytes() == image.tobytes()   # and is not turned a second time
    with Image.open(tmp_path / "photo") as lazy:
        assert open_image(lazy).tobytes() == open_image(lazy).tobytes() == turned.tobytes()


def test_an_animation_shows_its_first_frame(tmp_path: Path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore:IM image format")
@pytest.mark.parametrize("kind", ["EPS", "PDF", "PCX", "SGI", "TGA", "DDS", "ICO", "XBM", "IM"])
def test_what_is_no_photographic_format_is_not_even_begun(kind: str, tmp_path: Path, monkeypatch):
    """Whatever its name says; Pillow would let Ghostscript run an EPS file."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript"))
    assert kind not in FORMATS
    path = tmp_path / "picture.jpg"
    Image.new("1" if kind == "XBM" else "RGB", (16, 16)).save(path, kind)
    with pytest.raises(ItemError, match="cannot be read as an image .cannot identify image file"):
        open_image(path)


@pytest.mark.parametrize("name, why", [
    ("missing.jpg", "No such file or directory"), (".", "Is a directory"),
    ("empty.jpg", "cannot identify image file"), ("words.jpg", "cannot identify image file"),
    ("half.jpg", "image file is truncated"), ("whole.jpg/inside.jpg", "Not a directory")])
def test_a_file_that_is_no_picture_is_one_line_that_names_it(name: str, why: str, tmp_path: Path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "words.jpg").write_bytes(b"not a picture")
    with pytest.raises(ItemError) as error:
        open_image(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name} cannot be read as an image ({why}")
    assert str(error.value).endswith("give the path of a whole JPEG or PNG file, such as image.jpg")


@pytest.mark.parametrize("thing", [None, 7, [1, 2], torch.zeros(3, 9, 9), object()],
                         ids=lambda thing: type(thing).__name__)
def test_what_is_neither_an_image_nor_a_path_is_one_line_too(thing: object):
    with pytest.raises(ItemError, match="cannot be read as an image .*; give the path of a whole"):
        open_image(thing)


@pytest.mark.parametrize("mode, size", [("F", (4, 4)), ("I", (4, 4)), ("RGB", (0, 4))])
def test_levels_of_which_no_one_can_say_what_is_white_are_rejected(mode: str, size: tuple):
    with pytest.raises(ItemError, match=f"pixels of mode {mode}; save it with 8 bits a channel"):
        open_image(Image.new(mode, size))


def test_broken_exif_turns_nothing():
    image = Image.new("RGB", (3, 2), ORANGE)
    image.info["exif"] = b"Exif\0\0II*\0"
    assert open_image(image).size == (3, 2)


# ----- the square ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size, corner", [((4, 2), (0, 1)), ((2, 4), (1, 0)), ((3, 2), (0, 0)),
                                          ((5, 2), (0, 1)), ((3, 3), (0, 0))])
def test_a_picture_stands_in_the_middle_of_a_square_of_the_frames_colour(
        size: tuple[int, int], corner: tuple[int, int]):
    side, (left, top) = max(size), corner
    inside = {(x, y) for x in range(left, left + size[0]) for y in range(top, top + size[1])}
    for pad, colour in ((PAD, (122, 116, 104)), (Pad((7, 8, 9)), (7, 8, 9))):
        square = pad.square(Image.new("RGB", size, ORANGE))
        assert square.size == (side, side)
        for at in ((x, y) for x in range(side) for y in range(side)):
            assert square.getpixel(at) == (ORANGE if at in inside else colour)


def test_pixel_values_are_normalised_with_clips_mean_and_deviation():
    values = to_pixel_values(PAD.fit(Image.new("RGB", (40, 20), "white"), 56))
    assert values.shape == (1, 3, 56, 56)
    # white, (1 - mean) / deviation; and padding, which is nearly the mean itself
    assert values[0, :, 28, 28].tolist() == pytest.approx([1.9303, 2.0749, 2.1459], abs=1e-4)
    assert values[0, :, 0, 28].tolist() == pytest.approx([-0.0113, -0.0112, -0.0013], abs=1e-4)


def test_a_model_may_have_a_mean_and_deviation_of_its_own():
    values = to_pixel_values(Image.new("RGB", (8, 8), (0, 51, 255)), (0.5,) * 3, (0.25,) * 3)
    assert values[0, :, 3, 5].tolist() == pytest.approx([-2.0, -1.2, 2.0])


def test_resizing_is_bicubic_which_overshoots_at_an_edge():
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    image.paste((200, 200, 200), (4, 0, 8, 8))
    levels = to_pixel_values(PAD.fit(image, 32), (0.0,) * 3, (1.0,) * 3)[0, 0, 16] * 255
    assert (levels.min().item(), levels.max().item()) == pytest.approx((93, 207), abs=1)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 5000), (5000, 1), (20000, 300), (1, 20000), (20000, 1)])
def test_the_most_extreme_picture_fits_the_model(size: tuple[int, int]):
    values = to_pixel_values(PAD.fit(Image.new("RGB", size, "white"), 56))
    assert values.shape == (1, 3, 56, 56) and bool(torch.isfinite(values).all())


# ----- boxes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, box, pixels", [
    ((400, 200), (0.25, 0.5, 0.75, 0.625), (100, 100, 300, 150)),    # wide: without what is above
    ((200, 400), (0.5, 0.25, 0.625, 0.75), (100, 100, 150, 300)),    # tall: without what is left
    ((400, 200), (0, 0, 1, 1), (0, 0, 400, 200)),
    ((400, 200), (0, 0, 1, 0.2), (0, 0, 400, 0))])                   # in the padding: no area left
def test_a_box_loses_the_padding_and_is_clipped_to_the_picture(size: tuple, box: tuple,
                                                              pixels: tuple):
    assert PAD.to_pixels(box, *size) == pixels


@pytest.mark.parametrize("a, b, value", [
    ((0, 0, 4, 4), (0, 0, 4, 4), 1.0),
    ((0, 0, 4, 4), (4, 0, 8, 4), 0.0),               # side by side
    ((0, 0, 4, 4), (5, 5, 8, 8), 0.0),               # apart in both directions
    ((0, 0, 4, 4), (2, 0, 6, 4), 8 / 24),
    ((0, 0, 4, 4), (1, 1, 3, 3), 4 / 16),            # one inside the other
    ((0.5, 0, 1, 1), (0, 0, 1, 1), 0.5),             # continuous: no pixel is added to a side
    ((2, 2, 2, 2), (2, 2, 2, 2), 0.0),               # empty
])
def test_iou_is_the_shared_area_over_the_whole(a: tuple, b: tuple, value: float):
    assert iou(a, b) == iou(b, a) == pytest.approx(value)
