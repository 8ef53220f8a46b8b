"""Plain Python with which tests work out what a strategy should keep: lists, and no tensors."""

import math
from collections.abc import Callable

Plain = tuple[list[int], list[list[float]] | None, list[float] | None]     # keep, features, added


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def best_first(indices: list[int], score: Callable[[int], float]) -> list[int]:
    return sorted(indices, key=lambda i: -score(i))


def plus(a: list[float], b: list[float], times: float = 1) -> list[float]:
    return [x + times * y for x, y in zip(a, b, strict=True)]


def plain_softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def plain_outliers(scores: list[float]) -> int:
    def percentile(p: float) -> float:
        place = p * (len(scores) - 1)
        low, high = sorted(scores)[math.floor(place)], sorted(scores)[math.ceil(place)]
        return low + (place - math.floor(place)) * (high - low)
    q1, q3 = percentile(0.25), percentile(0.75)
    return max(1, len([s for s in scores if s > q3 + 1.5 * (q3 - q1)]))


def plain_merge(x: list, k: list, a: list[float], keep: list[int]) -> tuple:
    """What each kept patch and the others become: features, added."""
    features = []
    for i in keep:
        y = x[i]
        near = best_first([*range(len(x))], lambda j, i=i: cosine(k[1 + i], k[1 + j]))
        for j in [j for j in near if j != i][:32]:
            y = plus(y, x[j], a[j])
        features.append(y)
    added = [0.0] * len(x[0])
    for j in range(len(x)):
        added = plus(added, x[j], a[j] if j not in keep else 0)
    return features, added
