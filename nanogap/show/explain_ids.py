"""What a pruning program did to its position IDs, in one sentence: a check for code of your own.

This file imports torch and nothing else: copy it into any repository.  RoPE sees differences of IDs
only: where all are moved by one number, "instead of" names what would be right with that number.
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
    if keep is None and not P:
        return "unknown: no text stands before the image, so give keep to tell."
    whose = None if keep is None else check_keep(keep, K, N)
    moved = how_far(old.split([P, N, A], 1), new.split([P, K, A], 1), whose)                # (D, 1)
    right = old + moved                              # if all are moved by that number
    was, now = right.split([P, N, A], 1), new.split([P, K, A], 1)      # before, in, after the image
    text, text_clause = explain_text(was[2], now[2], now[1], P)
    patches, clause = explain_patches(was[1], now[1], P, whose, bool(text))
    if not torch.equal(was[0], now[0]) or patches == "other" and moved.any():
        return ("other: the text before the image has other IDs than it had before pruning "
                f"({first_wrong(now[0], old[:, :P], 0)}).")
    reply, answer_clause = explain_answer(old, new, moved, answer)
    name = patches
    if patches == "kept":
        name = text or reply or "kept"
    elif patches in ("shifted", "permuted") and A and not text:
        name = f"{patches}, text not moved"
    clauses = [clause, text_clause, answer_clause]
    if moved.any():
        if name == "kept" and old.min() > 0:         # something may stand before the first of them
            name = "kept unless behind a cache"
        clauses.append(f"all IDs are moved by {say(moved[:, 0])}, which RoPE sees only where a "
                       "cache stands before them")
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


def how_far(was: tuple[Tensor, ...], now: tuple[Tensor, ...], keep: Tensor | None) -> Tensor:
    """The number by which all IDs are moved, (D, 1); 0 where there is no such number.

    It is that of the text before the image; without such a text, that of all whose ID is known.
    """
    steps = now[0] - was[0]                                                   # (D, P)
    if keep is not None and not steps.numel():
        own = keep >= 0
        steps = now[1][:, own] - was[1][:, keep[own]]
        if (keep[own].diff() == 1).all():            # no gaps: they may be moved, or renumbered
            steps = torch.cat([steps, now[2] - was[2]], 1)
    alike = steps.numel() and (steps == steps[:, :1]).all()
    return steps[:, :1] if alike else torch.zeros(len(steps), 1)


def first_case(*cases: tuple[object, str, str]) -> tuple[str, str]:
    """The name and the clause of the first case that is one."""
    return next((name, clause) for is_one, name, clause in cases if is_one)


# ----- the patches, the text, the answer ----------------------------------------------------------


def explain_patches(right: Tensor, new: Tensor, P: int, keep: Tensor | None,
                    text_moved: bool) -> tuple[str, str]:
    """What became of the visual tokens, (D, N) and (D, K): a name, and a clause."""
    K = new.shape[1]
    if not K:
        return "kept", "no patch is fed"
    start = right[:1, :1] if P else new[:1, :1]
    compact = torch.equal(new, start + arange(K).expand_as(new))
    span = f"the patches are numbered {ends(new)} without gaps"
    if keep is None:                                 # then say what the IDs alone can tell
        same = (right[:, None, :] == new[:, :, None]).all(0)   # (K, N): IDs of which patch
        known = same.any(1)                                                   # (K,)
        if compact and not torch.equal(right, new):
            if known.all() and not text_moved:
                return "kept or shifted", f"{span}, as {K} patches were: give keep to tell"
            return "shifted", f"{span} (or permuted: give keep to tell)"
        if not known.all():
            i = int(known.int().argmin())
            return "other", (f"some visual tokens have IDs of no patch ({ends(new)}; first at "
                             f"place {P + i}: {say(new[:, i])}; give keep to tell more)")
        keep, remark = same.int().argmax(1), " (if each has its own: give keep to tell)"
    else:
        added = int((keep < 0).sum())
        remark = f" ({added} of them added)" if added else ""
    own = keep >= 0
    raster = bool((keep[own].diff() >= 0).all())
    expected = new.clone()                                                    # (D, K)
    expected[:, own] = right[:, keep[own]]           # of an added token any ID is right
    good = (new == expected).all(1)                                           # (D,)
    all_good = own.any() and good.all()
    others = " and ".join(n for n, d in zip(NAMES[len(new)], good, strict=True) if not d)
    return first_case(
        (all_good and raster, "kept", f"every patch keeps its ID{remark}"),
        (all_good, "ranked", "every patch keeps its ID, but the patches are not fed in the order "
         f"of the image{remark}, so each of them sees others than before"),
        (compact and raster, "shifted", span + remark),
        (compact, "permuted", f"{span}, and not fed in the order of the image{remark}"),
        (not own.any(), "kept", f"no patch is fed, but {K} added tokens ({ends(new)})"),
        (good.any(), f"{others} renumbered",
         f"the patches keep their IDs but for {others}{remark}"),
        (True, "other", "the patches have other IDs than before pruning "
         f"({ends(new)}; {first_wrong(new, expected, P)})"))


def explain_text(right: Tensor, new: Tensor, patches: Tensor, P: int) -> tuple[str, str]:
    """What became of the text after the image, (D, A): a name, "" if nothing; and a clause."""
    if torch.equal(right, new):
        return "", "the text after them keeps its IDs" if new.numel() else ""
    K = patches.shape[1]
    together = right + new[:, :1] - right[:, :1]     # if all move as the first of them does
    if not torch.equal(new, together):
        j = int((new != together).any(0).int().argmax())
        if (new[:, j] == P + K + j).all():
            return "text counted from the cache", (
                f"at place {P + K + j} the text goes on at {say(new[:, j])}, the number of tokens "
                f"before it, instead of {say(together[:, j])}")
        return "text renumbered", ("the IDs of the text after them do not rise together any more "
                                   f"({first_wrong(new, together, P + K)})")
    clause = f"the text after them begins at {say(new[:, 0])} instead of {say(right[:, 0])}"
    if K and (new.amin(1) <= patches.amax(1)).any():
        return "text collides", f"{clause}, not behind the IDs of the patches ({ends(patches)})"
    return "text moved", clause


def explain_answer(old: Tensor, new: Tensor, moved: Tensor,
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
    offset = int(old.max()) + 1 - old.shape[1]
    if torch.equal(begins, largest):
        return "", clause
    if torch.equal(begins, behind):
        return "", f"{clause}, behind the last token (behind the largest ID: {say(largest)})"
    name, why = first_case(
        (torch.equal(begins, new[:, -1] + 1), "answer moved", ", behind the last token,"),
        (torch.equal(begins, new[:, -1]), "answer repeats the last ID",
         ", where the prompt's last token stands,"),
        ((begins == rows).all(), "answer counted from the cache", ", the length of the cache,"),
        ((begins == rows + offset).all(), "answer counted from the cache",
         f", the length of the cache plus the unpruned prompt's offset (rope_deltas) of {offset},"),
        (True, "answer moved", ""))
    return name, f"{clause}{why} {instead}"


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
