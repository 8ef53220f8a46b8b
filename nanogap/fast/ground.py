"""A question, answered the fast way: the lesson's `ground` with drafts.

In:  a model (nanogap/models/), a picture, an expression, and how to prune.
Out: the same words as the lesson's.
"""

from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from nanogap import ground as lesson
from nanogap.errors import NanogapError
from nanogap.fast.answered import Answered, answered
from nanogap.fast.decode import decode
from nanogap.ground import MAX_NEW_TOKENS, Keep
from nanogap.llava import EncodedImage
from nanogap.methods import find, in_decoder
from nanogap.methods.in_decoder import prunes_there
from nanogap.prompt import DESCRIBE


def ground(model: Any, image: Image.Image | str | Path | EncodedImage, expression: str,
           prune: str = "cls_attention", keep: Keep = "50%", mode: str = "gap", seed: int = 0, *,
           max_new_tokens: int = MAX_NEW_TOKENS, drafts: bool = True,
           question: str | None = None) -> Answered:
    """Find what an expression refers to: see nanogap/ground.py.

    drafts: whether a pass may be fed several tokens; the words are the same
    """
    name, encoded = find(prune), model.encode_image(image)
    asked = question or model.question(expression)
    check_lengths(model, model.encode_question(asked), encoded, max_new_tokens)
    if prunes_there(name):
        result = in_decoder.ground(model, encoded, expression, name, keep, mode, seed,
                                   max_new_tokens=max_new_tokens, question=question)
    else:
        result = lesson.ground(model, encoded, expression, name, keep, mode, seed,
                               max_new_tokens=max_new_tokens, question=question,
                               decode=partial(decode, drafts=drafts, next_pass=model.next_pass))
    return answered(result, model.cells(encoded), expression, name, keep, mode)


def check_lengths(model: Any, prompt: Tensor, image: EncodedImage, max_new_tokens: int) -> None:
    """Refuse what leaves no answer, and a prompt (P + 1 + A,) longer than the model can number."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise NanogapError(f"max_new_tokens is {max_new_tokens!r:.80} here: give a whole number "
                           "from 1")
    model.check_length(len(prompt) - 1 + image.n_visual + max_new_tokens)


def describe(model: Any, image: Image.Image | str | Path | EncodedImage,
             prune: str = "cls_attention", keep: Keep = "50%", mode: str = "gap",
             seed: int = 0, *, max_new_tokens: int = MAX_NEW_TOKENS,
             drafts: bool = True) -> Answered:
    """Say what is in a picture; the arguments are those of `ground`."""
    return ground(model, image, DESCRIBE, prune, keep, mode, seed, max_new_tokens=max_new_tokens,
                  drafts=drafts, question=DESCRIBE)
