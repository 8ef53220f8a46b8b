"""What a pruning program did to its position IDs, in one sentence: a check for code of your own.

This file imports torch and nothing else: copy it into any repository.
RoPE sees differences of IDs only.  So where all IDs are moved by one number, "instead of" names
what would be right with that number, and a last clause names the number.
Letters: P tokens before the image, N visual tokens, K of them fed, A tokens after it; D numbers in
an ID: 1, or 3 with M-RoPE.
"""

import torch
from torch import Tensor, arange, nn

NAMES = {1: ("ID",), 3: ("time", "height", "width")}
NOT_BEFORE = "other: the text before the image has other IDs than it had before pruning"


class catch_ids(list[Tensor]):
    """The IDs that reach RoPE in a model of transformers: (1, T) or (3, 1, T) for each pass.

        with catch_ids(model) as passes:
            model.generate(...)
        explain_ids(ids_of_all, passes[0], P, N, A, keep, answer=passes[1])
    """

    def __init__(self, model: nn.Module) -> None:
        decoder = getattr(model, "get_decoder", lambda: model)()   # the vision tower has its own
        rotary = [m for name, m in decoder.named_modules() if name.endswith("rotary_emb")]
        self.handle = rotary[0].register_forward_pre_hook(self.note, with_kwargs=True)
        self.kind: object = None

    def note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        _, ids, kind = [*args, *kwargs.values(), None][:3]
        self.kind = self.kind or kind            # Gemma3 asks once for each kind of its layers
        if kind == self.kind:
            self.append(ids.clone())

    def __enter__(self) -> "catch_ids":
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def explain_ids(ids_of_all: Tensor | list, ids_fed: Tensor | list, n_before: int, n_visual: int,
                n_after: int, keep: Tensor | list | None = None,
                answer: Tensor | list | int | None = None) -> str:
    """Say what became of the position IDs of a prompt with one image when it was pruned.

    ids_of_all: (P + N + A,) or (3, P + N + A) before pruning, or with a batch of 1: (1, ...),
                (3, 1, ...).  A prompt behind a cache: with the tokens that the cache holds
    ids_fed:    the same of P + K + A tokens after it, in the order of the sequence
    keep:       (K,) raster index of each visual token, in the order of the sequence; -1 for one
                that the method added.  Without it is said what the IDs alone can tell
    answer:     ID of the first generated token, as it reached RoPE: one number, or D
    raises:     ValueError where the numbers of tokens do not fit
    """
    old, new = by_rows(ids_of_all), by_rows(ids_fed)                          # (D, T), (D, T')
    P, N, K = n_before, n_visual, new.shape[1] - n_before - n_after
    if old.shape[1] != P + N + n_after or len(old) != len(new) or K < 0:
        raise ValueError(f"IDs of shapes {tuple(old.shape)} and {tuple(new.shape)} do not belong "
                         f"to {P} tokens, {N} visual tokens and {n_after} tokens")
    whose = None if keep is None else check_keep(torch.as_tensor(keep).cpu().flatten(), K, N)
    moved = how_far(old, new, P, K, whose)
    right = old + moved                              # what is right if all are moved by that number
    if not torch.equal(new[:, :P], right[:, :P]):
        return f"{NOT_BEFORE} ({first_wrong(new[:, :P], right[:, :P], 0)})."
    text, text_clause = explain_text(right[:, P:], new[:, P:], N, K, P, old)
    patches, clause = explain_patches(right[:, P:P + N], new[:, P:P + K], P, whose, bool(text))
    if patches == "other" and moved.any():
        return f"{NOT_BEFORE} ({first_wrong(new[:, :P], old[:, :P], 0)})."
    reply, answer_clause = explain_answer(old, right, new, n_after, answer)
    name = patches
    if patches == "kept":
        name = text or reply or "kept"
    elif patches in ("shifted", "permuted") and n_after and not text:
        name = f"{patches}, text not moved"
    if name == "text moved" and whose is None and K and not P:  # nothing tells these two apart
        step = new[:, K:K + 1] - old[:, N:N + 1]
        if same_ids(old[:, :N] + step, new[:, :K]).any(1).all():
            name = "kept or text moved"
            text_clause += ", which is right if all IDs are moved alike"
    clauses = [clause, text_clause, answer_clause]
    if moved.any():
        behind = bool(old.min() > 0)                 # something may stand before the first of them
        name += " unless behind a cache" if behind and name == "kept" else ""
        sees = "sees only where a cache stands before them" if behind else "does not see"
        clauses.append(f"all IDs are moved by {say(moved[:, 0])}, which RoPE {sees}")
    return f"{name}: {'; '.join(c for c in clauses if c)}."


def by_rows(ids: Tensor | list) -> Tensor:
    """IDs as (D, T), on the CPU."""
    rows = torch.as_tensor(ids).detach().cpu().double()
    if rows.dim() == 3 and rows.shape[1] == 1:
        rows = rows[:, 0]
    if rows.dim() not in (1, 2) or rows.dim() == 2 and len(rows) not in NAMES:
        raise ValueError(f"IDs of shape {tuple(rows.shape)}: give one prompt's, (T,) or (3, T)")
    return rows.reshape(-1, rows.shape[-1])


