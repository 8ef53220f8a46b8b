"""Words: the chat template, the REC question, and the box in the answer.

In:  a referring expression.  Out: token IDs with one <image> token among them; and from the model's
answer, four numbers.

Source: LLaVA's conversation template vicuna_v1 and its REC instruction (haotian-liu/LLaVA).
The template in the hub's processor lacks the system sentence; LLaVA was trained with it.
"""

import re

from tokenizers import Tokenizer

from nanogap.errors import NanogapError

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
          "helpful, detailed, and polite answers to the user's questions.")
QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}."
DESCRIBE = "Provide a brief description of the given image."  # as in LLaVA's first stage of training
BEFORE_IMAGE = f"{SYSTEM} USER: "
AFTER_IMAGE = "\n{} ASSISTANT:"


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token IDs of a text, without BOS; a special token that is spelled out in it stays text."""
    tokenizer.encode_special_tokens = True
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = False


def where_is(expression: str) -> str:
    """The question that LLaVA answers with a box.

    raises: NanogapError where the expression is blank or is not valid text
    """
    if not expression.strip():
        raise NanogapError('the expression is empty, so there is nothing to look for: '
                           'name a thing, such as "the man on the left"')
    try:
        expression.encode()
    except UnicodeEncodeError:
        raise NanogapError("the expression is not valid Unicode: type it in UTF-8") from None
    return QUESTION.format(expression.strip())


def encode_prompt(tokenizer: Tokenizer, question: str, bos: int, image_token: int) -> list[int]:
    """Token IDs of the whole prompt, BOS first, with one `image_token` where the patches will stand.

    The text after the image is encoded on its own, as LLaVA does, so it gets a leading "▁" of its own.
    """
    after = encode(tokenizer, AFTER_IMAGE.format(question))
    return [bos, *encode(tokenizer, BEFORE_IMAGE), image_token, *after]


# ----- the answer ---------------------------------------------------------------------------------

NUMBER = r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]", re.ASCII)


def format_box(box: tuple[float, float, float, float]) -> str:
    """The box as LLaVA says it: two decimals, fractions of the padded square."""
    return "[" + ", ".join(f"{v:.2f}" for v in box) + "]"


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """The first box (x1, y1, x2, y2) that an answer holds, each in [0, 1] of the model's square.

    None where there are no four numbers between brackets, or they lie outside [0, 1] or leave no area:
    such an answer counts as wrong and is never mended by guessing.
    """
    match = BOX.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (float(v) for v in match.groups())
    return (x1, y1, x2, y2) if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 else None
