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
    P, N, A = n_before, n_visual, n_after
    K = new.shape[1] - P - A
    if old.shape[1] != P + N + A or len(old) != len(new) or K < 0 or not N:
        raise ValueError(f"IDs of shapes {tuple(old.shape)} and {tuple(new.shape)} do not belong "
                         f"to {P} tokens, {N} visual tokens and {A} tokens")
    whose = None if keep is None else check_keep(keep, K, N)
    was, now = old.split([P, N, A], 1), new.split([P, K, A], 1)        # before, in, after the image
    moved, or_not = how_far(was, now, whose)
    right = [part + moved for part in was]           # what is right if all are moved by that number
    text, text_clause = explain_text(right[2], now[2], now[1], P, old)
    patches, clause = explain_patches(right[1], now[1], P, whose, bool(text))
    if not torch.equal(right[0], now[0]) or patches == "other" and moved.any():
        return ("other: the text before the image has other IDs than it had before pruning "
                f"({first_wrong(now[0], was[0], 0)}).")
    reply, answer_clause = explain_answer(old, new, moved, A, answer)
    name = patches
    if patches == "kept":
        name = text or reply or "kept"
    elif patches in ("shifted", "permuted") and A and not text:
        name = f"{patches}, text not moved"
    if or_not and name == "text moved":
        name = "kept or text moved"
        text_clause += ", which is right if all IDs are moved alike"
    clauses = [clause, text_clause, answer_clause]
    if moved.any():
        behind = bool(old.min() > 0)                 # something may stand before the first of them
        if behind and name == "kept":
            name = "kept unless behind a cache"
        sees = "sees only where a cache stands before them" if behind else "does not see"
        clauses.append(f"all IDs are moved by {say(moved[:, 0])}, which RoPE {sees}")
    return f"{name}: {'; '.join(filter(None, clauses))}."


def by_rows(ids: Tensor | list) -> Tensor:
    """IDs as (D, T), on the CPU."""
    rows = torch.as_tensor(ids).detach().cpu().double()
    if rows.dim() == 3 and rows.shape[1] == 1:
        rows = rows[:, 0]
    if rows.dim() not in (1, 2) or rows.dim() == 2 and len(rows) not in NAMES:
        raise ValueError(f"IDs of shape {tuple(rows.shape)}: give one prompt's, (T,) or (3, T)")
    return rows.reshape(-1, rows.shape[-1])


def check_keep(keep: Tensor | list, K: int, N: int) -> Tensor:
    """Indices as (K,); refuse those that do not tell which patches are fed."""
    indices = torch.as_tensor(keep).long().cpu().flatten()
    own = indices[indices != -1].tolist()
    if len(indices) != K or len(set(own) & set(range(N))) < len(own):
        raise ValueError(f"keep has {len(indices)} indices for {K} visual tokens; give each its "
                         f"own raster index, 0 to {N - 1}, or -1 if the method added it")
    return indices


def how_far(was: tuple[Tensor, ...], now: tuple[Tensor, ...],
            keep: Tensor | None) -> tuple[Tensor, bool]:
    """The number by which all IDs are moved, (D, 1), and whether they may as well not be moved.

    It is that of the text before the image; without such a text, that of all whose ID is known.
    """
    before, patches, after = now
    steps = before - was[0]                                                   # (D, P)
    if not before.numel():
        steps = after - was[2]                                                # (D, A)
        if keep is not None:
            own = keep >= 0
            of_patches = patches[:, own] - was[1][:, keep[own]]
            gaps = (keep[own].diff() != 1).any()     # they show a move, wherever the text is
            steps = of_patches if gaps else torch.cat([of_patches, steps], 1)
    alike = steps.numel() and (steps == steps[:, :1]).all()
    moved = steps[:, :1] if alike else steps.new_zeros(len(steps), 1)
    if before.numel() or keep is not None or not patches.numel():
        return moved, False
    stay, move = (bool(same_ids(was[1] + by, patches).any(1).all()) for by in (0 * moved, moved))
    return moved if move and not stay else 0 * moved, stay and move and bool(moved.any())


