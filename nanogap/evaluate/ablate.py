"""The paper's argument on any weights: is it the missing tokens that break grounding, or the IDs?

A case of WHOLE removes no token: it changes the IDs of the visual tokens, their order, or the IDs
of the text after them.  RoPE sees differences of IDs only, so "image and text + 100" moves the text
before the image away, and nothing else.  PRUNED names the modes (gap.py) of a pruned sequence.
Source: arXiv 2506.21873 tells the causes apart like this; the cases are this project's.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, arange

from nanogap.evaluate.score import TIMES
from nanogap.gap import Layout
from nanogap.ground import MAX_NEW_TOKENS, Answer, Result, greedy, ground
from nanogap.llava import EncodedImage, Llava
from nanogap.models import VLM

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


def ask(model: VLM, image: EncodedImage, expression: str, name: str, seed: int,
        max_new_tokens: int = MAX_NEW_TOKENS) -> Result:
    """What the model says in a case of WHOLE; its times are not taken.

    seed:   of the random order
    raises: NanogapError where the largest ID is out of the model's range
    """
    P, A = model.around_image(model.prompt(expression))
    N = image.n_visual
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(seed))   # (N,)
    layout = lay_out(name, P, N, A, shuffled)
    model.check_length(layout.next_position + max_new_tokens)

    def decode(model: Llava, x: Tensor, full: Layout, most: int) -> Answer:
        x[:, P:P + N] = x[:, P:P + N][:, layout.order]                        # (1, P + N + A, C)
        return greedy(model, x, layout, most)

    result = ground(model, image, expression, mode="full", max_new_tokens=max_new_tokens,
                    decode=decode)
    return replace(result, timings=dict.fromkeys(TIMES))
