"""Strategies before the decoder: budgets, purity, precision, and each against plain Python."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanogap.methods import find
from nanogap.methods.in_decoder import prunes_there
from nanogap.prune import FIELDS, STRATEGIES, Kept, VisualTokens, needs_of
from tests.plain import (
    Plain,
    best_first,
    cosine,
    dot,
    plain_merge,
    plain_outliers,
    plain_softmax,
    plus,
)
from tests.test_prune import seen, select

NAMES = [name for name in STRATEGIES if not prunes_there(name)]


def budgets(name: str, *given: int) -> list[int | None]:
    """These budgets, and none where the strategy finds one itself."""
    return [*given, None] if getattr(STRATEGIES[name], "finds_budget", False) else [*given]


def tensors(image: VisualTokens) -> dict[str, Tensor]:
    return {"features": image.features, **image.fields}


def each(image: VisualTokens, change: Callable[[Tensor], Tensor]) -> VisualTokens:
    """The same image, with every tensor changed."""
    fields = {name: change(value) for name, value in image.fields.items()}
    return VisualTokens(change(image.features), image.rows, image.columns, fields)


def told(result: Kept) -> list:
    parts = (result.ranked, result.features, result.added)
    return [None if part is None else part.tolist() for part in parts]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows, columns", [
    (1, 1), (1, 2), (2, 1), (3, 1), (2, 3), (1, 7), (6, 6)])
def test_every_budget_is_kept_in_different_patches_and_finite_numbers(
        name: str, rows: int, columns: int):
    """Also of pictures that are all alike, and nothing in a picture is changed.

    VisionZip counts CLS, which it adds, as one of the budget, unless it may keep one token only.
    HoloV keeps fewer where a strip is smaller than its share.
    """
    n = rows * columns
    images = [seen(n, seed, rows) for seed in range(5)]
    images += [each(images[0], torch.zeros_like), each(images[0], torch.ones_like)]
    for image in images:
        before = each(image, Tensor.clone)
        for budget in budgets(name, *range(1, n + 1)):
            result = select(name, image, budget)
            keep, K = result.ranked, len(result.ranked)
            if budget and name != "holov":
                assert K == budget - (name == "visionzip" and budget > 1)
            assert keep.dtype == torch.long and 1 <= K <= (budget or n)
            assert len(keep.unique()) == K and 0 <= int(keep.min()) and int(keep.max()) < n
            for numbers, shape in ((result.features, (K, 8)), (result.added, (1, 8))):
                assert numbers is None or numbers.shape == shape and numbers.isfinite().all()
        assert all(map(torch.equal, tensors(image).values(), tensors(before).values()))


# cdpruner makes unit vectors in the model's precision, as its code
@pytest.mark.parametrize("name", [name for name in NAMES if name != "cdpruner"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32_and_given_back(name: str, dtype: torch.dtype):
    half = each(seen(144), lambda t: t.to(dtype))
    full = each(half, Tensor.float)
    for budget in budgets(name, 13, 36, 100, 130):
        a, b = select(name, half, budget), select(name, full, budget)
        rounded = [None if t is None else t.to(dtype) for t in (b.features, b.added)]
        assert told(a) == told(Kept(b.ranked, *rounded))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("random", "spatial")])
def test_tensors_are_made_on_the_device_of_the_image(name: str):
    """What is made without saying where lands on "meta" here, and does not mix with the image."""
    image, generator = seen(), torch.Generator()
    for budget in budgets(name, 1, 5, 13, 16):
        with torch.device("meta"):
            result = STRATEGIES[name](image, budget, generator)
        made = (result.ranked, result.features, result.added)
        assert all(t is None or t.device.type == "cpu" for t in made)


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_asks_for_the_fields_that_it_reads_and_for_no_others(name: str):
    """It gives the same with these alone, and misses each of them that is not there."""
    image, needs = seen(), needs_of(name)
    assert needs <= set(FIELDS)
    for budget in budgets(name, 13):
        only = {field: image.fields[field] for field in needs}
        result = select(name, VisualTokens(image.features, 4, 4, only), budget, seed=3)
        assert told(result) == told(select(name, image, budget, seed=3))
        for field in needs:
            others = {other: value for other, value in only.items() if other != field}
            with pytest.raises(AttributeError, match=f"`{field}` is not there"):
                select(name, VisualTokens(image.features, 4, 4, others), budget)


def test_cdpruner_of_the_whole_question_is_the_mean_over_its_segments():
    image = seen(question=torch.eye(5)[:2])
    one = seen(text=torch.eye(5)[0] + torch.eye(5)[1])     # two axes: the sum of their cosines
    assert torch.equal(select(find("cdpruner(question=whole)"), image, 5).ranked,
                       select("cdpruner", one, 5).ranked)


@pytest.mark.parametrize("name", ["divprune", "holov"])
def test_numbers_that_are_not_finite_choose_different_patches_and_the_decoder_says_so(name: str):
    for wrong in (math.nan, math.inf):
        image = each(seen(36), lambda t, wrong=wrong: torch.full_like(t, wrong))
        keep = select(name, image, 12).ranked
        assert 1 <= len(keep) == len(keep.unique()) <= 12


def looks_of_cls(image: dict) -> list[float]:
    """How much CLS attends to each patch, in all heads together."""
    return [sum(heads) for heads in zip(*image["cls_attention"], strict=True)]


def plain_prumerge_plus(image: dict, budget: int | None) -> Plain:
    x, k, q = image["features"], image["last_keys"], image["last_queries"][0]
    N = len(x)
    a = plain_softmax([dot(q, key) / math.sqrt(len(q)) for key in k])[1:]
    K = math.ceil(budget / 2) if budget else plain_outliers(a)
    keep = best_first([*range(N)], lambda i: a[i])[:K]
    others = [i for i in range(N) if i not in keep]
    if budget:
        parts = budget // 2
        keep += [others[math.floor((part + 0.5) * len(others) / parts)] for part in range(parts)]
    else:
        keep += [i for i in range(0, N - 1, int(int(1 / (K / N)) / 3)) if i not in keep]
    return keep, *plain_merge(x, k, a, keep)


def plain_visionzip(image: dict, budget: int) -> Plain:
    x, k, N = image["features"], image["keys"], len(image["features"])
    contextual = round(budget * 10 / 64)
    dominant = budget - contextual - 1                 # and CLS
    score = looks_of_cls(image)
    best = sorted(best_first([*range(N)], lambda i: score[i])[:dominant])
    others = [i for i in range(N) if i not in best]
    targets = [others[c * (len(others) // contextual)] for c in range(contextual)]
    assigned = {target: [] for target in targets}
    for j in others:
        if j not in targets:
            nearest = best_first(targets, lambda target, j=j: cosine(k[j], k[target]))[0]
            assigned[nearest].append(x[j])
    features = [x[i] for i in best]
    for target in targets:
        y = x[target]
        for other in assigned[target]:
            y = plus(y, other, 1 / len(assigned[target]))
        features.append(y)
    return best + targets, features, image["cls"]


def plain_divprune(image: dict, budget: int) -> Plain:
    v, N = image["projected"], len(image["projected"])
    D = [[1 - cosine(v[i], v[j]) for j in range(N)] for i in range(N)]
    keep = best_first([*range(N)], lambda i: sorted(D[i])[1])[:1]
    while len(keep) < budget:
        nearest = [min(D[i][j] for j in keep) for i in range(N)]
        keep += best_first([*range(N)], lambda i, nearest=nearest: nearest[i])[:1]
    return sorted(keep), None, None


def plain_vispruner(image: dict, budget: int) -> Plain:
    x, N = image["features"], len(image["features"])
    score = looks_of_cls(image)
    order = best_first([*range(N)], lambda i: score[i])
    important, R = order[:int(budget * 0.5)], order[int(budget * 0.5):]
    diverse = budget - len(important)
    while len(R) > diverse:
        r = min(8, len(R) - diverse)
        a, b = R[0::2], R[1::2]
        a = best_first(a, lambda i, b=b: max(cosine(x[i], x[j]) for j in b))
        R = a[r:] + b
    return sorted(important + R), None, None


def determinant(rows: list[list[float]]) -> float:
    """By elimination, in double precision."""
    return float(torch.linalg.det(torch.tensor(rows, dtype=torch.float64)))


def plain_cdpruner(image: dict, budget: int) -> Plain:
    """One patch after the other, whichever makes the determinant largest.  Of few patches."""
    v, N = image["projected"], len(image["projected"])
    r = [-cosine(z, image["text"]) for z in image["aligned"]]
    r = [(one - min(r) + 1e-6) / (max(r) - min(r)) for one in r]
    L = [[r[i] * cosine(v[i], v[j]) * r[j] for j in range(N)] for i in range(N)]
    keep: list[int] = []
    for _ in range(budget):
        keep += best_first([i for i in range(N) if i not in keep], lambda i, kept=keep: determinant(
            [[L[a][b] for b in [*kept, i]] for a in [*kept, i]]))[:1]
    return sorted(keep), None, None


def plain_scope(image: dict, budget: int) -> Plain:
    x, N = image["features"], len(image["features"])
    S = [[cosine(x[i], x[j]) for j in range(N)] for i in range(N)]
    w = looks_of_cls(image)
    keep: list[int] = []
    for _ in range(budget):
        c = [max([0.0, *(S[v][j] for j in keep)]) for v in range(N)]
        left = [i for i in range(N) if i not in keep]
        keep += best_first(left, lambda j, c=c: w[j] * sum(
            max(0, S[v][j] - c[v]) for v in range(N)))[:1]
    return sorted(keep), None, None


def plain_holov(image: dict, budget: int) -> Plain:
    p, N = image["projected"], len(image["projected"])
    a = [look / len(image["cls_attention"]) for look in looks_of_cls(image)]
    sizes = [N // 16 + (part < N % 16) for part in range(16)]
    runs = [list(range(sum(sizes[:part]), sum(sizes[:part + 1]))) for part in range(16)]
    scores = []
    for run in runs:
        n = len(run)
        S = [[0 if i == j else cosine(p[i], p[j]) for j in run] for i in run]
        q = [sum((s - sum(row) / (n - 1)) ** 2 for s in row) / (n - 1) for row in S]
        A = [1000 * a[i] for i in run]
        ratio = (sum(A) / n) / (sum(q) / n + 1e-6)
        scores.append(sum(A[i] + 0.09 * q[i] * ratio for i in range(n)) / n)
    w = [score / (sum(scores) + 1e-6) for score in scores]
    k = [math.floor(one * budget) for one in w]
    for part in best_first([*range(16)], lambda part: w[part])[:budget - sum(k)]:
        k[part] += 1
    keep = [best_first(run, lambda i: a[i])[:k[part]] if k[part] < len(run) else run
            for part, run in enumerate(runs)]
    return sum(keep, [])[:budget], None, None


@pytest.mark.parametrize("by_hand", [
    plain_prumerge_plus, plain_visionzip, plain_divprune, plain_vispruner, plain_cdpruner,
    plain_scope, plain_holov])
@pytest.mark.parametrize("n, budget", [(36, 5), (36, 12), (81, 13), (81, 40)])
def test_a_published_method_is_what_it_is_in_plain_python(by_hand: Callable, n: int, budget: int):
    """81 patches: of 13, VisPruner deals out an odd 75; 32 nearest are not all of either image."""
    name, image = by_hand.__name__.removeprefix("plain_"), seen(n, seed=n)
    plain = {field: value.double().tolist() for field, value in tensors(image).items()}
    for asked in budgets(name, min(budget, 5) if name == "cdpruner" else budget):   # its rank is 6
        result = select(name, image, asked)
        keep, features, added = by_hand(plain, asked)
        assert result.ranked.tolist() == keep
        for ours, theirs in ((result.features, features), (result.added, added and [added])):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.allclose(ours, torch.tensor(theirs), atol=1e-5)
