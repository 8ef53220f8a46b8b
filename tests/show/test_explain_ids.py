"""explain_ids says what became of position IDs: a case for each sentence, and gap.py's modes.

By hand, 4 x 4 patches merged 2 by 2, as Qwen-VL does: 3 tokens before the image, 4 visual tokens,
2 tokens after it.

    token       0  1  2    3  4  5  6    7  8    next
    time        0  1  2    3  3  3  3    5  6       7
    height      0  1  2    3  3  4  4    5  6       7
    width       0  1  2    3  4  3  4    5  6       7
"""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import arange, tensor

import nanogap
from nanogap.gap import keep_ids, lay_out
from nanogap.show.explain_ids import explain_ids

QWEN = tensor([[0, 1, 2, 3, 3, 3, 3, 5, 6],
               [0, 1, 2, 3, 3, 4, 4, 5, 6],
               [0, 1, 2, 3, 4, 3, 4, 5, 6]])
GATHERED = [[0, 1, 2, 3, 3, 3, 5, 6],                       # visual tokens 0, 1 and 3 of the four
            [0, 1, 2, 3, 3, 4, 5, 6],
            [0, 1, 2, 3, 4, 4, 5, 6]]
WIDE = tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1],                 # a token, and a grid of 2 x 4
               [0, 1, 1, 1, 1, 2, 2, 2, 2],
               [0, 1, 2, 3, 4, 1, 2, 3, 4]])


# ----- a case for each sentence -------------------------------------------------------------------

STAYS = "the text after them keeps its IDs"
KEPT = f"every patch keeps its ID; {STAYS}"
SEEN = "every patch keeps its ID (if each has its own: give keep to tell)"
MOVED = "all IDs are moved by 1, which RoPE sees only where a cache stands before them"
SPAN = "the patches are numbered 3 to 6 without gaps"
AT_7 = "the text after them begins at 7 instead of 19"
BEFORE = "the text before the image has other IDs than it had before pruning"
KEEP, GAP, COMPACT = [2, 5, 9, 14], [0, 1, 2, 5, 8, 12, 17, 19, 20], list(range(9))

# 3 tokens, 4 x 4 patches, 2 tokens; 19 and 20 after the image, the answer at 21.  A method's
# raster indices in the order in which it feeds them, -1 for a token that it adds; the IDs that
# reach RoPE; the ID of the answer; what is said.  Who does so is told in chapters 11 and 14.
SENTENCES: dict[str, tuple[list[int] | None, list, int | None, str]] = {
    "FastV, SparseVLM v2, Nuwa": (KEEP, GAP, 21, f"kept: {KEPT}; the answer begins at 21."),
    "FasterVLM, VisPruner, DivPrune": (
        KEEP, COMPACT, 9,
        f"shifted: {SPAN}; {AT_7}; the answer begins at 9, behind the last token, instead of 21."),
    "VisionZip: CLS, dominant, contextual": (
        [-1, 5, 9, 2, 14], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], None,
        "permuted: the patches are numbered 3 to 7 without gaps, and not fed in the order of the "
        "image (1 of them added); the text after them begins at 8 instead of 19."),
    "merged tokens alone": (
        [-1, -1], [0, 1, 2, 5, 12, 19, 20], None,
        f"kept: no patch is fed, but 2 added tokens (5 to 12); {STAYS}."),
    "own IDs in the order of scores": (
        [9, 2, 14, 5], [0, 1, 2, 12, 5, 17, 8, 19, 20], None,
        "ranked: every patch keeps its ID, but the patches are not fed in the order of the image, "
        f"so each of them sees others than before; {STAYS}."),
    "the patches alone renumbered": (
        KEEP, [0, 1, 2, 3, 4, 5, 6, 19, 20], None, f"shifted, text not moved: {SPAN}; {STAYS}."),
    "GAP for the patches alone": (
        KEEP, [0, 1, 2, 5, 8, 12, 17, 7, 8], None,
        f"text collides: every patch keeps its ID; {AT_7}, not behind the IDs of the patches "
        "(5 to 17)."),
    "the first patches stay": (
        [0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], None,
        "text moved: every patch keeps its ID; the text after them begins at 6 instead of 19."),
    "half of the text": (
        [2, 5], [0, 1, 2, 5, 8, 19, 22], None,
        "text renumbered: every patch keeps its ID; the IDs of the text after them do not rise "
        "together any more (first at place 6: 22 instead of 20)."),
    "PaliGemma: generate adds 1": (
        KEEP, [1, 2, 3, 6, 9, 13, 18, 20, 21], 23,
        f"answer moved: {KEPT}; the answer begins at 23 instead of 22; {MOVED}."),
    "patches at IDs of others": (
        KEEP, [0, 1, 2, 5, 8, 13, 17, 19, 20], None,
        "other: the patches have other IDs than before pruning (5 to 17; first at place 5: 13 "
        f"instead of 12); {STAYS}."),
    "a mask that numbers the padding": (
        KEEP, [1, 2, 3, 5, 8, 12, 17, 19, 20], None,
        f"other: {BEFORE} (first at place 0: 1 instead of 0)."),
    "nothing pruned, keep not given": (
        None, list(range(21)), 21,
        f"kept: {SEEN}; {STAYS}; the answer begins at 21."),
    "an added token at the last patch's ID, keep not given": (
        None, [0, 1, 2, 5, 18, 18, 19, 20], None, f"kept: {SEEN}; {STAYS}."),
    "in the order of scores, keep not given": (
        None, [0, 1, 2, 12, 5, 17, 8, 19, 20], None,
        "ranked: every patch keeps its ID, but the patches are not fed in the order of the image "
        "(if each has its own: give keep to tell), so each of them sees others than before; "
        f"{STAYS}."),
    "renumbered, keep not given": (
        None, COMPACT, None, f"shifted: {SPAN} (or permuted: give keep to tell); {AT_7}."),
    "no gaps, but the text stays, keep not given": (
        None, [0, 1, 2, 3, 4, 5, 6, 19, 20], None,
        f"kept or shifted: {SPAN}, as 4 patches were: give keep to tell; {STAYS}."),
    "IDs of no patch, keep not given": (
        None, [0, 1, 2, 5, 8, 12, 99, 19, 20], None,
        "other: some visual tokens have IDs of no patch (5 to 99; first at place 6: 99; give keep "
        f"to tell more); {STAYS}."),
    "PACT: a cluster at the mean of its IDs": (
        [2, -1, 14], [0, 1, 2, 5, 8.5, 17, 19, 20], None,
        f"kept: every patch keeps its ID (1 of them added); {STAYS}."),
}