def check_keep(keep: Tensor, K: int, N: int) -> Tensor:
    """Refuse indices that do not tell which patches are fed."""
    if len(keep) != K:
        raise ValueError(f"keep has {len(keep)} indices, and {K} visual tokens are fed")
    own = keep[keep != -1]
    if K and not -1 <= int(keep.min()) <= int(keep.max()) < N or len(own.unique()) != len(own):
        raise ValueError(f"keep has raster indices from 0 to {N - 1}, each once, "
                         "and -1 for a token that the method added")
    return keep


def how_far(old: Tensor, new: Tensor, P: int, K: int, keep: Tensor | None) -> Tensor:
    """The number by which all IDs are moved (D, 1): that of the text before the image, if any."""
    N = old.shape[1] - new.shape[1] + K
    none = torch.zeros_like(old[:, :1])
    steps = new[:, :P] - old[:, :P]
    if not P:
        known = torch.full((K,), -1) if keep is None else keep
        own = known >= 0
        patches = new[:, :K][:, own] - old[:, known[own]]
        steps = torch.cat([patches, new[:, K:] - old[:, N:]], 1)
        if (known[own].diff() != 1).any() and (steps != steps[:, :1]).any():
            steps = patches                          # the text alone is somewhere else
    if not steps.numel() or (steps != steps[:, :1]).any():
        return none
    if keep is None and not P and K:                 # then the patches must say so, and no other
        stay, move = (same_ids(old[:, :N] + by, new[:, :K]).any(1).all()
                      for by in (none, steps[:, :1]))
        return steps[:, :1] if move and not stay else none
    return steps[:, :1]


def same_ids(right: Tensor, new: Tensor) -> Tensor:
    """Which of the fed tokens have the ID of which patch: (K, N), from (D, N) and (D, K)."""
    return (right[:, None, :] == new[:, :, None]).all(0)


# ----- the patches --------------------------------------------------------------------------------


def explain_patches(right: Tensor, new: Tensor, P: int, keep: Tensor | None,
                    text_moved: bool) -> tuple[str, str]:
    """What became of the visual tokens, (D, N) and (D, K): a name, and a clause."""
    K = new.shape[1]
    if not K:
        return "kept", "no patch is fed" if right.numel() else ""
    base = right[:, :1] if P and right.numel() else new[:, :1]
    compact = torch.equal(new, base[:1] + arange(K).expand_as(new))
    span = f"the patches are numbered {ends(new)} without gaps"
    if keep is None:
        return by_ids_alone(right, new, P, span if compact else "", text_moved)
    own = keep >= 0
    added = f" ({int((~own).sum())} of them added)" if not own.all() else ""
    raster = bool((keep[own].diff() > 0).all())
    expected = new.clone()                                                    # (D, K)
    expected[:, own] = right[:, keep[own]]           # of an added token any ID is right
    good = new == expected
    if own.any() and good.all():
        return ("kept", f"every patch keeps its ID{added}") if raster else (
            "ranked", "every patch keeps its ID, but the patches are not fed in the order of the "
            f"image{added}, so each of them sees others than before")
    if compact:
        return ("shifted", span + added) if raster else (
            "permuted", f"{span}, and not fed in the order of the image{added}")
    if not own.any():
        return "kept", f"no patch is fed, but {K} added tokens ({ends(new)})"
    if good.all(1).any():
        dims = " and ".join(n for n, d in zip(NAMES[len(new)], good.all(1), strict=True) if not d)
        dealt = f", which are those of the first {K}" if torch.equal(new, right[:, :K]) else ""
        return f"{dims} renumbered", f"the patches keep their IDs but for {dims}{dealt}{added}"
    return "other", ("the patches have other IDs than before pruning "
                     f"({ends(new)}; {first_wrong(new, expected, P)})")


def by_ids_alone(right: Tensor, new: Tensor, P: int, span: str,
                 text_moved: bool) -> tuple[str, str]:
    """The same without `keep`; span: what is said where there are no gaps."""
    K = new.shape[1]
    if torch.equal(right, new):
        return "kept", "the visual tokens have the IDs of all patches, in their order"
    same = same_ids(right, new)                                               # (K, N)
    known = same.any(1)
    if span and not text_moved and known.all():
        return "kept or shifted", f"{span}, as {K} patches were: give keep to tell"
    if span:
        return "shifted", f"{span} (or permuted: give keep to tell)"
    if known.all() and (same.int().argmax(1).diff() >= 0).all():
        return "kept", ("the visual tokens have IDs of patches, in the order of the image "
                        "(whether each has its own: give keep to tell)")
    if known.all():
        return "ranked", "the visual tokens have IDs of patches, not in the order of the image"
    if len(new) == 3 and same_ids(right[1:], new[1:]).any(1).all():
        return "time renumbered", "the visual tokens have height and width of patches, but not time"
    first = int(known.int().argmin())
    return "other", (f"some patches have IDs that no patch had ({ends(new)}; first at place "
                     f"{P + first}: {say(new[:, first])})")


