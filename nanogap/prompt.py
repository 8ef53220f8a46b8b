"""Words: the chat template, the question for a box, and the box in the answer.

In:  a referring expression.  Out: token IDs with one image token among them; and from the model's
answer, four numbers.
"""

import re
from dataclasses import dataclass

from tokenizers import Tokenizer

from nanogap.errors import ItemError

DESCRIBE = "Provide a brief description of the given image."   # as LLaVA's first stage asks
Shares = tuple[float, float, float, float]   # x1, y1, x2, y2, each in [0, 1] of the model's frame


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token IDs of a text, without BOS."""
    return tokenizer.encode(text, add_special_tokens=False).ids


@dataclass(frozen=True)
class Template:
    """What stands before the image, and after it with a question in the place of {}."""
    before: str
    after: str
    where_is: str             # the question for a box, with an expression in the place of {}
    starts: int = 1           # how many BOS tokens come first

    def question(self, expression: str) -> str:
        """The question that the model answers with a box."""
        check_expression(expression)
        return self.where_is.format(expression.strip())

    def around(self, question: str) -> tuple[str, str]:
        """The text before the image, and the text after it."""
        return self.before, self.after.format(question)

    def encode(self, tokenizer: Tokenizer, question: str, bos: int, image_token: int) -> list[int]:
        """Token IDs of the whole prompt, BOS first, with one `image_token` in the image's place."""
        before, after = self.around(question)      # encoded apart, as LLaVA does: each gets a "▁"
        start = [bos] * self.starts + encode(tokenizer, before)
        return [*start, image_token, *encode(tokenizer, after)]


def check_expression(expression: str) -> None:
    """Reject what names nothing, or is no text."""
    if not isinstance(expression, str):
        raise ItemError(f"an expression is a text, and this is of type {type(expression).__name__}")
    if not expression.strip():
        raise ItemError('the expression is empty; name a thing, such as "the man on the left"')
    if any("\ud800" <= letter <= "\udfff" for letter in expression):
        raise ItemError("the expression is not valid Unicode: type it in UTF-8")


@dataclass(frozen=True)
class BoxFormat:
    """How a model says a box: four numbers in a pattern."""
    pattern: re.Pattern[str]      # four groups, one for each number
    template: str                 # of str.format, four numbers
    whole: int | None = None      # what is said for 1 where numbers are whole, rounded down

    def say(self, box: Shares) -> str:
        """The box as the model says it."""
        whole = self.whole
        return self.template.format(*(int(v * whole + 1e-6) if whole else v for v in box))

    def parse(self, text: str) -> Shares | None:
        """The first box that an answer holds; None, and no guess, if it is not inside the frame."""
        match = self.pattern.search(text)
        if match is None:
            return None
        x1, y1, x2, y2 = (float(v) / (self.whole or 1) for v in match.groups())
        return (x1, y1, x2, y2) if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 else None


NUMBER = r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*"
TWO_DECIMALS = BoxFormat(       # LLaVA's
    re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]", re.ASCII),
    "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]")


def parse_box(text: str) -> Shares | None:
    """The first box (x1, y1, x2, y2) of an answer in LLaVA's form: see `BoxFormat.parse`."""
    return TWO_DECIMALS.parse(text)
