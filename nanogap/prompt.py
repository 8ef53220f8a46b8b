"""Words: chat templates, the question for a box, and the box in the answer.

In:  a referring expression.  Out: token IDs with one image token among them; from the model's
answer, four numbers; and before it answers, what the form of a box foretells of its tokens.

A model says in its own file (nanogap/models) which template and which form of a box are its own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, takewhile

from tokenizers import Tokenizer

from nanogap.checks.command import ItemError

DESCRIBE = "Provide a brief description of the given image."   # as LLaVA's first stage asks
Shares = tuple[float, float, float, float]   # x1, y1, x2, y2, each in [0, 1] of the model's frame
Form = Sequence[tuple[int, ...]]             # the tokens that may stand at each place of a box


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token IDs of a text, without BOS; a special token that is spelled out in it stays text."""
    tokenizer.encode_special_tokens = True
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = False


@dataclass(frozen=True)
class Template:
    """What stands before the image, and after it with a question in the place of {}."""

    before: str
    after: str
    where_is: str             # the question for a box, with an expression in the place of {}
    starts: int = 1           # how many BOS tokens come first
    later: str = "USER: {} ASSISTANT:"   # a question that follows an answer

    def question(self, expression: str) -> str:
        """The question that the model answers with a box.

        raises: ItemError where the expression is blank or is not valid text
        """
        check_expression(expression)
        return self.where_is.format(expression.strip())

    def around(self, question: str) -> tuple[str, str]:
        """The text before the image, and the text after it."""
        return self.before, self.after.format(question)

    def follow(self, question: str) -> str:
        """A question that follows an answer, about the same image."""
        return self.later.format(question)

    def encode(self, tokenizer: Tokenizer, question: str, bos: int, image_token: int) -> list[int]:
        """Token IDs of the whole prompt, BOS first, with one `image_token` in the image's place.

        The text after the image is encoded on its own, as LLaVA does, so it gets a "▁" of its own.
        """
        before, after = self.around(question)
        start = [bos] * self.starts + encode(tokenizer, before)
        return [*start, image_token, *encode(tokenizer, after)]


def check_expression(expression: str) -> None:
    """Refuse what names nothing: see `Template.question`."""
    if not isinstance(expression, str):
        raise ItemError(f"an expression is text, and not of type {type(expression).__name__}: "
                        'give one such as "the man on the left"')
    if not expression.strip():
        raise ItemError('the expression is empty, so there is nothing to look for: '
                        'name a thing, such as "the man on the left"')
    try:
        expression.encode()
    except UnicodeEncodeError:
        raise ItemError("the expression is not valid Unicode: type it in UTF-8") from None


# ----- the answer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoxFormat:
    """How a model says a box: four numbers in a pattern."""

    pattern: re.Pattern[str]      # four groups, one for each number
    template: str                 # of str.format, four numbers
    digits: int                   # that are news in it
    whole: int | None = None      # what is said for 1 where numbers are whole, rounded down

    def say(self, box: Shares) -> str:
        """The box as the model says it."""
        if self.whole is None:
            return self.template.format(*box)
        return self.template.format(*(int(share * self.whole + 1e-6) for share in box))

    def parse(self, text: str) -> Shares | None:
        """The first box that an answer holds.

        None where there are no four numbers in the pattern, or they lie outside [0, 1] or leave no
        area: such an answer counts as wrong and is never mended by guessing.
        """
        match = self.pattern.search(text)
        if match is None:
            return None
        x1, y1, x2, y2 = (float(v) / (self.whole or 1) for v in match.groups())
        return (x1, y1, x2, y2) if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 else None

    def foretell(self, tokenizer: Tokenizer) -> Form:
        """The tokens that may stand at each place of a box: the one, or any of ten digits.

        Empty where the tokenizer does not split numbers into digits.
        """
        return foretold(self, tokenizer)


@lru_cache(maxsize=4)
def foretold(box_format: BoxFormat, tokenizer: Tokenizer) -> Form:
    """See `BoxFormat.foretell`."""
    decimals = box_format.digits // 4
    ones = int("1" * decimals) / 10 ** decimals                   # 0.11 where boxes have two
    numbers = [digit * ones for digit in range(10)]
    if box_format.whole:
        numbers[0] = 10 / box_format.whole                        # two digits, as the others have
    boxes = [encode(tokenizer, box_format.say((number,) * 4)) for number in numbers]
    if len({len(box) for box in boxes}) > 1:
        return ()
    places = [tuple(dict.fromkeys(tokens)) for tokens in zip(*boxes, strict=True)]
    digits = [allowed for allowed in places if len(allowed) > 1]
    any_digit = tuple(dict.fromkeys(chain.from_iterable(digits)))
    form = tuple(any_digit if len(allowed) > 1 else allowed for allowed in places)
    return form if len(digits) == box_format.digits else ()


NUMBER = r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*"
TWO_DECIMALS = BoxFormat(       # LLaVA's
    re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]", re.ASCII),
    "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]", digits=8)


def parse_box(text: str) -> Shares | None:
    """The first box (x1, y1, x2, y2) of an answer in LLaVA's form: see `BoxFormat.parse`."""
    return TWO_DECIMALS.parse(text)


def format_box(box: Shares) -> str:
    """The box as LLaVA says it: two decimals, fractions of the padded square."""
    return TWO_DECIMALS.say(box)


# ----- drafts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """What may come next: tokens one behind the other, and then a choice among several."""

    chain: tuple[int, ...] = ()
    choice: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.chain + self.choice

    @property
    def alternatives(self) -> int:
        """How many tokens share the last place."""
        return max(len(self.choice), 1)

    def places(self, start: int) -> list[int]:
        """Where the tokens stand if the first is at `start`; those of the choice share a place."""
        return [start + min(i, len(self.chain)) for i in range(len(self.tokens))]


NOTHING = Draft()


def draft(form: Form, tokens: Sequence[int], free_places: int) -> Draft:
    """What the form of a box puts behind the tokens so far, up to the next choice.

    form: as `BoxFormat.foretell` gives it; nothing is drafted where the tokens begin no such box
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
