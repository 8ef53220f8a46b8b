"""The paper's argument on any weights: is it the missing tokens that break grounding, or the IDs?

In:  a look at an image, an expression, and a case.  Out: what the model says in that case.

WHOLE removes nothing and gives out other position IDs, or feeds the patches in another order;
PRUNED crosses the order of the kept patches with their IDs.  Both also move the text after the
image, so that its IDs collide with those of patches or do not.  RoPE sees differences of IDs alone:
"image and text + 100" leaves all of them as they were but those to the text before the image.
Source: arXiv 2506.21873 tells the causes apart like this; the cases are this project's.
Letters: P tokens before the image, N patches, K of them kept, A tokens after it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, arange

from nanogap.ground import MAX_NEW_TOKENS, in_pixels
from nanogap.image import Box
from nanogap.models.llava import Llava, Look
from nanogap.prompt import parse_box
from nanogap.prune import STRATEGIES

RANKINGS = ("random", "cls_attention")   # strategies that rank patches and do nothing else to them

# (N, k) -> the patches in the order of the sequence, the ID of each, the ID of the text after them;
# k is the kept patches' raster indices as they are ranked, and IDs count from the image's first
Case = Callable[[int, Tensor], tuple[Tensor, Tensor, int]]


def raster(k: Tensor) -> Tensor:
    """The kept patches in raster order."""
    return k.sort().values


def count(k: Tensor) -> Tensor:
    """0, 1, 2, ...: compact IDs, without gaps."""
    return arange(len(k))


WHOLE: dict[str, Case] = {                           # k: all N patches, in random order
    "nothing changed":          lambda N, k: (raster(k), count(k), N),
    "IDs permuted":             lambda N, k: (raster(k), k, N),
    "order permuted":           lambda N, k: (k, k, N),
    "IDs / 4, text moved":      lambda N, k: (raster(k), count(k) // 4, N // 4),
    "IDs / 4, text not moved":  lambda N, k: (raster(k), count(k) // 4, N),
    "image and text + 100":     lambda N, k: (raster(k), count(k) + 100, N + 100),
    "text collides":            lambda N, k: (raster(k), count(k), N // 2),
    "text + 100":               lambda N, k: (raster(k), count(k), N + 100),
}
PRUNED: dict[str, Case] = {
    "raster, compact":          lambda N, k: (raster(k), count(k), len(k)),      # mode "shifted"
    "ranked, compact":          lambda N, k: (k, count(k), len(k)),              # mode "permuted"
    "ranked, original":         lambda N, k: (k, k, N),
    "raster, original":         lambda N, k: (raster(k), raster(k), N),          # mode "gap"
    "compact, text not moved":  lambda N, k: (raster(k), count(k), N),
    "original, text collides":  lambda N, k: (raster(k), raster(k), len(k)),
}


def lay_out(name: str, P: int, N: int, A: int, k: Tensor) -> tuple[Tensor, Tensor, int]:
    """One case worked out for a prompt.

    k:       (K,) raster indices, the most important first
    returns: the patches in sequence order (K,), position_ids (P + K + A,), ID of the next token
    """
    order, ids, after = (WHOLE | PRUNED)[name](N, k)
    return order, torch.cat([arange(P), P + ids, P + after + arange(A)]), P + after + A


@torch.no_grad()
def ask(model: Llava, look: Look, expression: str, prune: str, keep: int, name: str,
        seed: int) -> tuple[str, Box | None]:
    """What the model says in a case, and the box in pixels; "none" prunes nothing.

    raises: NanogapError where the largest ID is out of the model's range
    """
    input_ids, N = model.prompt(expression), len(look.seen.features)
    P, A = model.around_image(input_ids)
    generator = torch.Generator().manual_seed(seed)
    rank = STRATEGIES["random" if prune == "none" else prune]
    ranked = rank(look.seen, keep, generator).keep.cpu()
    order, position_ids, next_position = lay_out(name, P, N, A, ranked)
    model.check_length(next_position + MAX_NEW_TOKENS)
    visual = model.multi_modal_projector(look.seen.features[order.to(model.device)])     # (K, C)
    tokens = model.generate(model.splice(input_ids, visual), position_ids.to(model.device),
                            next_position, MAX_NEW_TOKENS)
    text = model.tokenizer.decode(tokens)
    return text, in_pixels(parse_box(text), look.width, look.height)
