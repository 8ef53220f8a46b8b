"""LLaVA-1.6 against transformers': from stored numbers everywhere, and live where it is installed.

The same tolerance as for LLaVA-1.5: see test_reference.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import nanogap
from nanogap import gap
from nanogap.image import to_pixel_values
from nanogap.models.frames import Tiles
from nanogap.models.llava_next import GRIDS, LlavaNext
from tests.models.test_reference import assert_same, assert_stored, live
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
from tests.reference.make_reference import (
    NEW_TOKENS,
    PROMPT,
    load_theirs,
    their_pruned_answer,
)
from tests.tiny import LAYOUTS, tiny_next_config, write_checkpoint

SIZES = [(640, 480), (427, 640), (900, 300), (336, 336), (250, 700), (37, 23), (1, 500), (900, 7),
         (2000, 500)]


def our_answer(model: LlavaNext, image: Image.Image, keep: list[int] | None = None,
               mode: str = "full") -> tuple[Tensor, list[int]]:
    """Logits (T, V) of the whole prompt, and the greedy words after it."""
    return our_answer_to(model, PROMPT, model.prepare_image(image), keep, mode, size=image.size)


# ----- stored numbers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(OUTPUTS.read_text())


@pytest.mark.parametrize("name", CASES)
def test_pictures_of_all_shapes_give_what_transformers_gave(name: str, stored: dict,
                                                            tmp_path: Path):
    size, decoder, layout, differs = CASES[name]
    folder = write_checkpoint(tmp_path, tiny_next_config(decoder, **differs), layout)
    model, expected = nanogap.load(folder, "cpu"), stored["cases"][name]
    image = noise(*size)
    assert_same(sample(model.prepare_image(image)), expected["pixels"])
    assert model.encode_image(image).n_visual == expected["N"]
    logits, words = our_answer(model, image)
    assert len(logits) == len(PROMPT) - 1 + expected["N"]
    assert_stored(logits[places(len(logits))], words, expected)


@pytest.mark.parametrize("mode", PRUNED)
def test_a_pruned_prompt_gives_what_transformers_gave_at_position_ids_written_by_hand(
        mode: str, stored: dict, tmp_path: Path):
    model = nanogap.load(write_checkpoint(tmp_path, tiny_next_config()), "cpu")
    logits, words = our_answer(model, noise(100, 60), KEEP, mode)
    assert logits.shape == (5 + 9 + 6, 640)
    assert_stored(logits[[5, 19]], words, stored["pruned"][mode])
    order, by_hand = PRUNED[mode]
    layout = gap.lay_out(torch.tensor(KEEP), 5, 52, 6, mode)
    assert layout.kept.tolist() == order
    assert (layout.position_ids.tolist(), layout.next_position) == (by_hand, by_hand[-1] + 1)


def test_the_stored_numbers_differ_from_case_to_case_and_from_mode_to_mode(stored: dict):
    outputs = [*stored["cases"].values(), *stored["pruned"].values()]
    sums = [output["absolute_sums"][-1] for output in outputs]
    assert len(sums) == 12 and len(set(sums)) == 12


# ----- transformers, live -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@live
@pytest.mark.parametrize("size", SIZES)
def test_pixel_values_are_those_of_the_hubs_processor_bit_for_bit(transformers, size):
    """At full size: the canvas, the tiles in their order, the base view first."""
    frame = Tiles(pinpoints=tuple((rows * 336, columns * 336) for rows, columns in GRIDS))
    ours = torch.cat([to_pixel_values(view) for view in frame.views(noise(*size), 336)])
    theirs = their_picture(noise(*size), 336)["pixel_values"][0]
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-6


@live
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_read_every_layout_single_and_sharded(transformers, layout: str, shards: int,
                                                   tmp_path: Path):
    config = tiny_next_config("mistral", num_key_value_heads=2, rope_theta=1e6)
    folder = write_checkpoint(tmp_path, config, layout, shards, seed=3)
    image = noise(100, 60)
    logits, words = our_answer(nanogap.load(folder, "cpu"), image)
    _, _, expected, expected_words = asked(load_theirs(folder), image)
    assert_same(logits, expected)
    assert words == expected_words


@live
def test_every_logit_of_every_shape_is_that_of_transformers(transformers, tmp_path: Path):
    folder = write_checkpoint(tmp_path, tiny_next_config())
    ours, theirs = nanogap.load(folder, "cpu"), load_theirs(folder)
    for size in [(100, 60), (60, 100), (56, 56), (20, 10), (33, 100), (300, 57), (113, 112),
                 (57, 3), (1, 90), (90, 1), (111, 222)]:
        image = noise(*size)
        N, _, expected, expected_words = asked(theirs, image)
        logits, words = our_answer(ours, image)
        assert len(logits) == len(PROMPT) - 1 + N
        assert_same(logits, expected)
        assert words == expected_words


@live
@pytest.mark.parametrize("mode", PRUNED)
def test_a_pruned_prompt_is_what_transformers_makes_of_the_same_tokens_at_the_same_ids(
        transformers, mode: str, tmp_path: Path):
    folder = write_checkpoint(tmp_path, tiny_next_config("mistral", num_key_value_heads=2))
    order, ids = PRUNED[mode]
    logits, words = our_answer(nanogap.load(folder, "cpu"), noise(100, 60), KEEP, mode)
    picture = their_picture(noise(100, 60))
    expected, expected_words = their_pruned_answer(
        load_theirs(folder), PROMPT, picture["pixel_values"], order, ids, NEW_TOKENS,
        image_sizes=picture["image_sizes"])
    assert_same(logits, expected)
    assert words == expected_words


@live
@pytest.mark.parametrize("decoder", ["llama", "mistral"])
def test_what_transformers_saves_again_gives_the_same_logits_bit_for_bit(
        transformers, decoder: str, tmp_path: Path):
    first = write_checkpoint(tmp_path / "first", tiny_next_config(decoder), "a", 2)
    load_theirs(first).save_pretrained(tmp_path / "again")
    their_processor(first, tmp_path / "again")
    before, after = (nanogap.load(folder, "cpu") for folder in (first, tmp_path / "again"))
    assert after.config.pinpoints == before.config.pinpoints
    assert after.template == before.template
    assert torch.equal(*(our_answer(model, noise(100, 60))[0] for model in (before, after)))


def their_processor(source: Path, folder: Path) -> None:
    """The tokenizer, and the processor's settings as transformers writes them."""
    from transformers import LlavaNextImageProcessorPil
    shutil.copy(source / "tokenizer.json", folder)
    LlavaNextImageProcessorPil.from_pretrained(source).save_pretrained(folder)
    found = json.loads((folder / "preprocessor_config.json").read_text())
    assert found["size"] == {"shortest_edge": S}
    assert found["image_grid_pinpoints"] == [[rows * S, columns * S] for rows, columns in GRIDS]
