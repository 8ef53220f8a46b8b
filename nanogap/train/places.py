"""Where things stand, and what is clearly so of them: the left one, or the one above a landmark.

In:  sizes of an image and of things, or boxes; all in pixels.
Out: boxes, or their indices where a margin makes it clear which is meant.
"""

from collections.abc import Mapping, Sequence
from math import hypot, log
from random import Random

from nanogap.image import Box

TRIES = 48      # to find room for a thing
HIDDEN = 0.25   # at most this share of a box lies under, or over, the boxes of others
MARGIN = 0.12   # this much further left, right, up or down is clear; of the image's long side
BIGGER = 1.8    # ratio of areas from which one thing is clearly the bigger
NEAR = 0.5      # "next to": at most so far, of the image's long side,
NEARER = 0.6    # and at most this share of the distance of the second nearest
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}   # x, y


def shared_area(a: Box, b: Box) -> float:
    """The area that two boxes share; of a box and itself, its own area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def has_room(boxes: Sequence[Box]) -> bool:
    """Whether each box shares less than HIDDEN of its area with all the others together."""
    return all(   # a box is among the others, with all of its own area
        sum(shared_area(box, other) for other in boxes) < (1 + HIDDEN) * shared_area(box, box)
        for box in boxes)


def arrange(ratios: Sequence[float], width: int, height: int, rng: Random) -> dict[int, Box]:
    """Give a box to each thing of a ratio of width to height that finds room in the image.

    The boxes are about as large as those of RefCOCO val, whose median is 0.15 of the image.
    """
    placed: dict[int, Box] = {}
    largest = 5 / 8 if len(ratios) < 4 else 1 / 2    # the flattest image is 5/8 as high as wide
    for i, ratio in enumerate(ratios):
        for _ in range(TRIES):
            long = max(width, height) * rng.uniform(1 / 3, largest)
            w = round(long * min(1, ratio))
            h = round(long * min(1, 1 / ratio))
            x = round(rng.random() * (width - w))
            y = round(rng.random() * (height - h))
            box = (x, y, x + w, y + h)
            if has_room([*placed.values(), box]):
                placed[i] = box
                break
    return placed


def centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def superlatives(boxes: Mapping[int, Box], long: float) -> dict[str, int]:
    """Find which of two or more boxes is the "left" one, the "biggest", the "middle" of a row."""
    clear = MARGIN * long                                  # a measure is clear by a difference of 1
    areas = {i: shared_area(box, box) for i, box in boxes.items()}
    measures = {
        ("left", "right"): {i: centre(box)[0] / clear for i, box in boxes.items()},
        ("top", "bottom"): {i: centre(box)[1] / clear for i, box in boxes.items()},
        ("smallest", "biggest"): {i: log(area, BIGGER) for i, area in areas.items()},
    }
    found = {}
    for (first, last), measure in measures.items():
        order = sorted(boxes, key=measure.__getitem__)
        if measure[order[1]] - measure[order[0]] >= 1:
            found[first] = order[0]
        if measure[order[-1]] - measure[order[-2]] >= 1:
            found[last] = order[-1]
    in_a_column = {"top", "bottom"} <= found.keys()
    if len(boxes) == 3 and {"left", "right"} <= found.keys() and not in_a_column:
        (found["middle"],) = boxes.keys() - {found["left"], found["right"]}
    return found


def relations(boxes: Mapping[int, Box], landmark: Box, long: float) -> dict[str, int]:
    """Find which of two or more boxes alone is "left of" a landmark, or clearly "next to" it."""
    x, y = centre(landmark)
    away = {}                                              # right and down, of the long side
    for i, box in boxes.items():
        other_x, other_y = centre(box)
        away[i] = (other_x / long - x / long, other_y / long - y / long)
    found = {}
    distances = {i: hypot(*away[i]) for i in boxes}
    nearest, second = sorted(boxes, key=distances.__getitem__)[:2]
    if distances[nearest] < min(NEAR, NEARER * distances[second]):
        found["next to"] = nearest
    for word, (right, down) in DIRECTIONS.items():
        ahead = {i: right * dx + down * dy for i, (dx, dy) in away.items()}
        *_, next_one, foremost = sorted(boxes, key=ahead.__getitem__)
        aside = abs(down * away[foremost][0] + right * away[foremost][1])
        if ahead[next_one] <= 0 and ahead[foremost] >= max(MARGIN, aside):
            found[word] = foremost
    return found
