"""A cache for training: the rows of a prefix that several sequences continue, with gradients.

All questions about an image share the image, and all images share the system sentence: each is run
once.  On a CPU that makes a step several times shorter.
Letters: B sequences, G key-value heads, T new tokens, R rows with them, D head dim, C channels.
"""

import torch
from torch import Tensor

from nanogap.llama import LlamaModel


class SharedPast:
    """Keys and values of new tokens, behind those of the sequences that they continue.

    past:    what they continue; None: nothing
    parents: (B,) which sequence of `past` each of them continues
    """

    def __init__(self, past: "SharedPast | None" = None, parents: Tensor | None = None) -> None:
        self.past = past
        self.parents = parents
        self.rows: list[tuple[Tensor, Tensor]] = []   # (B, G, R, D) each, per layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, G, T, D) behind the rows of the past; return all rows (B, G, R, D)."""
        if self.past is not None:
            old_k, old_v = self.past.rows[layer]
            k = torch.cat([old_k[self.parents], k], dim=2)                    # (B, G, R, D)
            v = torch.cat([old_v[self.parents], v], dim=2)
        self.rows.append((k, v))
        return k, v

    @property
    def shape(self) -> tuple[int, int]:
        """B and R, once its tokens were run."""
        keys, _ = self.rows[0]
        return keys.shape[0], keys.shape[2]


def run(decoder: LlamaModel, x: Tensor, cache: SharedPast) -> Tensor:
    """Tokens (B, T, C) behind those that they continue -> hidden states (B, T, C).

    Nothing is pruned in training, so that the position ID of a token is its row.
    """
    _, before = cache.past.shape if cache.past is not None else (0, 0)
    rows = torch.arange(before + x.shape[1], device=x.device)                 # (R,)
    new = rows[before:]                                                       # (T,)
    mask = rows <= new[:, None]                                               # (T, R)
    return decoder(x, new, cache, mask)                               # type: ignore[arg-type]
