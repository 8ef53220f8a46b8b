"""What the form of a box foretells of its tokens.

In:  a model's form of a box and its tokenizer; then the tokens of an answer so far.
Out: the tokens that may stand at each place of a box; then those that may come next.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, takewhile
from typing import NamedTuple

from tokenizers import Tokenizer

from nanogap.prompt import BoxFormat, encode

Form = Sequence[tuple[int, ...]]          # the tokens that may stand at each place of a box


@lru_cache(maxsize=4)
def foretell(box_format: BoxFormat, tokenizer: Tokenizer) -> Form:
    """The tokens that may stand at each place of a box: the one, or any of ten digits.

    Empty where the tokenizer does not split numbers into digits.
    """
    if box_format.whole:
        decimals = len(str(box_format.whole - 1))
    else:
        decimals = len(re.findall(r"\.(\d*)", box_format.say((0.5,) * 4))[0])
    numbers = [int(digit * decimals) / 10 ** decimals for digit in "0123456789"]   # 0.11, 0.22 ...
    if box_format.whole:
        numbers[0] = 10 / box_format.whole                        # two digits, as the others have
    boxes = [encode(tokenizer, box_format.say((number,) * 4)) for number in numbers]
    if len({len(box) for box in boxes}) > 1:
        return ()
    places = [tuple(dict.fromkeys(tokens)) for tokens in zip(*boxes, strict=True)]
    digits = [allowed for allowed in places if len(allowed) > 1]
    any_digit = tuple(dict.fromkeys(chain.from_iterable(digits)))
    form = tuple(any_digit if len(allowed) > 1 else allowed for allowed in places)
    return form if len(digits) == 4 * decimals else ()


class Draft(NamedTuple):
    """What may come next: tokens one behind the other, and then a choice among several."""

    chain: tuple[int, ...] = ()
    choice: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.chain + self.choice

    def places(self, start: int) -> list[int]:
        """Where the tokens stand if the first is at `start`; those of the choice share a place."""
        return [start + min(i, len(self.chain)) for i in range(len(self.tokens))]


NOTHING = Draft()


def draft(form: Form, tokens: Sequence[int], free_places: int) -> Draft:
    """What the form of a box puts behind the tokens so far, up to the next choice.

    form: as `foretell` gives it; nothing is drafted where the tokens begin no such box
    """
    place = 0
    for token in tokens:
        found = next_place(form, place, token)
        if found is None:
            return NOTHING
        place = found
    ahead = form[place:][:max(free_places, 0)]
    alone = tuple(allowed[0] for allowed in takewhile(lambda allowed: len(allowed) == 1, ahead))
    return Draft(alone, ahead[len(alone)] if len(alone) < len(ahead) else ())


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


def accepted(greedy: Sequence[int], drafted: Draft) -> tuple[int, list[int]]:
    """How many tokens of the chain greedy decoding would have said, and the new tokens.

    greedy: the 1 + D tokens of highest logit: behind what was fed, and behind each drafted token
    """
    chain, choice = drafted
    agreed = 0
    while agreed < len(chain) and greedy[agreed] == chain[agreed]:
        agreed += 1
    new = list(greedy[:agreed + 1])
    if agreed == len(chain) and new[-1] in choice:                          # known: what follows it
        new.append(greedy[agreed + 1 + choice.index(new[-1])])
    return agreed, new
