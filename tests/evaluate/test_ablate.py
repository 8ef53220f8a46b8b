"""The cases of the ablation, worked out by hand: P = 2, N = 8 visual tokens, A = 3."""

import pytest
import torch

from nanogap.evaluate import ablate
from nanogap.gap import Layout
from nanogap.ground import Answer
from nanogap.llava import EncodedImage
from nanogap.models import VLM
from tests.evaluate.asking import ROOT

EXPRESSION = "the man on the left"
SHUFFLED = torch.tensor([5, 1, 6, 0, 7, 3, 2, 4])


@pytest.fixture(scope="module")
def image(mini: VLM) -> EncodedImage:
    return mini.encode_image(ROOT / "image.jpg")


@pytest.mark.parametrize("name, order, visual, after", [
    ("nothing changed", range(8), [2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12]),
    ("IDs permuted", range(8), [7, 3, 8, 2, 9, 5, 4, 6], [10, 11, 12]),
    ("order permuted", SHUFFLED.tolist(), [7, 3, 8, 2, 9, 5, 4, 6], [10, 11, 12]),
    ("IDs / 4, text moved", range(8), [2, 2, 2, 2, 3, 3, 3, 3], [4, 5, 6]),
    ("IDs / 4, text not moved", range(8), [2, 2, 2, 2, 3, 3, 3, 3], [10, 11, 12]),
    ("image and text + 100", range(8), [102, 103, 104, 105, 106, 107, 108, 109], [110, 111, 112]),
    ("text collides", range(8), [2, 3, 4, 5, 6, 7, 8, 9], [6, 7, 8]),
    ("text + 100", range(8), [2, 3, 4, 5, 6, 7, 8, 9], [110, 111, 112])])
def test_cases_by_hand(name: str, order: list, visual: list, after: list):
    layout = ablate.lay_out(name, 2, 8, 3, SHUFFLED)
    assert layout.order.tolist() == layout.kept.tolist() == list(order)
    assert layout.position_ids.tolist() == [0, 1, *visual, *after]
    assert layout.next_position == after[-1] + 1


def test_where_nothing_is_changed_the_model_says_what_it_says_in_mode_full(mini: VLM, image):
    full = mini.ground(image, EXPRESSION, mode="full")
    same = ablate.ask(mini, image, EXPRESSION, "nothing changed", 3)
    assert (same.text, same.box, same.cut_off) == (full.text, full.box, False)
    assert full.box is not None


def test_the_seed_is_that_of_the_random_order(mini: VLM, image):
    said = [ablate.ask(mini, image, EXPRESSION, "IDs permuted", seed).text for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


def test_where_the_order_is_permuted_tokens_are_fed_in_it(mini: VLM, image, monkeypatch):
    fed = {}

    def caught(model: VLM, x: torch.Tensor, layout: Layout, most: int) -> Answer:
        fed[layout.order] = x
        return Answer([2], 0.0, 0, 0)

    monkeypatch.setattr(ablate, "greedy", caught)
    for name in ("nothing changed", "order permuted"):
        ablate.ask(mini, image, EXPRESSION, name, 3)
    (_, plain), (order, permuted) = fed.items()
    P, A = mini.around_image(mini.prompt(EXPRESSION))
    assert order.tolist() != sorted(order.tolist()) == list(range(144))
    assert torch.allclose(permuted[0, P:-A], plain[0, P:-A][order], atol=1e-5)
    assert torch.equal(permuted[0, :P], plain[0, :P])