@pytest.mark.parametrize("who", SENTENCES)
def test_a_sentence_says_what_became_of_the_ids(who: str):
    keep, fed, answer, said = SENTENCES[who]
    assert explain_ids(arange(21), tensor(fed), 3, 16, 2, keep, answer) == said


SENTENCES_3D: dict[str, tuple[list[int] | None, list[list[int]], Any, str]] = {
    "counted on before the text, keep not given": (
        None, [[0, 1, 2, 3, 4, 5, 5, 6]] * 3, None, "shifted, text not moved: the patches are "
        f"numbered 3 to 5 without gaps (or permuted: give keep to tell); {STAYS}."),
    "FlowCut: the image's first IDs for those that stay": (
        [1, 3], [[0, 1, 2, 3, 3, 5, 6], [0, 1, 2, 3, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6]], None,
        "height and width renumbered: the patches keep their IDs but for height and width; "
        f"{STAYS}."),
    "OpenVINO's CDPruner, where the last row is gone": (
        [0], [[0, 1, 2, 3, 4, 5]] * 3, 6,
        "text moved: every patch keeps its ID; the text after them begins at 4 instead of 5; "
        "the answer begins at 6, behind the last token, instead of 7."),
    "rope_deltas left from the unpruned prompt": (
        [1, 2], [[0, 1, 2, 3, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 4, 3, 5, 6]], 5,
        f"answer counted from the cache: {KEPT}; the answer begins at 5, the length of the cache "
        "plus the unpruned prompt's offset (rope_deltas) of -2, instead of 7."),
    "only height and width collide": (
        [1, 3], [[0, 1, 2, 3, 3, 4, 5], [0, 1, 2, 3, 4, 4, 5], [0, 1, 2, 4, 4, 4, 5]], None,
        "text collides: every patch keeps its ID; the text after them begins at 4 instead of 5, "
        "not behind the IDs of the patches (3 to 4)."),
}


@pytest.mark.parametrize("who", SENTENCES_3D)
def test_a_sentence_says_what_became_of_three_numbers(who: str):
    keep, fed, answer, said = SENTENCES_3D[who]
    assert explain_ids(QWEN, fed, 3, 4, 2, keep, answer) == said


@pytest.mark.parametrize("last, answer, said", [
    (5, 5, "kept: every patch keeps its ID; the answer begins at 5."),
    (7, [2, 3, 5], "kept: every patch keeps its ID; the answer begins at (2, 3, 5), "
                   "behind the last token (behind the largest ID: 5)."),
    (5, [2, 3, 3], "answer moved: every patch keeps its ID; the answer begins at (2, 3, 3), behind "
                   "the last token, instead of 5, or (2, 3, 5) where programs count from the last "
                   "token.")])
def test_behind_an_image_at_the_end_programs_count_in_two_ways(last: int, answer: Any, said: str):
    """Largest ID 4, last token (1, 2, 4): forward says 5, generate (2, 3, 5)."""
    assert keep_ids(WIDE, tensor([0, 1, 6]))[1] == 5       # also where the largest is dropped
    assert explain_ids(WIDE, WIDE[:, [0, 1, 1 + last]], 1, 8, 0, [0, last], answer) == said


