"""One question, from a picture and an expression to a box in pixels.

In:  a model, a picture, an expression, and how to prune.
Out: the words, the box, and every number that pruning touched on the way.

`ground` is the whole path in one function:
    encode     llava.py     the picture as N visual tokens
    ask        prompt.py    the question as token IDs, one of them the image's
    select     prune.py     which visual tokens stay
    lay out    gap.py       in which order, at which position IDs
    embed      llava.py     the prompt with these tokens in the place of its image
    decode     below        one pass over the prompt, and then one for each token of the answer
    read       prompt.py    the box in it
Letters: P tokens before the image, N visual, K kept, M added, A after it; T = P + K + M + A.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanogap.errors import NanogapError
from nanogap.gap import Layout, lay_out
from nanogap.image import Box
from nanogap.llama import KVCache
from nanogap.llava import EncodedImage, Llava, clock_ms
from nanogap.prune import Kept, budget_of

MAX_NEW_TOKENS = 64   # a box and the end token are 25, and a sentence may stand before it
NOT_FINITE = ("the model computes numbers that are not finite (infinite, or NaN): its weights hold "
              "such, or overflow in this dtype; give --dtype float32, or other weights")
Keep = Any    # int | str | None | (K,) Tensor or list: see `ground`


@dataclass(frozen=True)
class Answer:
    """What decoding gives back."""
    tokens: list[int]         # what was generated, the end token included
    prefill_ms: float         # until the first of them
    passes: int               # of the decoder behind that
    kv_bytes: int             # the cache in the end: keys and values of all rows in use


@dataclass(frozen=True)
class Result:
    """An answer, and every number on the way to it."""
    box: Box | None           # pixels of the original image; None where the text holds no box
    text: str                 # what the model said
    keep: Tensor              # (K,) raster indices of the tokens that it saw, in sequence order
    visual_tokens: float      # K + M: what the decoder was fed
    position_ids: Tensor      # (T,) the prompt as RoPE saw it
    next_position: int        # ID of the first generated token
    tokens: list[int]         # what it generated, the end token included
    timings: dict             # vision_ms, prefill_ms, decode_ms, new_tokens, passes
    kv_bytes: int             # the cache in the end
    cut_off: bool             # whether the answer was cut off before its end


def ground(model: Llava, image: Image.Image | str | Path | EncodedImage, expression: str,
           prune: str = "cls_attention", keep: Keep = "50%", mode: str = "gap", seed: int = 0, *,
           max_new_tokens: int = MAX_NEW_TOKENS, question: str | None = None,
           decode: "Decode | None" = None) -> Result:
    """Find what an expression refers to.

    image:          a Pillow image, the path of one, or an EncodedImage, which questions can share
    prune, mode:    one of prune.STRATEGIES, and one of gap.MODES
    keep:           its budget in visual tokens, 64 or "25%"; None where it finds one itself; or
                    indices (K,) of your own, the most important first.  Mode "full" keeps all
    seed:           of the strategies that draw lots
    max_new_tokens: the answer is cut off there
    question:       asked in place of the model's own question for a box
    decode:         another way to read the prompt and to answer than `greedy`
    raises:         NanogapError for a mistake in any of these
    """
    with torch.no_grad():
        encoded = model.encode_image(image)                                   # N visual tokens
        start = clock_ms(model.device)
        question = question or model.template.question(expression)
        input_ids = model.encode_question(question)                           # (P + 1 + A,)
        P, A = model.around_image(input_ids)
        kept = choose(model, encoded, expression, prune, keep, mode, seed)
        layout = lay_out(kept.ranked, P, encoded.n_visual, A, mode, kept.n_added)
        x = model.embed(input_ids, encoded, kept, layout.order)               # (1, T, C)
        laid_out_ms = clock_ms(model.device) - start
        answer = (decode or greedy)(model, x, layout, max_new_tokens)
    prefill_ms = laid_out_ms + answer.prefill_ms
    timings = {"vision_ms": encoded.vision_ms, "prefill_ms": prefill_ms,
               "decode_ms": clock_ms(model.device) - start - prefill_ms,
               "new_tokens": len(answer.tokens), "passes": answer.passes}
    text = model.tokenizer.decode(answer.tokens)
    return Result(
        text=text, box=model.box_in(text, encoded.width, encoded.height),
        keep=layout.kept, visual_tokens=len(layout.kept) + kept.n_added,
        position_ids=layout.position_ids, next_position=layout.next_position,
        tokens=answer.tokens, cut_off=answer.tokens[-1] not in model.end_tokens,
        timings=timings, kv_bytes=answer.kv_bytes)


def choose(model: Llava, encoded: EncodedImage, expression: str, prune: str, keep: Keep, mode: str,
           seed: int) -> Kept:
    """Which visual tokens the decoder is fed: all, those asked for, or those of a strategy."""
    if mode == "full":
        keep = torch.arange(encoded.n_visual)
    if isinstance(keep, Tensor | list | tuple):
        return Kept(torch.as_tensor(keep).cpu())
    budget = budget_of(keep, encoded.n_patches, prune)
    return model.select(encoded, expression, prune, budget, seed)


Decode = Callable[[Llava, Tensor, Layout, int], Answer]


def greedy(model: Llava, x: Tensor, layout: Layout, max_new_tokens: int) -> Answer:
    """Read the prompt (1, T, C) in one pass, then say the likeliest token, one after the other."""
    language_model, start = model.language_model, clock_ms(x.device)
    cache = KVCache(language_model.model.config, x.shape[1] + max_new_tokens, x)
    position_ids = layout.position_ids.to(x.device)                           # (T,)
    tokens: list[int] = []
    while True:
        hidden = language_model.model(x, position_ids, cache)                 # (1, T, C)
        logits = language_model.logits(hidden[0, -1])                         # (V,)
        if not bool(logits.isfinite().all()):
            raise NanogapError(NOT_FINITE)
        tokens.append(int(logits.argmax()))
        if len(tokens) == 1:
            prefill_ms = clock_ms(x.device) - start
        if tokens[-1] in model.end_tokens or len(tokens) >= max_new_tokens:
            return Answer(tokens, prefill_ms, len(tokens) - 1, cache.bytes_in_use())
        # GAP, 3: token t of the answer stands at next_position + t, whatever the cache's length
        t = len(tokens) - 1
        position_ids = torch.tensor([layout.next_position + t], device=x.device)
        x = language_model.model.embed_tokens(torch.tensor([[tokens[t]]], device=x.device))
