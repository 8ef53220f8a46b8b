"""Pixels: any picture becomes the square that the model sees, and boxes find their way back.

A 400 x 200 picture in its 400 x 400 square has 100 rows of padding above and below:

    square (0, 0.25) .. (1, 0.75)   =   picture (0, 0) .. (400, 200)
"""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanogap.errors import ItemError, NanogapError
from nanogap.image import (
    FORMATS,
    PAD_COLOUR,
    Pad,
    iou,
    open_image,
    ready,
    to_pixel_values,
    to_rgb,
)

ORANGE = (200, 100, 50)
PAD = Pad()


# ----- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, colour, seen", [
    ("RGB", ORANGE, ORANGE),
    ("RGBA", (*ORANGE, 255), ORANGE),
    ("RGBA", (*ORANGE, 0), (122, 116, 104)),         # transparent: the padding colour
    ("RGBA", (222, 16, 104, 128), (172, 66, 104)),   # half: half way between the two
    ("LA", (77, 255), (77, 77, 77)),
    ("LA", (77, 0), (122, 116, 104)),
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("I;16", 40000, (156, 156, 156)),                # 40000 / 256
    ("I;16", 33000, (128, 128, 128)),
    ("I;16", 65535, (255, 255, 255)),
    ("CMYK", (0, 0, 255, 0), (255, 255, 0)),
    ("I", 40000, (156, 156, 156)),
    ("F", 77.0, (77, 77, 77)),
    ("F", 0.5, (127, 127, 127)),                     # shares of white
    ("F", 40000.0, (156, 156, 156)),
    ("F", 0.0, (0, 0, 0)),
    ("I", 77, (77, 77, 77)),
    ("I", 1, (255, 255, 255)),
    ("I", 0, (0, 0, 0)),
])
def test_every_kind_of_pixel_becomes_rgb(mode: str, colour: object, seen: tuple[int, ...],
                                         tmp_path: Path):
    path = tmp_path / ("picture.tiff" if mode in ("CMYK", "I", "F") else "picture.png")
    Image.new(mode, (3, 2), colour).save(path)
    image = open_image(path)
    assert (image.mode, image.size, image.getpixel((2, 1))) == ("RGB", (3, 2), seen)


@pytest.mark.parametrize("mode, darkest, lightest", [
    ("F", 0.0, float("nan")), ("F", float("-inf"), 1.0), ("F", 0.0, float("inf")),
    ("F", -0.1, 1.0), ("F", 0.0, 1.05), ("F", 0.0, 1e6), ("F", 0.0, 300.0), ("I", -1, 255),
    ("I", 0, 7), ("I", 0, 4000), ("I", 0, 65536), ("I", -2 ** 31, 2 ** 31 - 1)])
def test_levels_of_which_no_one_can_say_what_is_white_are_refused_and_do_not_turn_black(
        mode: str, darkest: float, lightest: float, tmp_path: Path):
    image = Image.new(mode, (3, 2), darkest)
    image.putpixel((1, 1), lightest)
    with pytest.raises(ItemError, match="which of them is white cannot be told; save it with 8"):
        ready(image)
    image.save(tmp_path / "levels.tiff")
    with pytest.raises(ItemError, match="the image has levels from"):
        open_image(tmp_path / "levels.tiff")


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


@pytest.mark.parametrize("orientation, stored", [
    (2, Turn.FLIP_LEFT_RIGHT), (3, Turn.ROTATE_180), (4, Turn.FLIP_TOP_BOTTOM), (5, Turn.TRANSPOSE),
    (6, Turn.ROTATE_90), (7, Turn.TRANSVERSE), (8, Turn.ROTATE_270)])