def test_no_text_no_patch_no_text_before():
    assert explain_ids(arange(8), [0, 4, 6], 1, 7, 0, answer=7).startswith("answer moved: ")
    assert explain_ids(arange(8), [0, 1, 2], 1, 7, 0, [3, 5]) == (
        "shifted: the patches are numbered 1 to 2 without gaps.")
    for keep in (None, []):
        assert explain_ids(arange(6), [0, 1], 1, 4, 1, keep) == (
            "text moved: no patch is fed; the text after them begins at 1 instead of 5.")
    # PaliGemma's image comes first, and generate adds 1
    for text, name, said in ((5, "kept", KEPT), (4, "text moved", "every patch keeps its ID; the "
                                                 "text after them begins at 5 instead of 6")):
        fed = [2, 4, 1 + text, 2 + text]
        assert explain_ids(arange(7), fed, 0, 5, 2, [1, 3]) == f"{name}: {said}; {MOVED}."
    for keep, first in (([0, 2], 1), ([2, 3], 0)):
        assert explain_ids(arange(7), first + arange(4), 0, 5, 2, keep) == (
            f"shifted: the patches are numbered {first} to {first + 1} without gaps; "
            f"the text after them begins at {first + 2} instead of 5.")
    assert explain_ids(arange(6), [2, 4, 5, 6], 0, 4, 2) == (
        "unknown: no text stands before the image, so give keep to tell.")


def test_behind_a_cache_a_move_of_all_ids_is_seen():
    """The IDs begin at 40: whether a cache stands before them, they do not tell."""
    said = explain_ids(40 + arange(8), [7, 8, 10, 14], 1, 6, 1, [0, 2])
    assert said == (
        f"kept unless behind a cache: {KEPT}; all IDs are moved by -33, which RoPE sees only where "
        "a cache stands before them.")


@pytest.mark.parametrize("form", [
    lambda ids: ids, lambda ids: ids[..., None, :], lambda ids: ids.tolist(),
    lambda ids: ids[..., None, :].tolist(), lambda ids: ids.int(), lambda ids: ids.float()])
def test_ids_come_as_rope_gets_them_with_a_batch_of_one_or_as_lists(form):
    for ids, fed in ((arange(9), tensor([0, 1, 2, 3, 4, 6, 7, 8])), (QWEN, tensor(GATHERED))):
        assert explain_ids(form(ids), form(fed), 3, 4, 2, [0, 1, 3]) == f"kept: {KEPT}."


@pytest.mark.parametrize("ids_of_all, fed, keep, answer, message", [
    (arange(20), arange(9), None, None, "do not belong to 3 tokens, 16 visual tokens and 2 tokens"),
    (arange(21), torch.zeros(3, 9), None, None, "do not belong to 3 tokens"),
    (torch.zeros(3, 2, 21), arange(9), None, None, r"give one prompt's, \(T,\) or \(3, T\)"),
    (arange(21), arange(9), [1, 2], None, "keep has 2 indices for 4 visual tokens; give each its "),
    (arange(21), arange(9), [1, 2, 3, 3], None, "own raster index, 0 to 15, or -1 if"),
    (arange(21), arange(9), None, [9, 9, 9], "answer has 3 numbers, and an ID has 1"),
])
def test_numbers_that_do_not_fit_are_refused(ids_of_all, fed, keep, answer, message: str):
    with pytest.raises(ValueError, match=message):
        explain_ids(ids_of_all, fed, 3, 16, 2, keep, answer)
    with pytest.raises(ValueError, match="do not belong to 19 tokens, 0 visual tokens and 2 "):
        explain_ids(arange(21), arange(21), 19, 0, 2)


NAMES = {"gap": "kept", "ranked, original": "ranked", "shifted": "shifted", "permuted": "permuted",
         "compact, text not moved": "shifted, text not moved",
         "original, text collides": "text collides"}


@pytest.mark.parametrize("moved", [0, 9, -3])
@pytest.mark.parametrize("mode", NAMES)
def test_every_mode_of_gap_py_is_named(mode: str, moved: int):
    draw = random.Random(0)
    for _ in range(100):
        P, N, A = draw.randint(1, 4), draw.randint(4, 25), draw.randint(1, 3)
        ranked = [N - 1, *draw.sample(range(N - 1), draw.randint(1, N - 3))]
        layout = lay_out(tensor(ranked), P, N, A, mode)
        said = explain_ids(arange(P + N + A), layout.position_ids + moved, P, N, A, layout.kept,
                           layout.next_position + moved)
        assert said.startswith(f"{NAMES[mode]}: "), (said, layout)
        assert ("all IDs are moved by" in said) == bool(moved)


# ----- the file -----------------------------------------------------------------------------------


def test_the_check_can_be_copied_into_any_repository():
    """It imports torch alone."""
    file = Path(nanogap.__file__).parent / "show" / "explain_ids.py"
    assert set(re.findall(r"^(?:import|from) (\S+)", file.read_text(), re.MULTILINE)) == {"torch"}
    there: dict = {}
    exec(file.read_text(), there)
    assert there["explain_ids"](arange(21), arange(21), 3, 16, 2).startswith("kept: ")
    assert nanogap.explain_ids is explain_ids