# ----- the text and the answer --------------------------------------------------------------------


def explain_text(right: Tensor, new: Tensor, N: int, K: int, P: int,
                 old: Tensor) -> tuple[str, str]:
    """What became of the text after the image: a name, "" if nothing; and a clause.

    right, new: (D, N + A) and (D, K + A), patches and text;  old: (D, T) of the unpruned prompt
    """
    patches, before, after = new[:, :K], right[:, N:], new[:, K:]
    if torch.equal(before, after):
        return "", "the text after them keeps its IDs" if after.numel() else ""
    steps = after - before                                                    # (D, A)
    j = int((steps != steps[:, :1]).any(0).int().argmax())                    # 0: all move as one
    place, begins = P + K + j, say(after[:, j])
    if j and (steps[:, :j].any() or (steps[:, j:] != steps[:, j:j + 1]).any()):
        return "text renumbered", (
            "the IDs of the text after them do not rise together any more "
            f"({first_wrong(after, before + steps[:, :1], P + K)})")
    if j:
        goes_on = f"at place {place} the text goes on at {begins}"
        instead = f"instead of {say(before[:, j])}"
        for row, words in counted(place, "the number of tokens before it", old).items():
            if (after[:, j] == row).all():
                return "text counted from the cache", f"{goes_on}, {words}, {instead}"
        return "text moved", f"{goes_on} {instead}"
    clause = f"the text after them begins at {begins} instead of {say(before[:, 0])}"
    if K and (after.amin(1) <= patches.amax(1)).any():
        inside = bool((after.amax(1) >= patches.amin(1)).all())
        return "text collides", (
            f"{clause}, {'among' if inside else 'before'} the IDs of the patches ({ends(patches)})")
    return "text moved", clause


def explain_answer(old: Tensor, right: Tensor, new: Tensor, A: int,
                   answer: Tensor | list | int | None) -> tuple[str, str]:
    """Where the answer begins: a name, "" if where it did before pruning; and a clause."""
    if answer is None:
        return "", ""
    D, rows = new.shape
    begins = torch.as_tensor(answer).cpu().double().flatten()
    if len(begins) not in (1, D):
        raise ValueError(f"answer has {len(begins)} numbers, and an ID has {D}")
    begins = begins.expand(D)
    clause = f"the answer begins at {say(begins)}"
    largest, behind = old.max() + 1 + right[:, 0] - old[:, 0], right[:, -1] + 1        # (D,) each
    if torch.equal(begins, largest):
        return "", clause
    instead = f"instead of {say(largest)}"
    if not torch.equal(largest, behind):             # a prompt that ends with its image; a video
        instead += f", or {say(behind)} where programs count from the last token"
        if torch.equal(begins, behind):
            return "", f"{clause}, behind the last token (behind the largest ID: {say(largest)})"
    if torch.equal(begins, new[:, -1] + 1):
        return "answer moved", (
            f"the answer begins behind the last token, at {say(begins)} {instead}")
    cases = [words for row, words in counted(rows, "the length of the cache", old).items()
             if (begins == row).all()]
    if torch.equal(begins, new[:, -1]):
        cases.insert(0, "where the prompt's last token stands")
    if cases:
        names = ["answer repeats the last ID" if "token" in words else
                 "answer counted from the cache" for words in cases]
        return " or ".join(dict.fromkeys(names)), (
            f"{clause}, {', which is also '.join(cases)}, {instead}")
    clause += f" {instead}"
    text = right[:, right.shape[1] - A:] if A else right[:, :1] + rows
    if D == 3 and (begins == begins[0]).all() and begins[0] < text.min():
        clause += f", as rope_deltas of {say(begins[:1] - rows)}, another prompt's, would have it"
    return "answer moved", clause


def counted(row: int, words: str, old: Tensor) -> dict[int, str]:
    """IDs that a row of the cache gets where rows are counted, and in words what is counted."""
    deltas = int(old.max()) + 1 - old.shape[1]       # the unpruned prompt's next ID less its length
    what = "rope_deltas" if len(old) == 3 else f"offset of {deltas}"
    return {row + deltas: f"{words} plus the unpruned prompt's {what}", row: words}


# ----- words --------------------------------------------------------------------------------------


def say(number: Tensor) -> str:
    """An ID (D,): one number where all of its numbers are the same."""
    numbers = [f"{n:.10g}" for n in number.tolist()]
    return numbers[0] if len(set(numbers)) == 1 else f"({', '.join(numbers)})"


def ends(ids: Tensor) -> str:
    """The smallest and the largest of IDs."""
    return f"{ids.min():.10g} to {ids.max():.10g}"


def first_wrong(ids: Tensor, right: Tensor, start: int) -> str:
    """The first of some tokens whose ID is wrong; start: the place where they begin."""
    i = int((ids != right).any(0).int().argmax())
    return f"first at place {start + i}: {say(ids[:, i])} instead of {say(right[:, i])}"
