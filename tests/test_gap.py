"""Position IDs on a 4 x 4 grid, by hand: 3 tokens before the image, 16 patches, 2 tokens after it.

    patch   0  1  2  3      ID before pruning   3  4  5  6
            4  5  6  7                          7  8  9 10
            8  9 10 11                         11 12 13 14
           12 13 14 15                         15 16 17 18    text after: 19 20, answer from 21
"""

from random import Random

import pytest
import torch

from nanogap import NanogapError
from nanogap.gap import MODES, Layout, keep_ids, lay_out, position_ids

RANKED = [9, 2, 14, 5]       # the kept patches, by score
EVERYTHING = [11, 3, 8, 0, 15, 4, 7, 12, 1, 14, 6, 9, 2, 13, 5, 10]

# the patches in sequence order, which of RANKED comes where, IDs, ID of the first new token
BY_HAND = {
    "shifted":                 ([2, 5, 9, 14], [1, 3, 0, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8], 9),
    "permuted":                ([9, 2, 14, 5], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8], 9),
    "gap":                     ([2, 5, 9, 14], [1, 3, 0, 2], [0, 1, 2, 5, 8, 12, 17, 19, 20], 21),
    "ranked, original":        ([9, 2, 14, 5], [0, 1, 2, 3], [0, 1, 2, 12, 5, 17, 8, 19, 20], 21),
    "compact, text not moved": ([2, 5, 9, 14], [1, 3, 0, 2], [0, 1, 2, 3, 4, 5, 6, 19, 20], 21),
    "original, text collides": ([2, 5, 9, 14], [1, 3, 0, 2], [0, 1, 2, 5, 8, 12, 17, 7, 8], 9),
}


def laid_out(mode: str, keep: list[int] = RANKED, M: int = 0) -> Layout:
    return lay_out(torch.tensor(keep), 3, 16, 2, mode, M)


def ids(mode: str, keep: list[int] = RANKED, M: int = 0) -> tuple[list[int], int]:
    layout = laid_out(mode, keep, M)
    return layout.position_ids.tolist(), layout.next_position


# ----- by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", BY_HAND)
def test_each_mode_by_hand(mode: str):
    keep, order, position, following = BY_HAND[mode]
    layout = laid_out(mode)
    assert layout.kept.tolist() == keep
    assert layout.order.tolist() == order
    assert layout.position_ids.tolist() == position
    assert layout.next_position == following


def test_mode_full_by_hand():
    layout = laid_out("full", EVERYTHING)
    assert layout.kept.tolist() == list(range(16))
    assert layout.order.tolist() == [3, 8, 12, 1, 5, 14, 10, 6, 2, 11, 15, 0, 7, 13, 9, 4]
    assert layout.position_ids.tolist() == list(range(21))
    assert layout.next_position == 21


def test_every_mode_is_checked_by_hand():
    assert {*BY_HAND, "full"} == set(MODES)


def test_full_counts_from_zero_without_a_gap():
    assert ids("full", EVERYTHING) == (list(range(21)), 21)


def test_shifted_closes_the_gaps_and_moves_the_text():
    assert ids("shifted") == ([0, 1, 2, 3, 4, 5, 6, 7, 8], 9)


def test_permuted_has_the_same_ids_for_tokens_in_another_order():
    assert ids("permuted") == ids("shifted")
    assert laid_out("shifted").kept.tolist() == [2, 5, 9, 14]
    assert laid_out("permuted").kept.tolist() == [9, 2, 14, 5]


def test_gap_gives_every_token_the_id_that_it_had_before_pruning():
    before, patches, after = [0, 1, 2], [3 + 2, 3 + 5, 3 + 9, 3 + 14], [19, 20]
    assert ids("gap") == (before + patches + after, 21)


@pytest.mark.parametrize("keep", [RANKED, [15], [0, 15], EVERYTHING])
def test_gap_is_indexing_into_the_ids_of_all_tokens(keep: list[int]):
    """The definition in one line: what is left of the IDs from before pruning."""
    everything = laid_out("full", list(range(16)))
    patches = 3 + torch.tensor(keep).sort().values
    stays = torch.cat([torch.arange(3), patches, torch.tensor([19, 20])])
    layout = laid_out("gap", keep)
    assert torch.equal(layout.position_ids, everything.position_ids[stays])
    assert layout.next_position == everything.next_position


def test_gap_and_shifted_differ_by_the_number_of_dropped_patches_from_the_text_on():
    original, after_gap = ids("gap")
    compact, after_shifted = ids("shifted")
    assert [o - c for o, c in zip(original[-2:], compact[-2:], strict=True)] == [12, 12]
    assert after_gap - after_shifted == 12 == 16 - len(RANKED)


def test_keeping_everything_makes_gap_shifted_and_full_the_same():
    assert ids("gap", EVERYTHING) == ids("shifted", EVERYTHING) == ids("full", EVERYTHING)


@pytest.mark.parametrize("mode", MODES)
def test_order_says_which_of_the_ranked_tokens_comes_where(mode: str):
    """What a method made of its patches goes with them."""
    layout = laid_out(mode, EVERYTHING)
    assert torch.equal(torch.tensor(EVERYTHING)[layout.order], layout.kept)


