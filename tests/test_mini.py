"""The mini models that ship: what they say, word for word, and what pruning does to them.

The golden answers are made again by `python -m tests.test_mini`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

import nanogap
from nanogap.gap import MODES, lay_out
from nanogap.image import iou
from nanogap.models import MODELS, VLM
from nanogap.prune import Kept
from nanogap.train.scenes import COLOURS, KINDS, Cast, Scene, draw_scene, named, scene

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden_mini.json")
EXPRESSION = "the man on the left"
SHIPPED = sorted(path.name for path in (ROOT / "weights").glob("mini*"))


@pytest.fixture(scope="module")
def model() -> VLM:
    return nanogap.load(ROOT / "weights" / "mini", device="cpu", dtype="float32")


def said(name: str) -> dict[str, str]:
    model = nanogap.load(ROOT / "weights" / name, device="cpu", dtype="float32")
    image = model.encode_image(ROOT / "image.jpg")
    return {mode: model.ground(image, EXPRESSION, "random", "50%", mode).text for mode in MODES}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_golden_answers_in_each_mode(name: str):
    """One text tests tokenizer, weights, RoPE, cache, pruning and position IDs together."""
    assert said(name) == json.loads(GOLDEN.read_text())[name]


def test_every_family_ships_in_miniature():
    found = [type(nanogap.load(ROOT / "weights" / name, device="cpu")) for name in SHIPPED]
    assert sorted(found, key=str) == sorted(MODELS.values(), key=str)
    for name in SHIPPED:
        files = (ROOT / "weights" / name).rglob("*.*")
        assert sum(path.stat().st_size for path in files) < 8e6


@pytest.mark.parametrize("name", SHIPPED)
def test_gap_brings_back_what_renumbering_takes_from_every_mini(name: str):
    """Of 40 expressions, as the tables of README and tutorial say it of 500; always with a box."""
    model = nanogap.load(ROOT / "weights" / name, device="cpu", dtype="float32")
    found = {"full": 0, "gap": 0, "shifted": 0, "permuted": 0}
    boxes, asked = 0, 0
    for index in range(12):
        drawn = scene("effect", index)
        image = model.encode_image(drawn.image)
        words, things = zip(*drawn.expressions[:4], strict=True)
        for mode in found:
            for result, thing in zip(model.ground_all(image, words, "random", "50%", mode), things,
                                     strict=True):
                boxes += result.box is not None
                found[mode] += iou(result.box or (0, 0, 0, 0), drawn.things[thing].box) >= 0.5
        asked += len(words)
    assert asked >= 40 and boxes > 0.85 * asked * len(found)
    assert found["full"] > 0.7 * asked and found["gap"] > 0.6 * found["full"]
    assert max(found["shifted"], found["permuted"]) < 0.35 * found["full"]


def test_cached_generation_says_what_whole_passes_say_under_gap(model: VLM):
    image = model.encode_image(ROOT / "image.jpg")
    result = model.ground(image, EXPRESSION, "random", 36, "gap", seed=2)
    input_ids = model.prompt(EXPRESSION)
    P, A = model.around_image(input_ids)
    layout = lay_out(result.keep, P, 144, A, "gap")
    prompt = model.embed(input_ids, image, Kept(result.keep), layout.order)
    fed = torch.tensor(result.tokens[:-1])
    x = torch.cat([prompt, model.language_model.model.embed_tokens(fed)[None]], 1)
    ids = torch.cat([layout.position_ids, layout.next_position + torch.arange(len(fed))])
    logits = model.language_model(x, ids)[0, -len(result.tokens):]
    assert logits.argmax(-1).tolist() == result.tokens


def test_a_thing_that_it_does_not_know_gets_a_box_as_well(model: VLM):
    assert model.ground(ROOT / "image.jpg", "the zebra", mode="full").box


def test_the_checkpoint_has_the_published_layout(model: VLM):
    from safetensors import safe_open
    with safe_open(ROOT / "weights" / "mini" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    parts = {name.split(".")[0] for name in names}
    assert parts == {"vision_tower", "multi_modal_projector", "language_model"}
    assert "vision_tower.vision_model.pre_layrnorm.weight" in names
    assert "language_model.lm_head.weight" in names


def test_with_ids_permuted_but_nothing_removed_the_answer_changes(model: VLM):
    image = model.encode_image(ROOT / "image.jpg")
    full, permuted = (model.ground(image, EXPRESSION, "random", 144, mode).text
                      for mode in ("full", "permuted"))
    assert full != permuted


def share_found(model: VLM, cast: Callable[[Random], Cast],
                words: Callable[[Scene, int], str | None]) -> float:
    """In how many of 80 questions about 40 pictures of two things the box lies on the one meant."""
    rng, found = Random("two things"), []
    for _ in range(40):
        drawn = draw_scene(rng, 168, cast(rng))
        image = model.encode_image(drawn.image)
        for meant in (0, 1):
            if expression := words(drawn, meant):
                box = model.ground(image, expression, mode="full").box or (0, 0, 0, 0)
                shares = [iou(box, thing.box) for thing in drawn.things]
                found.append(shares[meant] > shares[1 - meant])
    assert len(found) > 60
    return sum(found) / len(found)


def test_what_it_goes_by(model: VLM):
    """More than nine of ten, as README says: two things differ in place, kind or colour alone."""
    def alike(rng: Random) -> Cast:
        kind = rng.choice([*KINDS])
        return [(kind, colour) for colour in rng.sample([*COLOURS], 2)]

    def unlike(rng: Random) -> Cast:
        colour = rng.choice([*COLOURS])
        return [(kind, colour) for kind in rng.sample([*KINDS], 2)]

    def place(drawn: Scene, meant: int) -> str | None:
        return next((words for words, thing in drawn.expressions if thing == meant
                     and {"left", "right", "top", "bottom"} & {*words.split()}), None)

    def colour(drawn: Scene, meant: int) -> str:
        return named(drawn.things[meant].kind, drawn.things[meant].colour)

    assert share_found(model, alike, place) > 0.9
    assert share_found(model, unlike, lambda drawn, meant: drawn.things[meant].kind) > 0.9
    assert share_found(model, alike, colour) > 0.9


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: said(name) for name in SHIPPED}, indent=2) + "\n")
