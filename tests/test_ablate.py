"""The cases of the ablation, worked out by hand: P = 2, N = 8 patches, A = 3, kept 5, 1, 6."""

import json
from pathlib import Path

import pytest
import torch

import nanogap
from nanogap import gap
from nanogap.evaluate import ablate
from nanogap.models.llava import Llava

ROOT = Path(__file__).resolve().parent.parent
KEPT = torch.tensor([5, 1, 6])                    # as ranked
WHOLE = torch.tensor([5, 1, 6, 0, 7, 3, 2, 4])


@pytest.fixture(scope="module")
def model() -> Llava:
    return nanogap.load(ROOT / "weights" / "mini", device="cpu", dtype="float32")


@pytest.mark.parametrize("name, order, visual, after", [
    ("raster, compact", [1, 5, 6], [2, 3, 4], [5, 6, 7]),
    ("ranked, compact", [5, 1, 6], [2, 3, 4], [5, 6, 7]),
    ("ranked, original", [5, 1, 6], [7, 3, 8], [10, 11, 12]),
    ("raster, original", [1, 5, 6], [3, 7, 8], [10, 11, 12]),
    ("compact, text not moved", [1, 5, 6], [2, 3, 4], [10, 11, 12]),
    ("original, text collides", [1, 5, 6], [3, 7, 8], [5, 6, 7]),
])
def test_pruned_cases_by_hand(name: str, order: list, visual: list, after: list):
    patches, ids, next_position = ablate.lay_out(name, 2, 8, 3, KEPT)
    assert patches.tolist() == order
    assert (ids.tolist(), next_position) == ([0, 1, *visual, *after], after[-1] + 1)


@pytest.mark.parametrize("name, visual, after", [
    ("nothing changed", [2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12]),
    ("IDs permuted", [7, 3, 8, 2, 9, 5, 4, 6], [10, 11, 12]),
    ("IDs / 4, text moved", [2, 2, 2, 2, 3, 3, 3, 3], [4, 5, 6]),
    ("IDs / 4, text not moved", [2, 2, 2, 2, 3, 3, 3, 3], [10, 11, 12]),
    ("image and text + 100", [102, 103, 104, 105, 106, 107, 108, 109], [110, 111, 112]),
    ("text collides", [2, 3, 4, 5, 6, 7, 8, 9], [6, 7, 8]),
    ("text + 100", [2, 3, 4, 5, 6, 7, 8, 9], [110, 111, 112]),
])
def test_cases_that_remove_nothing_by_hand(name: str, visual: list, after: list):
    patches, ids, next_position = ablate.lay_out(name, 2, 8, 3, WHOLE)
    assert patches.tolist() == list(range(8))
    assert (ids.tolist(), next_position) == ([0, 1, *visual, *after], after[-1] + 1)


def test_a_permuted_order_takes_the_ids_along():
    patches, ids, _ = ablate.lay_out("order permuted", 2, 8, 3, WHOLE)
    assert patches.tolist() == WHOLE.tolist() and (ids[2:10] - 2).tolist() == WHOLE.tolist()


@pytest.mark.parametrize("name, mode", [
    ("raster, compact", "shifted"), ("ranked, compact", "permuted"), ("raster, original", "gap")])
def test_three_of_the_cases_are_modes(name: str, mode: str):
    _, ids, next_position = ablate.lay_out(name, 2, 8, 3, KEPT)
    expected, position = gap.position_ids(KEPT, 2, 8, 3, mode)
    assert (ids.tolist(), next_position) == (expected.tolist(), position)


@pytest.mark.parametrize("name, mode", [
    ("nothing changed", "full"), ("raster, compact", "shifted"), ("raster, original", "gap")])
def test_and_the_model_says_in_them_what_it_says_in_those_modes(model: Llava, name: str, mode: str):
    look, expression = model.look(ROOT / "image.jpg"), "the man on the left"
    prune, keep = ("none", 144) if mode == "full" else ("random", 72)
    result = model.ground(look, expression, prune, keep, mode, seed=3)
    assert ablate.ask(model, look, expression, prune, keep, name, 3) == (result.text, result.box)


def test_moving_every_id_changes_no_logit_and_moving_the_image_and_what_follows_does(model: Llava):
    """So what "image and text + 100" changes is the distance to the text before, and that alone."""
    look = model.look(ROOT / "image.jpg")
    input_ids = model.prompt("the man on the left")
    P, A = model.around_image(input_ids)
    embeddings = model.splice(input_ids, model.multi_modal_projector(look.seen.features))

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.language_model(embeddings, ids)[0]

    (_, plain, _), (_, moved, _) = (ablate.lay_out(name, P, 144, A, torch.arange(144))
                                    for name in ("nothing changed", "image and text + 100"))
    reference = logits(plain)
    assert (logits(plain + 100) - reference).abs().max() < 1e-3 * reference.abs().max()
    assert (logits(moved) - reference)[P:].abs().max() > 1e-2 * reference.abs().max()
    assert torch.equal(logits(moved)[:P], reference[:P])
