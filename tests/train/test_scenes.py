"""What is drawn, what is said of it, and that each expression means exactly one thing."""

import hashlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from PIL import Image, ImageChops, ImageDraw

from nanogap.checks.command import answer_for
from nanogap.train import scenes
from nanogap.train.drawing import paint
from nanogap.train.places import shared_area
from nanogap.train.scenes import COLOURS, KINDS, Thing, caption, scene, scene_of
from tests.tiny import lines_of

ROOT = Path(__file__).resolve().parents[2]


def at(kind: str, x: float, y: float, colour: str = "red", side: float = 20) -> Thing:
    """A square thing with its centre at (x, y)."""
    return Thing(kind, colour, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def said(*things: Thing) -> set[tuple[str, int]]:
    """Every wording of every true expression, in an image of which the long side is 100."""
    return {pair for seed in range(60) for pair in scenes.expressions(things, 100, Random(seed))}


@pytest.fixture(scope="module")
def drawn() -> list[scenes.Scene]:
    return [scene("test", i, 168) for i in range(200)]


SAID = {   # claim: (things, some of what is said, a pattern of what is never said)
    "the left one of two men is the man on the left": (
        [at("man", 20, 50), at("man", 80, 50)],
        {("the man on the left", 0), ("the left man", 0), ("man on the left", 0),
         ("the leftmost man", 0), ("the man on the right", 1), ("the rightmost man", 1)},
        "top|middle|^the man$"),
    "12 pixels of 100 further left are clear": (
        [at("man", 50, 50), at("man", 62, 50)], {("the man on the left", 0)}, "top"),
    "11 pixels are not, so nothing is said": ([at("man", 50, 50), at("man", 61, 50)], set(), ""),
    "the middle is of a row of three": (
        [at("cup", 20, 50), at("cup", 50, 55), at("cup", 80, 50)], {("the cup in the middle", 1)},
        "top"),
    "and of no column, where another one may be meant": (
        [at("cup", 20, 20), at("cup", 50, 80), at("cup", 80, 50)], {("the cup on the left", 0)},
        "middle"),
    "a kind or a colour that one alone has is a name": (
        [at("man", 20, 50, "blue"), at("car", 50, 52, "red"), at("car", 53, 50, "green")],
        {("the man", 0), ("man", 0), ("the man in blue", 0), ("the person", 0), ("the red car", 1),
         ("green car", 2)},
        "^the (car|blue man)$"),
    "bigger needs nearly twice the area: 20 x 20 against 14 x 14 is 2.04": (
        [at("ball", 50, 50), at("ball", 52, 50, side=14)],
        {("the biggest ball", 0), ("the largest ball", 0), ("the smallest ball", 1)},
        "^(?!the (biggest|largest|smallest) ball$)"),
    "a relation names the one on that side of the landmark": (
        [at("man", 20, 50), at("man", 90, 45), at("tree", 45, 50)],
        {("the man to the left of the tree", 0), ("the man right of the tree", 1),
         ("the man next to the tree", 0), ("the man by the tree", 0)}, "above"),
    "a second one on that side by one pixel makes it unclear": (
        [at("man", 20, 50), at("man", 44, 90), at("tree", 45, 50)], set(), "left of"),
    "above means more above than beside: the other is 20 below and 32 beside": (
        [at("dog", 50, 20), at("dog", 20, 80), at("car", 52, 60)], {("the dog above the car", 0)},
        "below"),
}


@pytest.mark.parametrize("things, some, never", SAID.values(), ids=SAID)
def test_what_is_said_is_clear(things: list[Thing], some: set[tuple[str, int]], never: str):
    told = said(*things)
    assert some <= told and not [text for text, _ in told if re.search(never, text)]


def test_a_caption_says_what_is_there_in_any_order():
    things = [at("man", 20, 50, "blue"), at("tree", 50, 50, "green"), at("tree", 90, 50, "green"),
              at("car", 50, 90, "orange")]
    told = {caption(things, Random(seed)) for seed in range(40)}
    assert "a man in blue, an orange car and two green trees" in told
    assert len(told) == 6  # the orders of three parts
    assert caption([at("woman", 0, 0, "red")] * 3, Random(0)) == "three women in red"


MEASURES = {   # of a box: the least is meant
    "left": lambda x1, y1, x2, y2: x1 + x2,
    "right": lambda x1, y1, x2, y2: -x1 - x2,
    "top|above": lambda x1, y1, x2, y2: y1 + y2,
    "bottom|below": lambda x1, y1, x2, y2: -y1 - y2,
    "biggest|largest": lambda x1, y1, x2, y2: (x1 - x2) * (y2 - y1),
    "smallest": lambda x1, y1, x2, y2: (x2 - x1) * (y2 - y1)}


def candidates(text: str, things: tuple[Thing, ...]) -> list[int]:
    """Which things a reader without margins could point at: written apart from scenes.py."""
    def called(noun: str) -> list[int]:
        colour = next((c for c in COLOURS if re.search(rf"\b{c}\b", noun)), None)
        kind = next(k for k in (*KINDS, "person") if re.search(rf"\b{k}\b", noun))
        return [i for i, thing in enumerate(things) if colour in (None, thing.colour)
                and thing.kind in (("man", "woman") if kind == "person" else (kind,))]

    centres = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in (one.box for one in things)]
    by = next((measure for word, measure in MEASURES.items() if re.search(word, text)), None)
    relation = re.search(" (next to|by|(to the )?(left|right) of|above|below) the ", text)
    among = called(text[:relation.start()] if relation else text)
    if relation:
        (j,) = called(text[relation.end():])
        among = [i for i in among if i != j]
        if by:
            return [i for i in among if by(*things[i].box) < by(*things[j].box)]
        return [min(among, key=lambda i: math.dist(centres[i], centres[j]))]
    if "middle" in text:
        assert len(among) == 3
        return [sorted(among, key=centres.__getitem__)[1]]
    return [min(among, key=lambda i: by(*things[i].box))] if by else among


