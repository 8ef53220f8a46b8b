"""Strategies on a 4 x 4 grid: what is kept, and in which order."""

import math

import pytest
import torch

from nanogap import NanogapError
from nanogap.prune import STRATEGIES, Seen, select


def seen(features: torch.Tensor | None = None, cls: torch.Tensor | None = None,
         attention: torch.Tensor | None = None) -> Seen:
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(16, 8, generator=generator), torch.randn(8, generator=generator),
              torch.rand(2, 16, generator=generator)]
    return Seen(*[r if given is None else given for given, r in zip((features, cls, attention), random)])


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7, 12, 15, 16])
def test_every_strategy_keeps_exactly_its_budget_of_different_patches(name: str, budget: int):
    keep = select(name, seen(), budget)
    assert keep.dtype == torch.long and len(keep.unique()) == len(keep) == budget
    assert 0 <= int(keep.min()) and int(keep.max()) < 16


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_are_pure(name: str):
    given = seen()
    copies = [t.clone() for t in (given.features, given.cls, given.cls_attention)]
    assert torch.equal(select(name, given, 5, seed=3), select(name, given, 5, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(copies, (given.features, given.cls, given.cls_attention)))


def test_random_follows_its_seed_and_is_not_sorted():
    assert select("random", seen(), 8, seed=1).tolist() == select("random", seen(), 8, seed=1).tolist()
    assert select("random", seen(), 8, seed=1).tolist() != select("random", seen(), 8, seed=2).tolist()
    assert any(select("random", seen(), 8, seed=s).tolist() != sorted(select("random", seen(), 8, seed=s).tolist())
               for s in range(3))


def test_spatial_keeps_every_second_row_and_column_for_a_quarter():
    assert select("spatial", seen(), 4).tolist() == [5, 7, 13, 15]        # rows 1 and 3, columns 1 and 3


@pytest.mark.parametrize("n, stride", [(144, 2), (64, 3), (36, 4)])
def test_spatial_is_a_stride_on_the_grid_of_llava(n: int, stride: int):
    """24 x 24: 144, 64 and 36 tokens are strides of 2, 3 and 4."""
    keep = select("spatial", seen(features=torch.zeros(576, 2)), n)
    rows, columns = keep // 24, keep % 24
    assert rows.unique().diff().tolist() == columns.unique().diff().tolist() == [stride] * (24 // stride - 1)


def test_cls_attention_ranks_by_the_mean_over_heads():
    attention = torch.zeros(2, 16)
    attention[0, 3], attention[1, 3] = 0.9, 0.0        # mean 0.45
    attention[0, 11], attention[1, 11] = 0.5, 0.6      # mean 0.55
    attention[0, 6] = 0.2                              # mean 0.1
    assert select("cls_attention", seen(attention=attention), 3).tolist() == [11, 3, 6]


def test_cls_similarity_ranks_by_the_angle_to_cls():
    """Patch i stands at i * 5 degrees and is i + 1 long; CLS at 32 degrees."""
    angle = torch.arange(16) * math.radians(5)
    features = torch.stack([angle.cos(), angle.sin()], -1) * torch.arange(1, 17)[:, None]
    cls = torch.tensor([math.cos(math.radians(32)), math.sin(math.radians(32))])
    assert select("cls_similarity", seen(features, cls), 4).tolist() == [6, 7, 5, 8]


def test_ties_go_to_the_lower_index():
    assert select("cls_attention", seen(attention=torch.ones(2, 16)), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("budget", [0, -1, 17, 2.5, True])
def test_a_budget_out_of_range_is_refused(budget: object):
    with pytest.raises(NanogapError, match=rf"cannot keep {budget} of 16 visual tokens: keep from 1 to 16"):
        select("random", seen(), budget)


def test_a_strategy_without_a_rule_of_its_own_needs_a_budget():
    with pytest.raises(NanogapError, match="random needs a budget: keep from 1 to 16 visual tokens"):
        select("random", seen(), None)


def test_an_unknown_strategy_is_answered_with_the_known_ones():
    with pytest.raises(NanogapError, match="unknown strategy 'best': choose from random, spatial, "):
        select("best", seen(), 3)