def same_ids(right: Tensor, new: Tensor) -> Tensor:
    """Which of the fed tokens have the ID of which patch: (K, N), from (D, N) and (D, K)."""
    return (right[:, None, :] == new[:, :, None]).all(0)


def first_case(*cases: tuple[object, str, str]) -> tuple[str, str]:
    """The name and the clause of the first case that is one."""
    return next((name, clause) for is_one, name, clause in cases if is_one)


# ----- the patches --------------------------------------------------------------------------------


def explain_patches(right: Tensor, new: Tensor, P: int, keep: Tensor | None,
                    text_moved: bool) -> tuple[str, str]:
    """What became of the visual tokens, (D, N) and (D, K): a name, and a clause."""
    K = new.shape[1]
    if not K:
        return "kept", "no patch is fed"
    start = right[:1, :1] if P else new[:1, :1]
    compact = torch.equal(new, start + arange(K).expand_as(new))
    span = f"the patches are numbered {ends(new)} without gaps"
    if keep is None:
        return by_ids_alone(right, new, P, compact, span, text_moved)
    own = keep >= 0
    added = f" ({int((~own).sum())} of them added)" if not own.all() else ""
    raster = bool((keep[own].diff() > 0).all())
    expected = new.clone()                                                    # (D, K)
    expected[:, own] = right[:, keep[own]]           # of an added token any ID is right
    good = (new == expected).all(1)                                           # (D,)
    all_good = own.any() and good.all()
    others = " and ".join(n for n, d in zip(NAMES[len(new)], good, strict=True) if not d)
    dealt = f", which are those of the first {K}" if torch.equal(new, right[:, :K]) else ""
    return first_case(
        (all_good and raster, "kept", f"every patch keeps its ID{added}"),
        (all_good, "ranked", "every patch keeps its ID, but the patches are not fed in the order "
         f"of the image{added}, so each of them sees others than before"),
        (compact and raster, "shifted", span + added),
        (compact, "permuted", f"{span}, and not fed in the order of the image{added}"),
        (not own.any(), "kept", f"no patch is fed, but {K} added tokens ({ends(new)})"),
        (good.any(), f"{others} renumbered",
         f"the patches keep their IDs but for {others}{dealt}{added}"),
        (True, "other", "the patches have other IDs than before pruning "
         f"({ends(new)}; {first_wrong(new, expected, P)})"))


def by_ids_alone(right: Tensor, new: Tensor, P: int, compact: bool, span: str,
                 text_moved: bool) -> tuple[str, str]:
    """The same without `keep`."""
    same = same_ids(right, new)                                               # (K, N)
    all_known = same.any(1).all()
    in_order = (same.int().argmax(1).diff() >= 0).all()
    strange = int(same.any(1).int().argmin())        # the first whose ID no patch had
    return first_case(
        (torch.equal(right, new), "kept",
         "the visual tokens have the IDs of all patches, in their order"),
        (compact and all_known and not text_moved, "kept or shifted",
         f"{span}, as {new.shape[1]} patches were: give keep to tell"),
        (compact, "shifted", f"{span} (or permuted: give keep to tell)"),
        (all_known and in_order, "kept", "the visual tokens have IDs of patches, in the order of "
         "the image (whether each has its own: give keep to tell)"),
        (all_known, "ranked",
         "the visual tokens have IDs of patches, not in the order of the image"),
        (len(new) == 3 and same_ids(right[1:], new[1:]).any(1).all(), "time renumbered",
         "the visual tokens have height and width of patches, but not time"),
        (True, "other", f"some patches have IDs that no patch had ({ends(new)}; first at place "
         f"{P + strange}: {say(new[:, strange])})"))


# ----- the text and the answer --------------------------------------------------------------------