@pytest.mark.parametrize("mode", ["gap", "ranked, original"])
def test_order_and_ids_are_two_choices(mode: str):
    """With ranked order and original IDs the phases are right; who sees whom is not."""
    patches = dict(zip(laid_out(mode).kept.tolist(), ids(mode)[0][3:7], strict=True))
    assert patches == {2: 5, 5: 8, 9: 12, 14: 17}
    assert ids("ranked, original")[0] != ids("gap")[0]


def test_the_largest_id_exceeds_the_number_of_tokens():
    """Why a RoPE table that is cut to the length of the sequence would overflow."""
    position, _ = ids("gap", [15])
    assert len(position) == 6 and max(position) == 20


# ----- added tokens, and cuts ---------------------------------------------------------------------


ADDED = {   # mode -> IDs of patches 5 and 2 and two added tokens, of the text, and of the answer
    "shifted": ([3, 4, 5, 6], [7, 8], 9),
    "permuted": ([3, 4, 5, 6], [7, 8], 9),
    "gap": ([5, 8, 18, 18], [19, 20], 21),
    "ranked, original": ([8, 5, 18, 18], [19, 20], 21),
    "compact, text not moved": ([3, 4, 5, 6], [19, 20], 21),
    "original, text collides": ([5, 8, 18, 18], [7, 8], 9),
}


@pytest.mark.parametrize("mode", ADDED)
def test_tokens_that_a_method_adds_go_last_and_have_no_place_of_their_own(mode: str):
    """With original IDs both share the last patch's 3 + 15, and nothing else moves."""
    visual, text, following = ADDED[mode]
    layout = laid_out(mode, [5, 2], M=2)
    assert layout.position_ids.tolist() == [0, 1, 2, *visual, *text]
    assert layout.next_position == following
    assert len(layout.kept) == len(layout.order) == 2


# ----- one function in the place of three ---------------------------------------------------------


SWITCHES = {   # restated: the order, whether patches keep their IDs, whether the text does
    "full": ("raster", True, True),
    "shifted": ("raster", False, False),
    "permuted": ("ranked", False, False),
    "gap": ("raster", True, True),
    "ranked, original": ("ranked", True, True),
    "compact, text not moved": ("raster", False, True),
    "original, text collides": ("raster", True, False),
}


def restated(keep: list[int], P: int, N: int, A: int, mode: str,
             M: int) -> tuple[list[int], list[int], int]:
    """Arrange, then assign: kept patches in order, IDs, and the next one, in plain lists."""
    order, patches_stay, text_stays = SWITCHES[mode]
    arranged = sorted(keep) if order == "raster" else list(keep)
    position = list(range(P))
    for i, patch in enumerate(arranged):
        position.append(P + (patch if patches_stay else i))
    for m in range(M):
        position.append(P + (N - 1 if patches_stay else len(keep) + m))
    text = P + (N if text_stays else len(keep) + M)
    position.extend(range(text, text + A))
    return arranged, position, text + A


def test_lay_out_does_what_arranging_and_assigning_did():
    rng = Random(0)
    for _ in range(4000):
        mode = rng.choice(list(MODES))
        P, A, M = rng.randrange(5), rng.randrange(5), rng.randrange(3)
        N = rng.randrange(1, 30)
        K = N if mode == "full" else rng.randrange(1, N + 1)
        keep = rng.sample(range(N), K)
        layout = lay_out(torch.tensor(keep), P, N, A, mode, M)
        found = (layout.kept.tolist(), layout.position_ids.tolist(), layout.next_position)
        assert found == restated(keep, P, N, A, mode, M), (keep, P, N, A, mode, M)
        assert [keep[i] for i in layout.order.tolist()] == found[0]


def test_position_ids_are_those_of_the_layout():
    keep = torch.tensor([5, 2])
    for mode in set(MODES) - {"full"}:
        layout = lay_out(keep, 3, 16, 2, mode, 1)
        position, following = position_ids(keep, 3, 16, n_after=2, mode=mode, n_added=1)
        assert torch.equal(position, layout.position_ids) and following == layout.next_position


# ----- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep, mode, message", [
    ([0, 16], "gap", "keep must name raster indices from 0 to 15, each once"),
    ([-1, 2], "gap", "keep must name raster indices from 0 to 15, each once"),
    ([0.0, 2.0], "gap", "keep must name raster indices from 0 to 15, each once"),
    ([[0, 2]], "gap", "keep must name raster indices from 0 to 15, each once"),
    ([3, 3], "shifted", "keep must name raster indices from 0 to 15, each once"),
    ([3, 5], "full", "mode 'full' keeps all 16 visual tokens, not 2"),
    ([3, 5], "Gap", "unknown mode 'Gap': choose from full; shifted; permuted; gap; ranked"),
])
def test_what_no_model_could_be_fed_is_rejected(keep: list, mode: str, message: str):
    with pytest.raises(NanogapError, match=message):
        lay_out(torch.tensor(keep), 3, 16, 2, mode)


def test_keep_ids_is_gap_for_ids_of_three_numbers():
    """M-RoPE: time, row and column; 2 tokens, 2 x 2 patches, 1 token that stands behind the longer
    side.  Patches 1 and 2 stay."""
    ids = torch.tensor([[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]])
    kept, following = keep_ids(ids, torch.tensor([0, 1, 3, 4, 6]))
    assert kept.tolist() == [[0, 1, 2, 2, 4], [0, 1, 2, 3, 4], [0, 1, 3, 2, 4]] and following == 5
