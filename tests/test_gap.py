"""Position IDs on a 4 x 4 grid, by hand: 3 tokens before the image, 16 patches, 2 tokens after it.

    patch   0  1  2  3          ID before pruning   3  4  5  6
            4  5  6  7                              7  8  9 10
            8  9 10 11                             11 12 13 14
           12 13 14 15                             15 16 17 18      text after: 19 20, answer from 21
"""

import pytest
import torch

from nanogap.gap import MODES, arrange, assign_ids, position_ids

RANKED = torch.tensor([9, 2, 14, 5])     # the kept patches, by score


def ids(mode: str, keep: torch.Tensor = RANKED) -> tuple[list[int], int]:
    position, following = position_ids(keep, n_before=3, n_visual=16, n_after=2, mode=mode)
    return position.tolist(), following


def test_full_counts_from_zero_without_a_gap():
    assert ids("full", torch.arange(16)) == (list(range(21)), 21)


def test_shifted_closes_the_gaps_and_moves_the_text():
    assert ids("shifted") == ([0, 1, 2, 3, 4, 5, 6, 7, 8], 9)


def test_permuted_has_the_same_ids_for_tokens_in_another_order():
    assert ids("permuted") == ids("shifted")
    assert arrange(RANKED, MODES["shifted"][0]).tolist() == [2, 5, 9, 14]
    assert arrange(RANKED, MODES["permuted"][0]).tolist() == [9, 2, 14, 5]


def test_gap_gives_every_token_the_id_that_it_had_before_pruning():
    before, patches, after = [0, 1, 2], [3 + 2, 3 + 5, 3 + 9, 3 + 14], [19, 20]
    assert ids("gap") == (before + patches + after, 21)


def test_gap_and_shifted_differ_by_the_number_of_dropped_patches_from_the_text_on():
    (gap, after_gap), (shifted, after_shifted) = ids("gap"), ids("shifted")
    assert [g - s for g, s in zip(gap[-2:], shifted[-2:])] == [12, 12] == 2 * [16 - len(RANKED)]
    assert after_gap - after_shifted == 12


def test_keeping_everything_makes_gap_shifted_and_full_the_same():
    everything = torch.arange(16)
    assert ids("gap", everything) == ids("shifted", everything) == ids("full", everything)


@pytest.mark.parametrize("order", ["raster", "score"])
def test_order_and_ids_are_two_choices(order: str):
    """Score order with original IDs has no name of its own: the phases are right, who sees whom is not."""
    keep = arrange(RANKED, order)
    original, _ = assign_ids(keep, 3, 16, 2, "original")
    compact, _ = assign_ids(keep, 3, 16, 2, "compact")
    assert original.tolist() == {"raster": [0, 1, 2, 5, 8, 12, 17, 19, 20],
                                 "score": [0, 1, 2, 12, 5, 17, 8, 19, 20]}[order]
    assert compact.tolist() == list(range(9))


def test_the_largest_id_exceeds_the_number_of_tokens():
    """Why a RoPE table that is cut to the length of the sequence would overflow."""
    position, _ = position_ids(torch.tensor([15]), 3, 16, 2, "gap")
    assert len(position) == 6 and int(position.max()) == 20


def test_tokens_that_a_method_adds_go_last_and_have_no_place_of_their_own():
    """Two added tokens: with original IDs both share the last patch's 3 + 15, and nothing else moves."""
    keep = torch.tensor([2, 5])
    original, following = assign_ids(keep, 3, 16, 2, "original", n_added=2)
    assert original.tolist() == [0, 1, 2, 3 + 2, 3 + 5, 18, 18, 19, 20] and following == 21
    compact, following = assign_ids(keep, 3, 16, 2, "compact", n_added=2)
    assert compact.tolist() == list(range(9)) and following == 9


@pytest.mark.parametrize("keep, mode, message", [
    ([0, 16], "gap", "keep must be a list of raster indices from 0 to 15"),
    ([-1, 2], "gap", "keep must be a list of raster indices from 0 to 15"),
    ([3, 3], "shifted", "keep names a patch twice"),
    ([3, 5], "full", "mode 'full' keeps all 16 visual tokens, not 2"),
    ([3, 5], "Gap", "unknown mode 'Gap': choose from full, shifted, permuted, gap"),
])
def test_what_no_model_could_be_fed_is_refused(keep: list[int], mode: str, message: str):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        position_ids(torch.tensor(keep), 3, 16, 2, mode)
