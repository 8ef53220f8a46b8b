"""Position IDs after pruning: the whole contribution of GAP, on one screen.

In:  which visual tokens were kept, and how many tokens stand before, in and after the image.
Out: their order, one position ID for each remaining token, and the ID of the first generated token.

Most pruning methods feed the kept tokens as if they were a shorter text: IDs 0, 1, 2, ... with no
gaps ("shifted"), some of them in the order of their scores as well ("permuted").  The model then
reads places off IDs that belong to other patches.  GAP gives every token the ID that it had before
pruning, the text after the image included.
Source: Grounding-Aware Token Pruning, arXiv 2506.21873.
Letters: P tokens before the image, N visual tokens, K of them kept, M added, A tokens after it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, arange

from nanogap.errors import NanogapError

# the order of the kept tokens, their IDs, the IDs of the text after them
MODES = {
    "full":                    ("raster", "original", "original"),   # nothing is pruned
    "shifted":                 ("raster", "compact",  "compact"),
    "permuted":                ("ranked", "compact",  "compact"),
    "gap":                     ("raster", "original", "original"),
    # one choice at a time, to tell which of them does the harm
    "ranked, original":        ("ranked", "original", "original"),
    "compact, text not moved": ("raster", "compact",  "original"),
    "original, text collides": ("raster", "original", "compact"),
}


@dataclass(frozen=True)
class Layout:
    """Which token stands where."""
    kept: Tensor             # (K,) raster indices of the kept tokens, in the order of the sequence
    order: Tensor            # (K,) order[i]: which token of the ranking stands i-th among them
    position_ids: Tensor     # (P + K + M + A,) what RoPE sees
    next_position: int       # ID of the first generated token


def lay_out(ranked: Tensor, P: int, N: int, A: int, mode: str, M: int = 0) -> Layout:
    """Order and number the tokens of [before | kept, in order | added | after] in one of MODES.

    ranked: (K,) raster indices of the kept visual tokens, the most important first
    M:      tokens that a method adds, such as the mean of the dropped ones.  open: they had no ID
            before, and the paper does not say what they get; here they share the last patch's
    """
    if mode not in MODES:
        raise NanogapError(f"unknown mode {mode!r:.80}: choose from {'; '.join(MODES)}")
    different = len(set(ranked.flatten().tolist()) & set(range(N))) == ranked.numel()
    if ranked.dtype != torch.long or ranked.dim() != 1 or not different:
        raise NanogapError(f"keep must name raster indices from 0 to {N - 1}, each once")
    if mode == "full" and len(ranked) != N:
        raise NanogapError(f"mode 'full' keeps all {N} visual tokens, not {len(ranked)}")
    sequence, visual_ids, text_ids = MODES[mode]
    order = ranked.argsort() if sequence == "raster" else arange(len(ranked))
    kept = ranked[order]                                                      # (K,)
    original = torch.cat([kept, kept.new_full((M,), N - 1)])                  # (K + M,)
    compact = arange(len(original))
    visual = original if visual_ids == "original" else compact    # GAP, 1: a patch keeps its ID
    length = N if text_ids == "original" else len(compact)        # GAP, 2: so does the text after
    position_ids = torch.cat([arange(P), P + visual, P + length + arange(A)])
    return Layout(kept, order, position_ids, P + length + A)      # GAP, 3 is in ground.greedy


def position_ids(keep: Tensor, n_before: int, n_visual: int, n_after: int, mode: str,
                 n_added: int = 0) -> tuple[Tensor, int]:
    """The position IDs of `lay_out` alone, and the ID of the first generated token."""
    layout = lay_out(keep, n_before, n_visual, n_after, mode, n_added)
    return layout.position_ids, layout.next_position


def keep_ids(ids_of_all: Tensor, stays: Tensor) -> tuple[Tensor, int]:
    """GAP said as indexing: number the unpruned prompt, and take the numbers of what stays.

    ids_of_all: (T,) or (3, T) position IDs of one unpruned prompt; three for M-RoPE (Qwen2-VL)
    stays:      (T',) indices of the tokens that stay, text included, in the order of the prompt
    returns:    their IDs (T',) or (3, T'), and the ID of the first generated token
    """
    return ids_of_all[..., stays], int(ids_of_all.max()) + 1
