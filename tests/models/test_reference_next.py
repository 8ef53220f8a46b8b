"""LLaVA-1.6 against transformers': from stored numbers everywhere, and live where it is installed.

The same tolerance as for LLaVA-1.5: see test_reference.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import nanogap
from nanogap.image import to_pixel_values
from nanogap.models.llava_next import GRIDS, LlavaNext, Tiles
from tests.models.test_reference import (
    Answer,
    Layout,
    assert_same,
    assert_same_answer,
    assert_stored,
    live,
)
from tests.models.test_reference import our_answer as our_answer_to
from tests.reference.make_next import (
    CASES,
    KEEP,
    OUTPUTS,
    PRUNED,
    S,
    asked,
    noise,
    places,
    sample,
    their_picture,
)
from tests.reference.make_reference import NEW_TOKENS, PROMPT, load_theirs, their_pruned_answer
from tests.tiny import tiny_next_config, write_checkpoint


def our_answer(model: LlavaNext, image: Image.Image, keep: list[int] | None = None,
               mode: str = "full", by_hand: Layout | None = None) -> Answer:
    """Logits (T, V) of the whole prompt, and the greedy words after it."""
    return our_answer_to(model, PROMPT, model.prepare_image(image), keep, mode, NEW_TOKENS,
                         by_hand, image.size)


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(OUTPUTS.read_text())


@pytest.mark.parametrize("name", CASES)
def test_pictures_of_all_shapes_give_what_transformers_gave(
        name: str, stored: dict, tmp_path: Path):
    size, decoder, layout, differs = CASES[name]
    folder = write_checkpoint(tmp_path, tiny_next_config(decoder, **differs), layout)
    model, expected = nanogap.load(folder, "cpu"), stored["cases"][name]
    image = noise(*size)
    assert_same(sample(model.prepare_image(image)), expected["pixels"])
    assert model.encode_image(image).n_visual == expected["N"]
    T = len(PROMPT) - 1 + expected["N"]
    answer = our_answer(model, image)
    assert len(answer[0]) == T
    assert_stored(answer, places(T), expected)


@pytest.mark.parametrize("mode", PRUNED)
def test_a_pruned_prompt_gives_what_transformers_gave_at_position_ids_written_by_hand(
        mode: str, stored: dict, tmp_path: Path):
    model = nanogap.load(write_checkpoint(tmp_path, tiny_next_config()), "cpu")
    answer = our_answer(model, noise(100, 60), KEEP, mode, PRUNED[mode])
    assert len(answer[0]) == 5 + 9 + 6
    assert_stored(answer, [5, 19], stored["pruned"][mode])


@live
@pytest.mark.parametrize("size", [
    (640, 480), (427, 640), (900, 300), (336, 336), (250, 700), (37, 23), (1, 500), (900, 7),
    (2000, 500)])
def test_pixel_values_are_those_of_the_hubs_processor_bit_for_bit(size: tuple[int, int]):
    """At full size: the canvas, the tiles in their order, the base view first."""
    frame = Tiles(pinpoints=tuple((rows * 336, columns * 336) for rows, columns in GRIDS))
    ours = torch.cat([to_pixel_values(view) for view in frame.views(noise(*size))])
    theirs = their_picture(noise(*size), 336)["pixel_values"][0]
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-6


@live
def test_every_logit_of_every_shape_is_that_of_transformers(tmp_path: Path):
    folder = write_checkpoint(tmp_path, tiny_next_config())
    ours, theirs = nanogap.load(folder, "cpu"), load_theirs(folder)
    for size in [(100, 60), (60, 100), (56, 56), (20, 10), (33, 100), (300, 57), (113, 112),
                 (57, 3), (1, 90), (90, 1), (111, 222)]:
        N, _, *expected = asked(theirs, noise(*size))
        answer = our_answer(ours, noise(*size))
        assert len(answer[0]) == len(PROMPT) - 1 + N
        assert_same_answer(answer, expected)


@live
@pytest.mark.parametrize("mode", PRUNED)
def test_a_pruned_prompt_is_what_transformers_makes_of_the_same_tokens_at_the_same_ids(
        mode: str, tmp_path: Path):
    folder = write_checkpoint(tmp_path, tiny_next_config("mistral", num_key_value_heads=2))
    picture = their_picture(noise(100, 60))
    assert_same_answer(
        our_answer(nanogap.load(folder, "cpu"), noise(100, 60), KEEP, mode),
        their_pruned_answer(load_theirs(folder), PROMPT, picture["pixel_values"], *PRUNED[mode],
                            NEW_TOKENS, image_sizes=picture["image_sizes"]))


@live
@pytest.mark.parametrize("decoder", ["llama", "mistral"])
def test_what_transformers_saves_again_gives_the_same_logits_bit_for_bit(
        decoder: str, tmp_path: Path):
    """Its model, and its processor's settings beside the tokenizer."""
    from transformers import LlavaNextImageProcessorPil
    first, again = tmp_path / "first", tmp_path / "again"
    write_checkpoint(first, tiny_next_config(decoder), "a", 2)
    load_theirs(first).save_pretrained(again)
    shutil.copy(first / "tokenizer.json", again)
    LlavaNextImageProcessorPil.from_pretrained(first).save_pretrained(again)
    found = json.loads((again / "preprocessor_config.json").read_text())
    assert found["size"] == {"shortest_edge": S}
    assert found["image_grid_pinpoints"] == [[rows * S, columns * S] for rows, columns in GRIDS]
    before, after = (nanogap.load(folder, "cpu") for folder in (first, again))
    assert after.frame == before.frame
    assert after.template == before.template
    assert torch.equal(*(our_answer(model, noise(100, 60))[0] for model in (before, after)))
