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

from nanogap.checks.command import NanogapError, shown

# the order of the kept tokens, their IDs, the IDs of the text after them
MODES = {
    "full":                    ("raster", "original", "original"),   # nothing is pruned
    "shifted":                 ("raster", "compact",  "compact"),
    "permuted":                ("ranked", "compact",  "compact"),
    "gap":                     ("raster", "original", "original"),
    # one choice at a time: chapter 12 of the tutorial
    "ranked, original":        ("ranked", "original", "original"),
    "compact, text not moved": ("raster", "compact",  "original"),
    "original, text collides": ("raster", "original", "compact"),
}


@dataclass(frozen=True)
class Layout:
    """Which token stands where."""

    keep: Tensor             # (K,) raster indices, in the order of the sequence
    order: Tensor            # (K,) which of the kept tokens, as they were ranked, comes where
    position_ids: Tensor     # (P + K + M + A,) what RoPE sees
    next_position: int       # ID of the first generated token
    P: int
    N: int
    A: int
    mode: str

    @property
    def visual_tokens(self) -> int:
        """K + M: how many visual tokens are fed."""
        return len(self.position_ids) - self.P - self.A


def lay_out(keep: Tensor, P: int, N: int, A: int, mode: str, M: int = 0) -> Layout:
    """Order and number the tokens of [before | kept, in order | added | after] in one of MODES.

    keep:    (K,) raster indices of the kept visual tokens, the most important first
    M:       tokens that a method adds, such as the mean of the dropped ones
    raises:  NanogapError for an unknown mode, for an index outside the image or given twice, and
             where mode "full" is asked of fewer than all the tokens
    open:    an added token had no ID before pruning, and the paper does not say what it gets; with
             original IDs it shares that of the last patch here
    """
    check(keep, N, mode)
    sequence, visual_ids, text_ids = MODES[mode]
    order = keep.argsort() if sequence == "raster" else arange(len(keep), device=keep.device)
    keep = keep[order]
    original = torch.cat([keep, keep.new_full((M,), N - 1)])
    compact = arange(len(original), device=keep.device)
    visual = original if visual_ids == "original" else compact    # GAP, 1: a patch keeps its ID
    length = N if text_ids == "original" else len(compact)        # GAP, 2: so does the text after
    before, after = arange(P, device=keep.device), arange(A, device=keep.device)
    position_ids = torch.cat([before, P + visual, P + length + after])
    return Layout(keep, order, position_ids, P + length + A, P, N, A, mode)


def position_ids(keep: Tensor, n_before: int, n_visual: int, n_after: int, mode: str,
                 n_added: int = 0) -> tuple[Tensor, int]:
    """The position IDs of `lay_out` alone, and the ID of the first generated token."""
    layout = lay_out(keep, n_before, n_visual, n_after, mode, n_added)
    return layout.position_ids, layout.next_position


def keep_ids(ids_of_all: Tensor, stays: Tensor) -> tuple[Tensor, int]:
    """GAP for IDs of any dimension: what stays keeps its ID, and the answer comes after them all.

    ids_of_all: (T,) or (3, T) position IDs of one unpruned prompt; three are those of M-RoPE
    stays:      (T',) indices of the tokens that stay, text included, in the order of the prompt
    returns:    their IDs (T',) or (3, T'), and the ID of the first generated token
    """
    return ids_of_all[..., stays], int(ids_of_all.max()) + 1


def check(keep: Tensor, N: int, mode: str) -> None:
    """Refuse what no model could be fed: see `lay_out`."""
    check_mode(mode)
    inside = keep.numel() == 0 or 0 <= int(keep.min()) <= int(keep.max()) < N
    if keep.dim() != 1 or keep.dtype != torch.long or not inside:
        raise NanogapError(f"keep must be a list of raster indices from 0 to {N - 1}")
    if len(keep.unique()) != len(keep):
        raise NanogapError("keep names a patch twice")
    if mode == "full" and len(keep) != N:
        raise NanogapError(f"mode 'full' keeps all {N} visual tokens, not {len(keep)}")


def check_mode(mode: str) -> None:
    """Refuse a mode that there is not."""
    if not isinstance(mode, str) or mode not in MODES:
        raise NanogapError(f"unknown mode {shown(mode)}: choose from {'; '.join(MODES)}")
