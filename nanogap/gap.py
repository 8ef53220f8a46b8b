"""Position IDs after pruning: the whole contribution of GAP, on one screen.

In:  which patches were kept, and how many tokens stand before, in and after the image.
Out: one position ID per remaining token, and the ID of the first token to be generated.

Most pruning methods feed the kept tokens as if they were a shorter text: IDs 0, 1, 2, ... with no gaps
("shifted"), some of them in order of score as well ("permuted").  The model then reads places off IDs
that belong to other patches.  GAP gives every token the ID that it had before pruning, the text after
the image included.  Source: Grounding-Aware Token Pruning, arXiv 2506.21873.
"""

import torch
from torch import Tensor

MODES = {                      # order in the sequence, position IDs
    "full":     ("raster", "original"),   # nothing is pruned
    "shifted":  ("raster", "compact"),
    "permuted": ("score", "compact"),
    "gap":      ("raster", "original"),
}


def arrange(keep: Tensor, order: str) -> Tensor:
    """Put raster indices (K,) into sequence order: "raster" sorts them, "score" leaves them as ranked."""
    return keep.sort().values if order == "raster" else keep


def assign_ids(keep: Tensor, n_before: int, n_visual: int, n_after: int, ids: str,
               n_added: int = 0) -> tuple[Tensor, int]:
    """One position ID per token of [before | kept patches in sequence order | added | after].

    keep:    (K,) raster indices, 0 <= keep < n_visual
    ids:     "original", the IDs from before pruning, or "compact", consecutive numbers
    n_added: tokens that a method adds to the kept ones, such as the mean of the dropped
    returns: position_ids (n_before + K + n_added + n_after,) and the ID of the first generated token
    open:    an added token had no place before pruning, and the paper does not say what it gets; with
             original IDs it shares the last patch's here
    """
    added = keep.new_full((n_added,), n_visual - 1)
    if ids == "original":
        visual, length = torch.cat([keep, added]), n_visual                   # the two lines of GAP
    else:
        visual, length = torch.arange(len(keep) + n_added, device=keep.device), len(keep) + n_added
    before = torch.arange(n_before, device=keep.device)
    after = n_before + length + torch.arange(n_after, device=keep.device)
    return torch.cat([before, n_before + visual, after]), n_before + length + n_after


def position_ids(keep: Tensor, n_before: int, n_visual: int, n_after: int, mode: str,
                 n_added: int = 0) -> tuple[Tensor, int]:
    """Position IDs of the prompt in one of the four MODES, in the order in which that mode feeds it.

    keep:    (K,) raster indices of the kept patches, the most important first
    returns: position_ids (n_before + K + n_added + n_after,), and the ID of the first generated token
    raises:  ValueError for an unknown mode, for an index outside the image or given twice, and where
             mode "full" is asked of fewer than all the patches
    """
    check(keep, n_visual, mode)
    order, ids = MODES[mode]
    return assign_ids(arrange(keep, order), n_before, n_visual, n_after, ids, n_added)


def check(keep: Tensor, n_visual: int, mode: str) -> None:
    """Refuse what no model could be fed: see `position_ids`."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: choose from {', '.join(MODES)}")
    inside = keep.numel() == 0 or 0 <= int(keep.min()) <= int(keep.max()) < n_visual
    if keep.dim() != 1 or keep.dtype != torch.long or not inside:
        raise ValueError(f"keep must be a list of raster indices from 0 to {n_visual - 1}")
    if len(keep.unique()) != len(keep):
        raise ValueError("keep names a patch twice")
    if mode == "full" and len(keep) != n_visual:
        raise ValueError(f"mode 'full' keeps all {n_visual} visual tokens, not {len(keep)}")
