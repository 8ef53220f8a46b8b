"""The paper's argument on any weights: is it the missing tokens that break grounding, or the IDs?

In:  an encoded image, an expression, and a case.  Out: what the model says in that case.

A case of WHOLE removes no token.  It gives other position IDs to the visual tokens, or feeds them
in another order, or moves the text after the image, so that its IDs collide with those of patches
or do not.  RoPE sees differences of IDs only: "image and text + 100" leaves all differences as they
were, except those to the text before the image.  What can be asked of a pruned sequence is a mode
(gap.py): PRUNED names these modes.
Source: arXiv 2506.21873 tells the causes apart like this; the cases are this project's.
Letters: P tokens before the image, N visual tokens, A tokens after it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, arange

from nanogap.gap import Layout
from nanogap.ground import MAX_NEW_TOKENS, greedy
from nanogap.image import Box
from nanogap.llava import EncodedImage
from nanogap.models import VLM
from nanogap.prune import Kept

# (N, k) -> the visual tokens in the order of the sequence, the ID of each, and the ID of the text
# after them; k is all N of them in random order, and IDs count from the image's first
Case = Callable[[int, Tensor], tuple[Tensor, Tensor, int]]

WHOLE: dict[str, Case] = {
    "nothing changed":          lambda N, k: (arange(N), arange(N), N),
    "IDs permuted":             lambda N, k: (arange(N), k, N),
    "order permuted":           lambda N, k: (k, k, N),
    "IDs / 4, text moved":      lambda N, k: (arange(N), arange(N) // 4, N // 4),
    "IDs / 4, text not moved":  lambda N, k: (arange(N), arange(N) // 4, N),
    "image and text + 100":     lambda N, k: (arange(N), arange(N) + 100, N + 100),
    "text collides":            lambda N, k: (arange(N), arange(N), N // 2),
    "text + 100":               lambda N, k: (arange(N), arange(N), N + 100),
}
PRUNED = ("shifted", "permuted", "ranked, original", "gap", "compact, text not moved",
          "original, text collides")


def lay_out(name: str, P: int, N: int, A: int, k: Tensor) -> Layout:
    """One case of WHOLE, worked out for a prompt.

    k: (N,) all visual tokens in random order
    """
    order, ids, after = WHOLE[name](N, k)
    position_ids = torch.cat([arange(P), P + ids, P + after + arange(A)])     # (P + N + A,)
    return Layout(order, order, position_ids, P + after + A)


@torch.no_grad()
def ask(model: VLM, image: EncodedImage, expression: str, name: str, seed: int,
        max_new_tokens: int = MAX_NEW_TOKENS) -> tuple[str, Box | None, bool]:
    """What the model says in a case of WHOLE, the box in pixels, and whether it was cut off.

    seed:   of the random order
    raises: NanogapError where the largest ID is out of the model's range
    """
    input_ids = model.prompt(expression)                                      # (P + 1 + A,)
    P, A = model.around_image(input_ids)
    N = image.n_visual
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(seed))   # (N,)
    layout = lay_out(name, P, N, A, shuffled)
    model.check_length(layout.next_position + max_new_tokens)
    x = model.embed(input_ids, image, Kept(arange(N)), layout.order)          # (1, P + N + A, C)
    tokens = greedy(model, x, layout, max_new_tokens).tokens
    text = model.tokenizer.decode(tokens)
    return text, model.box_in(text, image.width, image.height), tokens[-1] not in model.end_tokens