def test_every_expression_means_the_thing_it_stands_with(drawn):
    assert sum(len(s.expressions) for s in drawn) > 6 * len(drawn)
    for s in drawn:
        assert len({text for text, _ in s.expressions}) == len(s.expressions) > 0
        for text, i in s.expressions:
            assert candidates(text, s.things) == [i], (text, s.things)


def test_two_to_seven_things_stay_inside_and_mostly_visible(drawn):
    crowd = scene("val", 9, 168)  # seven seldom find room
    assert {len(s.things) for s in (*drawn, crowd)} == {2, 3, 4, 5, 6, 7}
    for s in (*drawn, crowd):
        for thing in s.things:
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= s.image.width and 0 <= y1 < y2 <= s.image.height
            assert 0.32 * 168 <= max(x2 - x1, y2 - y1) <= 0.63 * 168
            others = [other.box for other in s.things if other is not thing]
            covered = sum(shared_area(thing.box, other) for other in others)
            assert covered <= 0.25 * (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", [(10, 12, 52, 72), (40, 30, 160, 130), (3, 5, 35, 29)])
def test_a_box_is_tight_around_what_is_drawn(kind, box):
    """The pixels that change lie inside the box and reach to within one pixel of its four sides."""
    for seed in range(4):
        plain = Image.new("RGB", (400, 300), (128, 255, 255))
        canvas = plain.copy()
        paint(ImageDraw.Draw(canvas), kind, COLOURS["red"], box, Random(seed))
        changed = ImageChops.difference(canvas.reduce(2), plain.reduce(2)).getbbox()
        x1, y1, x2, y2 = (new - old for new, old in zip(changed, box, strict=True))
        assert {x1, y1, -x2, -y2} <= {0, 1}


def test_things_and_expressions_stay_what_they_were(drawn):
    """The mini model learned from these, and tables were made of them."""
    said = repr([(s.things, s.expressions) for s in drawn])
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "770baf59c51236a7"


def test_the_command_draws_the_same_in_another_process_and_prints_what_is_true_of_it(tmp_path):
    """A string seeds Random through SHA-512; the order of a set of strings would differ."""
    words = ["-m", "nanogap.train.scenes", "test", "7", tmp_path / "out.png"]
    told = subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True,
                          env={**os.environ, "PYTHONHASHSEED": "1"}, text=True).stdout
    ours = scene("test", 7, 672)
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and image.tobytes() == ours.image.tobytes()
    assert told.splitlines() == [f"{text:40} {ours.things[i].box}" for text, i in ours.expressions]
    assert scene_of(tmp_path / "out.png") == ours


@pytest.mark.parametrize("words, message", [
    (["test", "7", "none/out.jpg"], "OUT none/out.jpg would be in a folder that does not exist"),
    (["test", "7", "out.txt"], "OUT out.txt: a picture cannot be written with that ending")])
def test_a_mistake_is_one_line(words: list[str], message: str, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert answer_for("nanogap.train.scenes", scenes.command, words) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and lines_of(err) == 1
    assert not list(tmp_path.iterdir())


def test_a_picture_with_broken_exif_is_no_scene(tmp_path):
    Image.new("RGB", (672, 504)).save(tmp_path / "x.png", exif=b"Exif\0\0no TIFF at all")
    assert scene_of(tmp_path / "x.png") is None
