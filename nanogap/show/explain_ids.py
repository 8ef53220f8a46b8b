"""What a pruning program did to its position IDs, in one sentence: a check for code of your own.

In:  the IDs of the unpruned prompt, and those that reached RoPE after pruning.
Out: a sentence such as "shifted: the patches are numbered 3 to 6 without gaps; the text ...".

This file imports torch and nothing else: copy it into any repository.  Take the IDs where RoPE
reads them, with a hook on the module that makes angles of them (rotary_emb in transformers): many
programs make position IDs that never arrive there.
Letters: P tokens before the image, N visual tokens, K of them fed, A tokens after it; D numbers in
an ID: 1, or 3 with M-RoPE.
"""

import torch
from torch import Tensor

NAMES = {1: ("ID",), 3: ("time", "height", "width")}


def explain_ids(ids_of_all: Tensor, ids_fed: Tensor, n_before: int, n_visual: int, n_after: int,
                keep: Tensor | None = None, answer: int | None = None) -> str:
    """Say what became of the position IDs of a prompt with one image when it was pruned.

    ids_of_all: (P + N + A,) or (3, P + N + A) before pruning
    ids_fed:    (P + K + A,) or (3, P + K + A) after it, in the order of the sequence
    keep:       (K,) raster index of each visual token, in the order of the sequence; -1 for one
                that the method added.  Without it patches are told by their IDs, and IDs without
                gaps are taken for new ones
    answer:     ID of the first generated token, as it reached RoPE
    raises:     ValueError where the numbers of tokens do not fit
    """
    old, new = by_rows(ids_of_all), by_rows(ids_fed)                          # (D, T), (D, T')
    P, N, K = n_before, n_visual, new.shape[1] - n_before - n_after
    if old.shape[1] != P + N + n_after or len(old) != len(new) or K < 0:
        raise ValueError(f"IDs of shapes {tuple(ids_of_all.shape)} and {tuple(ids_fed.shape)} do "
                         f"not belong to {P} tokens, {N} visual tokens and {n_after} tokens")
    if keep is not None and len(keep) != K:
        raise ValueError(f"keep has {len(keep)} indices, and {K} visual tokens are fed")
    if not torch.equal(old[:, :P], new[:, :P]):
        return "other: the text before the image has other IDs than it had before pruning."
    patches, patch_clause = explain_patches(old[:, P:P + N], new[:, P:P + K], P, keep)
    text, text_clause = explain_text(old[:, P + N:], new[:, P + K:], new[:, P:P + K])
    reply, answer_clause = explain_answer(old, new, answer)
    name = patches
    if patches == "kept":
        name = text or reply or "kept"
    elif patches in ("shifted", "permuted") and not text:
        name = f"{patches}, text not moved"
    clauses = [clause for clause in (patch_clause, text_clause, answer_clause) if clause]
    return f"{name}: {'; '.join(clauses)}."


def by_rows(ids: Tensor) -> Tensor:
    """IDs as (D, T), on the CPU."""
    if ids.dim() not in (1, 2) or ids.dim() == 2 and len(ids) not in NAMES:
        raise ValueError(f"IDs of shape {tuple(ids.shape)}: give one prompt's, (T,) or (3, T)")
    return ids.detach().cpu().reshape(-1, ids.shape[-1])


def explain_patches(old: Tensor, new: Tensor, P: int, keep: Tensor | None) -> tuple[str, str]:
    """What became of the visual tokens, (D, N) and (D, K): a name, and a clause."""
    compact = torch.equal(new, (P + torch.arange(new.shape[1])).expand_as(new))
    pruned = 0 < new.shape[1] < old.shape[1]
    span = f"the patches are numbered {ends(new)} without gaps"
    if keep is None and compact and pruned:
        return "shifted", f"{span} (or permuted: give keep to tell)"
    keep = told_by_ids(old, new) if keep is None else keep.cpu()
    if keep is None:
        return "other", f"some patches have IDs that no patch had ({ends(new)})"
    own = keep >= 0
    added = f" ({int((~own).sum())} of them added)" if not own.all() else ""
    raster = bool((keep[own].diff() > 0).all())
    right = (new[:, own] == old[:, keep[own]]).all(1)                         # (D,)
    if right.all() and raster:
        return "kept", f"every patch keeps its ID{added}"
    if right.all():
        return "ranked", ("every patch keeps its ID, but the patches are not fed in the order of "
                          f"the image{added}, so each of them sees others than before")
    if compact and raster:
        return "shifted", span + added
    if compact:
        return "permuted", f"{span}, and not fed in the order of the image{added}"
    if right.any():
        names = NAMES[len(old)]
        wrong = " and ".join(names[d] for d in range(len(names)) if not right[d])
        return f"{wrong} renumbered", f"the patches keep their IDs but for {wrong}{added}"
    return "other", f"the patches have other IDs than before pruning ({ends(new)})"


def told_by_ids(old: Tensor, new: Tensor) -> Tensor | None:
    """Which patches these are, by their IDs, or by all but the first of three; None for neither."""
    for skip in range(len(old) - 1) or [0]:
        same = (old[skip:, None, :] == new[skip:, :, None]).all(0)            # (K, N)
        if same.any(1).all():
            return same.int().argmax(1)
    return None


def explain_text(old: Tensor, new: Tensor, patches: Tensor) -> tuple[str, str]:
    """What became of the text after the image, (D, A) both: a name, "" if nothing; and a clause."""
    if torch.equal(old, new):
        return "", "the text after them keeps its IDs" if old.numel() else ""
    moved = (new - old).unique(dim=1)                                         # (D, 1) as one piece
    if moved.shape[1] > 1:
        return "text renumbered", "the IDs of the text after them do not rise together any more"
    clause = f"the text after them begins at {first(new)} instead of {first(old)}"
    if patches.numel() and bool((new.amin(1) <= patches.amax(1)).any()):
        return "text collides", f"{clause}, among the IDs of the patches ({ends(patches)})"
    return "text moved", clause


def explain_answer(old: Tensor, new: Tensor, answer: int | None) -> tuple[str, str]:
    """Where the answer begins: a name, "" if where it did before pruning; and a clause."""
    if answer is None:
        return "", ""
    right, cached = int(old.max()) + 1, new.shape[1]
    if answer == right:
        return "", f"the answer begins at {right}"
    last = int(new[:, -1].max())
    if answer == last + 1:
        return "answer moved", (
            f"the answer begins behind the last token, at {answer} instead of {right}")
    if answer == last:
        return "answer repeats the last ID", (
            f"the answer begins at {answer}, where the prompt's last token stands, not at {right}")
    if answer == cached:
        return "answer counted from the cache", (
            f"the answer begins at {answer}, the length of the cache, instead of {right}")
    if answer == cached + right - old.shape[1]:
        return "answer counted from the cache", (
            f"the answer begins at {answer}, the length of the cache plus the unpruned prompt's "
            f"rope_deltas, instead of {right}")
    return "answer moved", f"the answer begins at {answer} instead of {right}"


def first(ids: Tensor) -> str:
    """The first of IDs: one number where all of its numbers are the same."""
    numbers = ids[:, 0].tolist()
    return str(numbers[0] if len(set(numbers)) == 1 else tuple(numbers))


def ends(ids: Tensor) -> str:
    """The smallest and the largest of IDs."""
    return f"{int(ids.min())} to {int(ids.max())}" if ids.numel() else "nothing"
