"""Decoding several tokens to a pass where the form of a box foretells them.

Of the 25 tokens of "[0.12, 0.34, 0.56, 0.78]" and its end only eight digits are news.  So a pass is
fed the last new tokens, those that the format puts behind them, and where it leaves a choice, all
ten digits side by side, which do not see one another and have one position ID.  The logits of all
of them come out at once.  They show how far greedy decoding would have said the same, and what it
would say next.  The rest is dropped from the cache.  A pass in the middle of a box:

    fed             1   2   ,   ▁   0   .   0 1 2 3 4 5 6 7 8 9     said before, a chain, a choice
    position IDs    81  82  83  84  85  86  87 ...           87
    greedy behind       ,   ▁   0   .   3         4                 the chain agrees; "3", then "4"

A pass over several tokens rounds differently from passes over one: of two words that are as good as
equal the other may win, as happens in half precision.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile

from tokenizers import Tokenizer

from nanogap.gap import Layout
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


@dataclass
class Question:
    """The end of a prompt, and then the answer: what a question shares with no other."""

    text: list[int]           # at least the last token of its prompt
    layout: Layout            # of its whole prompt
    said: list[int] = field(default_factory=list)
    read: int = 0             # how many of these tokens, text and said, have a row in the cache
    passes: int = 0           # the first of them reads the text
    drafted: Form = ()
    fed: int = 0              # tokens in the next pass
    answered: bool = False

    def feed(self, drafted: Form) -> list[tuple[int, int]]:
        """Tokens and position IDs for the next pass: what has no row yet, and a draft."""
        own = self.text + self.said
        # GAP, 3: token t of the answer stands at next_position + t, whatever the cache's length
        first = self.layout.next_position - len(self.text)
        fed = [(own[place], first + place) for place in range(self.read, len(own))]
        for position_id, allowed in enumerate(drafted, first + len(own)):
            fed += [(token, position_id) for token in allowed]
        self.drafted, self.fed = drafted, len(fed)
        return fed

    def hear(self, greedy: Sequence[int], max_new_tokens: int, ends: Collection[int]) -> int:
        """Take the likeliest token behind each that was fed, as far as the draft agrees.

        returns: how many of those keep their rows.  The others were drafted in vain, or belong to
                 a choice: what was right in it is fed again, behind the tokens before it
        """
        right = self.fed - sum(map(len, self.drafted))   # what was fed before the draft
        row = right                                      # of the next token in the draft
        new = [greedy[row - 1]]
        for allowed in self.drafted:
            if new[-1] not in allowed:
                break
            if len(allowed) == 1:
                right += 1
            new.append(greedy[row + allowed.index(new[-1])])
            row += len(allowed)
        self.read += right
        self.passes += 1
        while new and not self.answered:
            self.said.append(new.pop(0))
            self.answered = self.said[-1] in ends or len(self.said) >= max_new_tokens
        return right