def test_a_photograph_is_turned_upright(orientation: int, stored: Turn, tmp_path: Path):
    upright = Image.new("RGB", (3, 2))
    upright.putdata([(value, 0, 0) for value in (10, 20, 30, 40, 50, 60)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(stored).save(tmp_path / "photo.png", exif=exif)
    image = open_image(tmp_path / "photo.png")
    assert (image.size, image.tobytes()) == ((3, 2), upright.tobytes())
    assert to_rgb(image).tobytes() == upright.tobytes()        # and is not turned a second time


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_stored_can_be_asked_for_and_is_not_turned_later(
        orientation: int, kind: str, tmp_path: Path):
    """Annotations are about stored pixels: 24 x 16, light on the left."""
    stored = Image.new("L", (24, 16), 0)
    stored.paste(255, (0, 0, 12, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.convert("RGB").save(tmp_path / "photo", kind, exif=exif)
    image = open_image(tmp_path / "photo", upright=False)
    assert image.size == ready(image).size == (24, 16)
    assert ready(image).tobytes() == image.tobytes()
    assert image.getpixel((2, 8))[0] > 200 and image.getpixel((22, 8))[0] < 50
    turned = open_image(tmp_path / "photo")
    assert turned.size == ((24, 16) if orientation < 5 else (16, 24))
    with Image.open(tmp_path / "photo") as lazy:
        assert ready(lazy).tobytes() == ready(lazy).tobytes() == turned.tobytes()


def with_exif(kind: str, exif: bytes) -> bytes:
    """A picture of 3 x 2 with this block of EXIF, spliced in as it is."""
    data = io.BytesIO()
    Image.new("RGB", (3, 2), ORANGE).save(data, kind)
    whole = data.getvalue()
    if kind == "JPEG":
        block = b"Exif\0\0" + exif
        return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + whole[2:]
    chunk = b"eXIf" + exif
    return (whole[:33] + struct.pack(">I", len(exif)) + chunk
            + struct.pack(">I", zlib.crc32(chunk)) + whole[33:])


@pytest.mark.filterwarnings("ignore")   # of Pillow's own opener, below
def test_no_broken_exif_keeps_a_whole_picture_from_being_read(tmp_path: Path):
    good = Image.Exif()
    good[0x0112], good[0x011A], good[0x010F] = 6, 72.0, "camera"
    good = good.tobytes()[6:]
    draw = random.Random("exif")
    blocks = [b"", bytes(8), b"II*\0", b"MM\0*" + b"\xff" * 8, good[:-7], good * 3]
    for _ in range(250):
        block = bytearray(good)
        for _ in range(draw.choice([1, 2, 8])):
            block[draw.randrange(len(block))] = draw.choice([0, 1, 6, 127, 255])
        blocks.append(bytes(block[:draw.choice([len(block), draw.randrange(len(block))])]))
    for kind in ("JPEG", "PNG"):
        for block in blocks:
            (tmp_path / "photo").write_bytes(with_exif(kind, block))
            image = open_image(tmp_path / "photo")
            assert sorted(image.size) == [2, 3], block
            assert open_image(tmp_path / "photo", upright=False).size == (3, 2), block
            assert ready(Image.open(tmp_path / "photo")).tobytes() == image.tobytes(), block


def test_an_animation_shows_its_first_frame(tmp_path: Path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def hollow_png(width: int, height: int) -> bytes:
    """A PNG file that says how large it is, and holds no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)


def broken_file(name: str, path: Path) -> Path:
    whole = path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    contents = {"empty.jpg": b"", "words.jpg": b"not a picture",
                "bomb.png": hollow_png(60000, 60000),
                "half.jpg": whole.read_bytes()[:900], "hollow.png": hollow_png(4, 4)}
    if name == "pipe.jpg":
        os.mkfifo(path / name)
    if name in contents:
        (path / name).write_bytes(contents[name])
    return path / name


@pytest.mark.parametrize("name, message", [
    ("missing.jpg", 'there is no image "{}"; give the path of a picture, such as image.jpg'),
    (".", "{} is a folder; give the path of one picture in it"),
    ("empty.jpg", "{} is not an image of a kind that is read here (AVIF, BMP, GIF, JPEG, "),
    ("words.jpg", "{} is not an image of a kind that is read here (AVIF, BMP, GIF, JPEG, "),
    ("pipe.jpg", "{} is no regular file; give the path of a picture"),
    ("half.jpg", "{} cannot be read as an image (image file is truncated"),
    ("hollow.png", "{} cannot be read as an image ("),
    ("whole.jpg/inside.jpg", "{} cannot be read as an image (Not a directory); give a whole JPEG"),
    ("bomb.png",
     "{} is too large to be read safely (more than 178956970 pixels); give a smaller copy"),
])
def test_a_file_that_is_no_picture_is_refused_by_name(name: str, message: str, tmp_path: Path):
    path = broken_file(name, tmp_path)
    with pytest.raises(NanogapError) as error:
        open_image(path)
    assert str(error.value).startswith(message.format(path))


@pytest.mark.filterwarnings("ignore:IM image format")
@pytest.mark.parametrize("kind", ["EPS", "PDF", "PCX", "SGI", "TGA", "DDS", "ICO", "XBM", "IM"])
def test_what_is_no_photographic_format_is_not_even_begun(kind: str, tmp_path: Path, monkeypatch):
    """Whatever its name says; Pillow would let Ghostscript run an EPS file."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript"))
    assert kind not in FORMATS
    path = tmp_path / "picture.jpg"
    Image.new("1" if kind == "XBM" else "RGB", (16, 16)).save(path, kind)
    with pytest.raises(ItemError, match="is not an image of a kind that is read here"):
        open_image(path)


@pytest.mark.parametrize("thing", [
    None, 7, b"\xff\xd8" * 9999, bytearray(9999), [1] * 9999, torch.zeros(3, 99, 99), object(),
    memoryview(bytes(9999)), {"image": "a.jpg"}, io.BytesIO(b"x" * 9999)],
    ids=lambda thing: type(thing).__name__)
def test_what_is_neither_an_image_nor_a_path_is_one_short_error(thing: object):
    with pytest.raises(ItemError) as error:
        ready(thing)
    assert str(error.value) == (
        f"an image cannot be of type {type(thing).__name__}; give a Pillow image, as "
        "Image.fromarray makes it, or the path of one")


@pytest.mark.parametrize("mode", ["empty", "closed", "torn", "La"])
def test_an_image_of_pillows_that_cannot_be_read_is_one_error_too(mode: str, tmp_path: Path):
    image = Image.new("La" if mode == "La" else "RGB", (4, 4))
    if mode == "empty":
        image = Image.new("RGB", (0, 4))
    if mode == "closed":
        image.close()
    if mode == "torn":
        image = Image.open(broken_file("half.jpg", tmp_path))
    with pytest.raises(ItemError, match="the image (cannot be read|has no pixels)"):
        ready(image)


# ----- the square ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size, corner", [((4, 2), (0, 1)), ((2, 4), (1, 0)), ((3, 2), (0, 0)),
                                          ((5, 2), (0, 1)), ((3, 3), (0, 0))])
def test_a_picture_stands_in_the_middle_of_a_square_of_the_mean_colour(
        size: tuple[int, int], corner: tuple[int, int]):
    square = PAD.square(Image.new("RGB", size, ORANGE))
    side, (left, top) = max(size), corner
    inside = {(x, y) for x in range(left, left + size[0]) for y in range(top, top + size[1])}
    assert square.size == (side, side)
    for at in ((x, y) for x in range(side) for y in range(side)):
        assert square.getpixel(at) == (ORANGE if at in inside else (122, 116, 104))


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


def test_a_frame_may_have_a_colour_of_its_own():
    square = Pad((7, 8, 9)).square(Image.new("RGB", (1, 3), ORANGE))
    assert [square.getpixel((x, 1)) for x in range(3)] == [(7, 8, 9), ORANGE, (7, 8, 9)]


def test_each_patch_shows_its_part_of_the_square():
    """400 x 200 in four patches of 200 x 200: the upper two begin 100 pixels above the picture."""
    assert PAD.cells(2, 2, 400, 200).tolist() == [
        [0, -100, 200, 100], [200, -100, 400, 100], [0, 100, 200, 300], [200, 100, 400, 300]]
    assert PAD.cells(1, 2, 100, 300).tolist() == [[-100, 0, 50, 300], [50, 0, 200, 300]]


# ----- boxes --------------------------------------------------------------------------------------


def test_a_box_in_a_wide_picture_loses_the_padding_above_it():
    assert PAD.to_pixels((0.25, 0.5, 0.75, 0.625), 400, 200) == (100.0, 100.0, 300.0, 150.0)


def test_a_box_in_a_tall_picture_loses_the_padding_to_its_left():
    assert PAD.to_pixels((0.5, 0.25, 0.625, 0.75), 200, 400) == (100.0, 100.0, 150.0, 300.0)


def test_a_box_is_clipped_to_the_picture():
    assert PAD.to_pixels((0, 0, 1, 1), 400, 200) == (0.0, 0.0, 400.0, 200.0)
    assert PAD.to_pixels((0, 0, 1, 1), 200, 400) == (0.0, 0.0, 200.0, 400.0)
    assert PAD.to_pixels((0.0, 0.0, 0.5, 0.5), 400, 200) == (0.0, 0.0, 200.0, 100.0)


def test_a_box_in_the_padding_has_no_area_left():
    assert PAD.to_pixels((0.0, 0.0, 1.0, 0.2), 400, 200) == (0.0, 0.0, 400.0, 0.0)


@pytest.mark.parametrize("width, height", [(640, 480), (480, 640), (333, 500), (501, 334), (7, 7)])
def test_a_box_comes_back_from_the_square_as_it_went_there(width: int, height: int):
    odd = (width / 3, height / 7, width / 2, height - 1)
    for box in ((0, 0, width, height), (1, 2, 3, 4), odd):
        there = PAD.from_pixels(box, width, height)
        assert all(0 <= value <= 1 for value in there)
        assert PAD.to_pixels(there, width, height) == pytest.approx(box, abs=1e-9)


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (6, 3)])
def test_boxes_live_in_the_very_square_into_which_the_picture_is_pasted(size: tuple[int, int]):
    """Pixel (1, 2) of the picture, found again in the padded one."""
    image = Image.new("RGB", size, "black")
    image.putpixel((1, 2), (255, 255, 255))
    square = PAD.square(image)
    x1, y1, x2, y2 = (round(v * square.width) for v in PAD.from_pixels((1, 2, 2, 3), *size))
    assert square.crop((x1, y1, x2, y2)).tobytes() == b"\xff\xff\xff"


@pytest.mark.parametrize("box", [(0.5, 0.1, 0.5, 0.9), (0.6, 0.1, 0.5, 0.9), (0.1, 0.9, 0.5, 0.9),
                                 (float("nan"), 0.1, 0.5, 0.9)])
def test_what_has_no_area_is_no_box(box: tuple[float, ...]):
    with pytest.raises(ValueError, match="not a box"):
        PAD.to_pixels(box, 400, 200)


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
