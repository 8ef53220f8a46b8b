"""Strategies on a 4 x 4 grid: what is kept, in which order, and what becomes of the rest.

PruMerge and TRIM are also compared, on random images, with the same in plain Python.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nanogap
from nanogap import NanogapError, prune
from nanogap.prune import (
    STRATEGIES,
    Kept,
    VisualTokens,
    budget_of,
    needs_of,
    outliers,
    ranked,
    strategy,
    without,
)
from tests.plain import (
    Plain,
    best_first,
    dot,
    plain_merge,
    plain_outliers,
    plain_softmax,
)

ROOT = Path(__file__).resolve().parents[1]


def seen(n: int = 16, seed: int = 0, rows: int | None = None, **given: Tensor) -> VisualTokens:
    """A random image of n patches, a square where rows are not given, but for the fields given."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"features": (n, 8), "cls": (8,), "cls_attention": (2, n), "keys": (n, 4),
              "last_queries": (1 + n, 8), "last_keys": (1 + n, 8), "projected": (n, 6),
              "aligned": (n, 5), "text": (5,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["cls_attention"] = made["cls_attention"].abs()
    made |= given
    rows = rows or math.isqrt(n)
    return VisualTokens(made.pop("features"), rows, n // rows, made)


def select(name: str, image: VisualTokens, budget: int | None, seed: int = 0) -> Kept:
    """Run a strategy on an image."""
    return STRATEGIES[name](image, budget, torch.Generator().manual_seed(seed))


def kept(name: str, budget: int | None, **given: Tensor) -> list[int]:
    return select(name, seen(**given), budget).ranked.tolist()


# ----- what a strategy is -------------------------------------------------------------------------


def test_the_decorator_enters_a_function_and_notes_what_it_needs():
    def mine(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
        return Kept(torch.arange(budget))

    assert strategy(needs=["cls", "keys"], finds_budget=True)(mine) is mine
    assert STRATEGIES["mine"] is mine
    assert needs_of("mine") == {"cls", "keys"} and budget_of(None, 16, "mine") is None


def test_a_function_in_the_dictionary_without_the_decorator_is_a_strategy_that_needs_nothing():
    STRATEGIES["mine"] = lambda seen, budget, generator: Kept(torch.arange(budget))
    assert needs_of("mine") == frozenset() and kept("mine", 3) == [0, 1, 2]
    with pytest.raises(NanogapError, match="mine cannot keep auto of 16"):
        budget_of("auto", 16, "mine")


def test_an_unknown_need_is_refused_before_anything_is_entered():
    with pytest.raises(NanogapError, match="no strategy can see colour: choose from cls, cls_"):
        strategy(needs={"cls", "colour"})


def test_an_unknown_strategy_is_answered_with_the_known_ones():
    for ask in (needs_of, lambda name: budget_of(3, 16, name)):
        with pytest.raises(NanogapError, match="unknown strategy 'best': choose from random, spat"):
            ask("best")


def test_a_field_that_was_not_asked_for_is_answered_with_what_asks_for_it():
    with pytest.raises(AttributeError, match="`text` is not there: @strategy.needs=.* asks for it"):
        VisualTokens(torch.ones(16, 8), 4, 4).text     # noqa: B018


def test_a_model_shows_a_strategy_what_it_asks_for_and_nothing_else():
    """It could see `cls` in any image; the strategy did not ask."""
    shown = []

    @strategy(needs={"keys", "text"})
    def listens(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
        shown.append(seen)
        return Kept(torch.arange(budget))

    mini = nanogap.load(ROOT / "weights/mini", "cpu")
    mini.ground(ROOT / "image.jpg", "the man on the left", "listens", 4, max_new_tokens=1)
    assert set(shown[0].fields) == {"keys", "text"}
    assert torch.allclose(shown[0].text, mini.text_guide.embed("the man on the left"), atol=1e-4)
    assert (shown[0].rows, shown[0].columns, len(shown[0].keys)) == (12, 12, 144)


# ----- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep, n_visual, budget", [
    (64, 576, 64), ("64", 576, 64), ("25%", 576, 144), ("100%", 576, 576),
    ("9.8%", 576, 56), ("22.2%", 576, 128), ("33.3%", 576, 192),   # as DivPrune publishes them
    ("25%", 2, 1),                                     # half a token, but never none
    ("1%", 576, 6),                                    # 5.76
    ("0.1%", 16, 1),
    ("auto", 576, None), (None, 576, None)])
def test_a_budget_is_a_number_of_tokens_or_a_share_of_them(
        keep: int | str | None, n_visual: int, budget: int | None):
    assert budget_of(keep, n_visual, "prumerge") == budget


@pytest.mark.parametrize("keep", [0, -1, 577, "0", "0%", "101%", "nan%", "x", "", "%", "1.5", 2.5,
                                  "5%%"])
def test_what_is_no_budget_is_refused_with_what_is(keep: object):
    with pytest.raises(NanogapError) as caught:
        budget_of(keep, 576, "random")
    assert str(caught.value) == (f"random cannot keep {keep} of 576 visual tokens: give a whole "
                                 "number from 1 to 576, or a share such as 25%")


def test_only_a_strategy_that_finds_a_budget_itself_can_do_without():
    for keep in (None, "auto"):
        with pytest.raises(NanogapError, match=f"random cannot keep {keep} of 16 visual tokens"):
            budget_of(keep, 16, "random")
    with pytest.raises(NanogapError, match="trim cannot keep 17 of 16 .* such as 25%, or auto"):
        budget_of(17, 16, "trim")


# ----- what they share ----------------------------------------------------------------------------


def test_ranked_gives_the_highest_first_and_ties_to_the_lower_index():
    assert ranked(torch.tensor([0.1, 0.7, 0.3, 0.7]), 3).tolist() == [1, 3, 2]


def test_without_gives_the_others_in_raster_order():
    assert without(torch.tensor([5, 0, 3]), 7).tolist() == [1, 2, 4, 6]


@pytest.mark.parametrize("scores, expected", [
    ([1, 2, 3, 4, 5, 6, 7, 14, 15], 2),        # Q1 = 3, Q3 = 7: above 7 + 1.5 * 4 = 13
    ([1, 2, 3, 4, 5, 6, 7, 13, 15], 1),        # 13 is not above 13
    ([0, 0, 0, 0, 0, 0, 0, 4, 8, 9], 2),       # Q3 = 3, of the way from 0 to 4: above 7.5
    ([0] * 12 + [1] * 4, 4),                   # a quarter, and more there cannot be:
    ([0] * 11 + [1] * 5, 1),                   # Q3 itself is 1
    ([1, 2, 3, 4, 5], 1),                      # none: the best alone
    ([5, 5, 5, 5], 1)])
def test_outliers_lie_one_and_a_half_interquartile_ranges_above_the_third_quartile(
        scores: list[int], expected: int):
    assert outliers(torch.tensor(scores, dtype=torch.float32)) == expected


# ----- the baselines ------------------------------------------------------------------------------


def test_random_follows_its_seed_and_is_not_sorted():
    drawn = [select("random", seen(), 8, seed=s).ranked.tolist() for s in range(3)]
    assert drawn[1] == select("random", seen(), 8, seed=1).ranked.tolist() != drawn[2]
    assert any(keep != sorted(keep) for keep in drawn)


def test_spatial_keeps_every_second_row_and_column_for_a_quarter():
    assert kept("spatial", 4) == [5, 7, 13, 15]        # rows 1 and 3, columns 1 and 3


@pytest.mark.parametrize("n, stride", [(144, 2), (64, 3), (36, 4)])
def test_spatial_is_a_stride_on_the_grid_of_llava(n: int, stride: int):
    """24 x 24: 144, 64 and 36 tokens are strides of 2, 3 and 4."""
    keep = select("spatial", seen(576), n).ranked
    rows, columns = (keep // 24).unique(), (keep % 24).unique()
    assert rows.diff().tolist() == columns.diff().tolist() == [stride] * (24 // stride - 1)


@pytest.mark.parametrize("rows, columns, budget, keep", [
    (2, 8, 4, [9, 11, 13, 15]),                        # every second column of one row
    (8, 2, 4, [3, 7, 11, 15]),                         # every second row of one column
    (6, 4, 6, [5, 7, 13, 15, 21, 23]),                 # rows 1, 3, 5; columns 1, 3
    (2, 3, 6, [0, 1, 2, 3, 4, 5]),
    (7, 1, 1, [3])])
def test_spatial_is_as_dense_in_rows_as_in_columns_of_any_rectangle(
        rows: int, columns: int, budget: int, keep: list[int]):
    assert select("spatial", seen(rows * columns, rows=rows), budget).ranked.tolist() == keep


@pytest.mark.parametrize("rows, columns", [(6, 4), (2, 3), (1, 7), (7, 1), (32, 8), (3, 17)])
def test_spatial_takes_no_patch_of_a_rectangle_twice(rows: int, columns: int):
    for budget in range(1, rows * columns + 1):
        keep = select("spatial", seen(rows * columns, rows=rows), budget).ranked
        assert len(keep.unique()) == len(keep) == budget


def test_attention_ranks_by_the_mean_over_heads():
    attention = torch.zeros(2, 16)
    attention[0, 3], attention[1, 3] = 0.9, 0.0        # mean 0.45
    attention[0, 11], attention[1, 11] = 0.5, 0.6      # mean 0.55
    attention[0, 6] = 0.2                              # mean 0.1
    assert kept("cls_attention", 3, cls_attention=attention) == [11, 3, 6]


@pytest.mark.parametrize("name, patches, point", [("cls_similarity", "features", "cls"),
                                                  ("text_similarity", "aligned", "text")])
def test_similarity_ranks_by_the_angle(name: str, patches: str, point: str):
    """Patch i stands at i * 5 degrees and is i + 1 long; CLS, or the expression, at 32 degrees."""
    angle = torch.arange(16) * math.radians(5)
    vectors = torch.stack([angle.cos(), angle.sin()], -1) * torch.arange(1, 17)[:, None]
    at_32 = torch.tensor([math.cos(math.radians(32)), math.sin(math.radians(32))])
    assert kept(name, 4, **{patches: vectors, point: at_32}) == [6, 7, 5, 8]


# ----- PruMerge -----------------------------------------------------------------------------------


def attended(weights: dict[int, int], others: int = 1, cls: int = 16) -> VisualTokens:
    """A 4 x 4 image whose CLS gives patches these weights, before they are divided by their sum.

    Queries and keys are 4 wide, so a dot product is divided by 2, and keys begin with a logarithm.
    Feature i is 1 in channel i and 0 elsewhere.
    """
    keys = torch.ones(17, 4)
    keys[:, 0] = torch.tensor([cls] + [weights.get(i, others) for i in range(16)]).log()
    queries = torch.tensor([[2.0, 0, 0, 0]] * 17)
    return seen(features=torch.eye(16), last_queries=queries, last_keys=keys)


def test_prumerge_keeps_the_outliers_in_the_order_of_their_scores_and_merges_the_others():
    """CLS itself has 16 of the 100 parts, patch 9 has 40, patch 2 has 30, the others 1 each."""
    result = select("prumerge", attended({9: 40, 2: 30}), None)
    assert result.ranked.tolist() == [9, 2]
    nine, two, added = torch.full((16,), 0.01), torch.full((16,), 0.01), torch.full((16,), 0.01)
    nine[9], nine[2] = 1, 0.3                          # itself, and the other kept one as well
    two[2], two[9] = 1, 0.4
    added[9] = added[2] = 0                            # the dropped: a vector of length 0.04
    assert torch.allclose(result.features, torch.stack([nine, two]), atol=1e-6)
    assert torch.allclose(result.added, added[None], atol=1e-6)


def test_prumerge_merges_the_nearest_by_the_angle_of_their_keys(monkeypatch: pytest.MonkeyPatch):
    """Patch 0 with the two whose keys point its way, however long they are, not counting itself."""
    monkeypatch.setattr(prune, "NEAREST", 2)
    keys = torch.zeros(17, 2)
    keys[1:, 1] = 1                                    # all point up, to the right
    keys[1:, 0] = torch.tensor([9.0, 1, 2, 3, 30, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4])
    keys[5] *= 2                                       # patch 4: (60, 2)
    image = seen(features=torch.eye(16), last_queries=torch.zeros(17, 2), last_keys=keys)
    result = select("prumerge", image, 1)              # all scores are 1 / 17
    assert result.ranked.tolist() == [0]
    assert result.features[0].nonzero().flatten().tolist() == [0, 4, 6]
    assert torch.allclose(result.features[0, [0, 4, 6]], torch.tensor([1, 1 / 17, 1 / 17]))


def test_prumerge_keeps_the_best_patch_where_there_is_no_outlier():
    image = attended({i: 10 + i for i in range(16)})
    assert select("prumerge", image, None).ranked.tolist() == [15]


@pytest.mark.parametrize("name", ["prumerge", "trim"])
def test_no_token_is_added_where_nothing_is_dropped(name: str):
    assert select(name, seen(), 16).n_added == 0 and select(name, seen(), 15).n_added == 1


# ----- TRIM ---------------------------------------------------------------------------------------


def toward(dots: list[float]) -> dict[str, Tensor]:
    """Patches and a text with these dot products."""
    return {"aligned": torch.tensor([[d / 2, 1.0] for d in dots]), "text": torch.tensor([2.0, 0.0])}


def test_trim_keeps_the_least_aligned_in_raster_order_and_adds_the_mean_of_the_rest():
    dots = [0.0] * 16
    dots[12], dots[3], dots[7] = -5, -1, 9             # patch 7 is what the text speaks of
    features = torch.arange(16.0)[:, None] * torch.ones(16, 8)
    assert kept("trim", 1, **toward(dots)) == [12]
    result = select("trim", seen(features=features, **toward(dots)), 2)
    assert result.ranked.tolist() == [3, 12] and result.features is None
    assert torch.allclose(result.added, torch.full((1, 8), (120 - 15) / 14))


def test_trim_does_not_normalise():
    """Patch 1 points straight away from the text, patch 2 only sideways, but is long."""
    aligned = torch.zeros(16, 2)
    aligned[1], aligned[2] = torch.tensor([-1.0, 0]), torch.tensor([-3.0, 9])
    assert kept("trim", 1, aligned=aligned, text=torch.tensor([1.0, 0])) == [2]


def test_trim_looks_for_outliers_after_the_softmax():
    """0, 1, ..., 15 has no outlier.  Of their exponentials, in parts of the largest, Q1 is 0.00001
    and Q3 0.026; above 0.066 are 1, 0.37 and 0.14, but not 0.05."""
    assert kept("trim", None, **toward([-i for i in range(16)])) == [13, 14, 15]
    assert kept("trim", None, **toward([-i / 1000 for i in range(16)])) == [15]


def test_trim_ranks_what_the_softmax_rounds_to_zero():
    assert kept("trim", 2, **toward([0.0] * 14 + [-200, -400])) == [14, 15]
    assert kept("trim", 2, **toward([0.0, 0, -150, 0, -400] + [0] * 11)) == [2, 4]


# ----- the same in plain Python -------------------------------------------------------------------


def plain_prumerge(image: dict, budget: int | None) -> Plain:
    x, k, q = image["features"], image["last_keys"], image["last_queries"][0]
    N = len(x)
    a = plain_softmax([dot(q, key) / math.sqrt(len(q)) for key in k])[1:]
    keep = best_first([*range(N)], lambda i: a[i])[:budget or plain_outliers(a)]
    return keep, *plain_merge(x, k, a, keep)


def plain_trim(image: dict, budget: int | None) -> Plain:
    x, t = image["features"], image["text"]
    p = plain_softmax([-dot(z, t) for z in image["aligned"]])
    keep = sorted(best_first([*range(len(x))], lambda i: p[i])[:budget or plain_outliers(p)])
    dropped = [x[j] for j in range(len(x)) if j not in keep]
    return keep, None, [sum(column) / len(dropped) for column in zip(*dropped, strict=True)]


@pytest.mark.parametrize("name", ["prumerge", "trim"])
@pytest.mark.parametrize("n, budget", [(36, 5), (36, 12), (81, 13), (81, 40)])
def test_a_published_method_is_what_it_is_in_plain_python(name: str, n: int, budget: int):
    """32 nearest are not all of either image."""
    image = seen(n, seed=n)
    plain = {name: value.double().tolist() for name, value in image.fields.items()}
    plain["features"] = image.features.double().tolist()
    for asked in (budget, None):
        result = select(name, image, asked)
        keep, features, added = globals()[f"plain_{name}"](plain, asked)
        assert result.ranked.tolist() == keep
        for ours, theirs in ((result.features, features), (result.added, added and [added])):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.allclose(ours, torch.tensor(theirs), atol=1e-5)