def explain_text(right: Tensor, new: Tensor, patches: Tensor, P: int,
                 old: Tensor) -> tuple[str, str]:
    """What became of the text after the image, (D, A): a name, "" if nothing; and a clause.

    patches: (D, K) IDs of the visual tokens;  old: (D, T) of the unpruned prompt
    """
    if torch.equal(right, new):
        return "", "the text after them keeps its IDs" if new.numel() else ""
    K, steps = patches.shape[1], new - right                                  # (D, A)
    j = int((steps != steps[:, :1]).any(0).int().argmax())                    # 0: all move as one
    begins, instead = say(new[:, j]), f"instead of {say(right[:, j])}"
    if not j:
        clause = f"the text after them begins at {begins} {instead}"
        if K and (new.amin(1) <= patches.amax(1)).any():
            where = "among" if (new.amax(1) >= patches.amin(1)).all() else "before"
            return "text collides", f"{clause}, {where} the IDs of the patches ({ends(patches)})"
        return "text moved", clause
    place = P + K + j
    goes_on = f"at place {place} the text goes on at {begins}"
    counted = counted_from(new[:, j], place, "the number of tokens before it", old)
    torn = steps[:, :j].any() or (steps[:, j:] != steps[:, j:j + 1]).any()
    return first_case(
        (torn, "text renumbered", "the IDs of the text after them do not rise together any more "
         f"({first_wrong(new, right + steps[:, :1], P + K)})"),
        (counted, "text counted from the cache", f"{goes_on}, {counted}, {instead}"),
        (True, "text moved", f"{goes_on} {instead}"))


def explain_answer(old: Tensor, new: Tensor, moved: Tensor, A: int,
                   answer: Tensor | list | int | None) -> tuple[str, str]:
    """Where the answer begins: a name, "" if where it did before pruning; and a clause."""
    if answer is None:
        return "", ""
    D, rows = new.shape
    begins = torch.as_tensor(answer).cpu().double().flatten()
    if len(begins) not in (1, D):
        raise ValueError(f"answer has {len(begins)} numbers, and an ID has {D}")
    begins = begins.expand(D)
    largest, behind = old.max() + 1 + moved[:, 0], old[:, -1] + 1 + moved[:, 0]        # (D,) each
    clause, instead = f"the answer begins at {say(begins)}", f"instead of {say(largest)}"
    if not torch.equal(largest, behind):             # a prompt that ends with its image; a video
        instead += f", or {say(behind)} where programs count from the last token"
    repeats = torch.equal(begins, new[:, -1]) and "where the prompt's last token stands"
    counted = counted_from(begins, rows, "the length of the cache", old)
    text = (old[:, -A:] if A else old[:, :1] + rows) + moved
    return first_case(
        (torch.equal(begins, largest), "", clause),
        (torch.equal(begins, behind), "",
         f"{clause}, behind the last token (behind the largest ID: {say(largest)})"),
        (torch.equal(begins, new[:, -1] + 1), "answer moved",
         f"the answer begins behind the last token, at {say(begins)} {instead}"),
        (repeats and counted, "answer repeats the last ID or answer counted from the cache",
         f"{clause}, {repeats}, which is also {counted}, {instead}"),
        (repeats, "answer repeats the last ID", f"{clause}, {repeats}, {instead}"),
        (counted, "answer counted from the cache", f"{clause}, {counted}, {instead}"),
        (D == 3 and (begins == begins[0]).all() and begins[0] < text.min(), "answer moved",
         f"{clause} {instead}, as rope_deltas of {say(begins[:1] - rows)}, another prompt's, "
         "would have it"),
        (True, "answer moved", f"{clause} {instead}"))


def counted_from(begins: Tensor, row: int, words: str, old: Tensor) -> str:
    """How an ID comes out of a row of the cache, if it is that number or has the same offset.

    words: what is counted;  old: (D, T) IDs of the unpruned prompt
    """
    deltas = int(old.max()) + 1 - old.shape[1]       # the unpruned prompt's next ID less its length
    what = "rope_deltas" if len(old) == 3 else f"offset of {deltas}"
    if (begins == row).all():
        return words
    return f"{words} plus the unpruned prompt's {what}" if (begins == row + deltas).all() else ""


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
