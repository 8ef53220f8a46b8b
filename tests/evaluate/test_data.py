"""Every published form of annotations becomes the same thing, and what is broken is named."""

import json
import os
import pickle
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from nanogap.errors import NanogapError
from nanogap.evaluate.data import Data, read_data

NAME = "COCO_train2014_000000000007"
SIZE = {"width": 40, "height": 30}

# One image, two things: a man at 10..20 x 5..25 with two expressions, a dog at 22..38 x 9..19.
SAID = [("the man", [10, 5, 20, 25]), ("man on left", [10, 5, 20, 25]), ("a dog", [22, 9, 38, 19])]


def by_side(box: list) -> list:
    """x1 y1 x2 y2 -> x y width height."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


MINIGPT = [{"img_id": f"{NAME}_{i}", "sents": said, "bbox": by_side(box), **SIZE}
           for i, (said, box) in enumerate(SAID)]
SHIKRA = [{"img_path": f"{NAME}.jpg", "expression": said, "bbox": box, "dataset_name": "x", **SIZE}
          for said, box in SAID]
QWEN = [{"image": f"data/coco/train2014/{NAME}.jpg", "sent": said, "bbox": box, **SIZE}
        for said, box in SAID]
VLM_R1 = [{"image": f"coco/train2014/{NAME}.jpg", "problem": f"Please provide ... {said}.",
           "normal_caption": said, "solution": box, "normalized_solution": [0, 0, 999, 999], **SIZE}
          for said, box in SAID]
LMMS_LAB = [{"question_id": "1", "bbox": by_side(SAID[0][1]), "answer": ["the man", "man on left"],
             "file_name": f"{NAME}_3.jpg", "iscrowd": 0},
            {"question_id": "2", "bbox": by_side(SAID[2][1]), "answer": ["a dog"],
             "file_name": f"{NAME}.jpg", "iscrowd": 0}]
OWN = [{"image": f"{NAME}.jpg", "expression": said, "box": box} for said, box in SAID]
REFS = [{"ref_id": 1, "ann_id": 71, "image_id": 7, "split": "val", "file_name": "COCO_7_71.jpg",
         "sentences": [{"sent_id": 100, "sent": "the man", "raw": "THE MAN!", "tokens": []},
                       {"sent_id": 101, "sent": "man on left", "raw": "Man left", "tokens": []}]},
        {"ref_id": 2, "ann_id": 72, "image_id": 7, "split": "testA", "file_name": "COCO_7_72.jpg",
         "sentences": [{"sent_id": 102, "sent": "a dog", "raw": "A DOG", "tokens": []}]}]
INSTANCES = {"images": [{"id": 7, "file_name": f"{NAME}.jpg", **SIZE}],
             "annotations": [{"id": 71, "bbox": [10, 5, 10, 20]},
                             {"id": 72, "bbox": [22, 9, 16, 10]}]}


def lines(entries: list[dict]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30)).save(tmp_path / f"{NAME}.jpg")
    return tmp_path


def write(folder: Path, text: str | bytes, name: str = "any.file") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refs(folder: Path, refs: object = REFS, protocol: int = 0) -> Path:
    write(folder, json.dumps(INSTANCES), "instances.json")
    return write(folder, pickle.dumps(refs, protocol))


def refused(message: str, *asked: object) -> str:
    """What is said of annotations that cannot be read."""
    with pytest.raises(NanogapError, match=message) as caught:
        read_data(*asked)
    return str(caught.value)


def told(data: Data) -> list[tuple[str, list]]:
    return [(said, list(box)) for e in data.examples for _, said, box in e.questions]


@pytest.mark.parametrize("text", [
    json.dumps(MINIGPT), lines(SHIKRA), lines(QWEN), json.dumps(VLM_R1), lines(LMMS_LAB),
    lines(OWN), json.dumps(QWEN, indent=2), "\ufeff\n" + lines(SHIKRA),
    lines(SHIKRA).encode("utf-16"),
], ids=["MiniGPT-v2", "Shikra", "Qwen", "VLM-R1", "lmms-lab", "one's own", "indented",
        "with a BOM", "PowerShell"])
def test_all_forms_say_the_same_and_the_name_of_the_file_says_nothing(folder: Path, text):
    data = read_data(write(folder, text), folder)
    assert told(data) == SAID and data.expressions == 3 and len(data.examples) == 1
    assert [id_ for e in data.examples for id_, *_ in e.questions] == ["1", "2", "3"]
    assert data.examples[0].image().size == (40, 30)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_gives_one_split_with_a_line_for_each_sentence(folder: Path, protocol: int):
    data = read_data(refs(folder, REFS, protocol), folder, "val")
    assert [(id_, said) for id_, said, _ in data.examples[0].questions] == [
        ("100", "the man"), ("101", "man on left")]
    assert data.name == "any.file val (testA 1, val 2): 2 expressions about 1 images"
    assert data.examples[0].name == f"{NAME}.jpg"           # as instances.json says, not the pickle


def test_a_split_must_be_chosen_and_the_error_lists_them(folder: Path):
    for split in (None, "test"):
        refused("choose one with --split: testA 1, val 2", refs(folder), folder, split)
    refused("holds one split only; leave --split out", write(folder, lines(QWEN)), folder, "val")


def qwen(box: str) -> str:
    return f'{{"width": 40, "height": 30, "image": "{NAME}.jpg", "sent": "x", "bbox": {box}}}'


def own(box: list, **more: object) -> str:
    return lines([*OWN, OWN[0] | {"box": box} | more])


@pytest.mark.parametrize("text, message", [
    (lines(QWEN)[:-20], r"line 3 cannot be read \(broken JSON"),
    (pickle.dumps(REFS, 0)[:-50], "is no whole pickle"),
    (pickle.dumps([os.system]), r"is refused: it names \w+\.system"),
    (pickle.dumps([1, 2]), "and instances.json beside it are not a pair of the refer API's"),
    (b"PAR1\x15\x04", "is a parquet file; write its rows, .* as lines of JSON: pandas does it"),
    ("[]", "holds no annotation"),
    (json.dumps(INSTANCES), "line 1 is an annotation of no form that is read here: MiniGPT-v2"),
    (lines(QWEN) + '{"image": "a.jpg", "sent": "x"}', "line 4 is an annotation of no form"),
    (lines(QWEN) + "5", "line 4 is an annotation of no form"),
    (own([5, 5, 9, 35]), r"line 4: the box \[5, 5, 9, 35\] is no x1, y1, x2, y2 with an area "
     r"inside its image, width and height \(40, 30\); give pixels"),
    (own([0.25, 0.2, 0.5, 0.9]), "line 4: .*; give pixels, not shares, percent or thousandths"),
    (own([5, 5, 5, 9]), r"line 4: the box \[5, 5, 5, 9\] is no x1"),
    (json.dumps([MINIGPT[0] | {"bbox": [10, 5, 0, 20]}]), "entry 1: .* is no x, y, width, height"),
    (qwen("[1, 2, NaN, 4]"), r"the box \[1, 2, nan, 4\] is no x1"),
    (lines([OWN[0] | {"width": 40}]), r"line 1: .*width and height \(40, None\)"),
    (qwen("[1, 1, 9, 9]").replace("40", '"40"'), r"width and height \('40', 30\)"),
])
def test_what_is_broken_is_one_line_that_names_the_place(folder: Path, text, message: str):
    said = refused(message, write(folder, text), folder)
    assert str(folder / "any.file") in said and "\n" not in said


def test_a_pickle_needs_the_boxes_of_instances_json(folder: Path):
    path = refs(folder)
    write(folder, '{"annotations": [], "images": []}', "instances.json")
    refused(r"are not a pair of the refer API's \(KeyError\(7\)\)", path, folder, "val")


def test_missing_images_are_named_and_all_missing_is_an_error(folder: Path):
    other = [entry | {"img_path": "COCO_train2014_000000000008.jpg"} for entry in SHIKRA]
    data = read_data(write(folder, lines(other[:2] + SHIKRA)), folder)
    assert (data.expressions, data.missing) == (5, ["COCO_train2014_000000000008.jpg"])
    assert [(e.number, len(e.questions)) for e in data.examples] == [(1, 3)]
    path = write(folder, lines(other))
    refused("none of the 1 images is in .*000008.jpg; give their folder with", path, folder)


def test_images_are_found_with_their_folders_without_them_and_under_their_names_of_2017(folder):
    deep = folder / "images" / "data" / "coco" / "train2014"
    deep.mkdir(parents=True)
    path = write(folder, lines(QWEN))
    assert not read_data(path, None).missing
    (folder / f"{NAME}.jpg").rename(deep / f"{NAME}.jpg")
    assert not read_data(path, folder / "images").missing
    (deep / f"{NAME}.jpg").rename(deep / "000000000007.jpg")
    assert not read_data(path, deep).missing


@pytest.mark.parametrize("entries", [QWEN, OWN], ids=["annotated", "that it had"])
def test_an_image_has_one_size_and_its_pixels_as_they_are_stored(folder: Path, entries: list):
    """EXIF does not turn it, for its box is in stored pixels; of another size it is another."""
    data = write(folder, lines(entries))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.linear_gradient("L").resize((40, 30))
        stored.save(folder / f"{NAME}.jpg", exif=exif)
        example, = read_data(data, None).examples
        assert example.size == example.image().size == (40, 30)
        assert example.image().getpixel((0, 0)) < example.image().getpixel((0, 29))
    Image.new("RGB", (80, 60)).save(folder / f"{NAME}.jpg")
    with pytest.raises(NanogapError, match="is 80 x 60 pixels and was annotated at 40 x 30"):
        example.image()


@pytest.mark.parametrize("img_id, stem", [
    ("COCO_val2014_000000000042_1", "COCO_val2014_000000000042"),
    ("COCO_val2014_000000000042", "COCO_val2014_000000000042"),
    ("drone_flight_07_frame_000042_1", "drone_flight_07_frame_000042")])
def test_minigpts_name_of_a_crop_is_the_pictures_and_a_number(folder: Path, img_id: str, stem: str):
    Image.new("RGB", (40, 30)).save(folder / f"{stem}.jpg")
    data = read_data(write(folder, json.dumps([MINIGPT[0] | {"img_id": img_id}])), folder)
    assert data.examples[0].name == f"{stem}.jpg"


@pytest.mark.parametrize("entries", [MINIGPT, SHIKRA, QWEN, VLM_R1, OWN])
def test_each_key_of_another_type_is_one_line_or_left_out(folder: Path, entries: list):
    for key, other in product(entries[1], [None, 7, -1, "", [], {}, [1, 2, 3, 4]]):
        path = write(folder, lines([entries[0], entries[1] | {key: other}, entries[2]]))
        try:
            data = read_data(path, folder)
            assert set(data.left_out) <= {*"2345"} and len(data.missing) <= 1
        except NanogapError as error:
            assert "line 2" in str(error)
