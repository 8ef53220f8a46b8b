"""What the form of a box foretells of its tokens.

In:  a model's form of a box and its tokenizer; then the tokens of an answer so far.
Out: the tokens that may stand at each place of a box; then those that may come next.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile

from tokenizers import Tokenizer

from nanogap.prompt import BoxFormat, encode

Form = Sequence[tuple[int, ...]]   # the tokens that may stand at each place: one, or a choice


@lru_cache(maxsize=4)
def foretell(box_format: BoxFormat, tokenizer: Tokenizer) -> Form:
    """The tokens that may stand at each place of a box: the one, or any of ten digits.

    Empty where the tokenizer does not split numbers into digits.
    """
    text = box_format.say((1 / 9,) * 4)                              # 0.11, and no other 1
    boxes = [encode(tokenizer, text.replace("1", digit)) for digit in "0123456789"]
    if len({len(box) for box in boxes}) > 1:
        return ()
    form = tuple(tuple(dict.fromkeys(tokens)) for tokens in zip(*boxes, strict=True))
    choices = sum(len(allowed) > 1 for allowed in form)
    return form if choices == text.count("1") else ()


def draft(form: Form, tokens: Sequence[int], free_places: int, choices: bool) -> Form:
    """What the form of a box puts behind the tokens so far, up to the next choice.

    form:    as `foretell` gives it; nothing is drafted where the tokens begin no such box
    choices: whether that choice is drafted as well: all of its tokens, for one place
    """
    place = 0
    for token in tokens:
        found = next_place(form, place, token)
        if found is None:
            return ()
        place = found
    ahead = form[place:][:max(free_places, 0)]
    alone = sum(1 for _ in takewhile(lambda allowed: len(allowed) == 1, ahead))
    return ahead[:alone + 1 if choices else alone]


def next_place(form: Form, place: int, token: int) -> int | None:
    """The place behind a token that came at this one; None where it does not belong there.

    A number may have a digit fewer than the form, or more: then what follows it comes a place
    earlier, or later.
    """
    last = len(form) - 1
    if place > last or token in form[place]:
        return place + 1
    if len(form[place]) > 1 and token in form[min(place + 1, last)]:          # a digit fewer
        return place + 2
    if place > 0 and len(form[place - 1]) > 1 and token in form[place - 1]:   # a digit more
        return place
    return None
