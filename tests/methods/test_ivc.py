"""IVC-Prune: who stays, against the same by hand; what it leaves in caches; its axes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanogap.methods import find
from nanogap.methods.in_decoder import plan
from nanogap.models import VLM
from nanogap.prune import STRATEGIES, VisualTokens
from tests.methods.by_hand import PICTURE, WORDS, best, ids_by_hand, layers_by_hand, whole


def value_weights(model: VLM, x: Tensor, layer: int) -> Tensor:
    """Softmax of the products of values that a layer makes of (1, T, C), the mean over heads."""
    block, D = model.language_model.model.layers[layer], model.config.text.head_dim
    values = block.self_attn.v_proj(block.input_layernorm(x))[0]              # (T, H D)
    return torch.stack([(v @ v.T / math.sqrt(D)).softmax(-1) for v in values.split(D, 1)]).mean(0)


def axes_by_hand(model: VLM) -> set[int]:
    """Patches of 144 at whose position IDs RoPE turns least, and most nearly by a quarter."""
    P, c = model.around_image(model.prompt(WORDS))[0], model.config.text
    turns = [c.rope_theta ** (-2 * i / c.head_dim) for i in range(c.head_dim // 2)]

    def most(turn: Callable[[float], float]) -> list[int]:
        return best([sum(turn((P + patch) * angle) for angle in turns) for patch in range(144)], 7)

    return {*most(math.cos), *most(math.sin)}


@pytest.mark.parametrize("mode", ["gap", "shifted"])
def test_what_stays_is_what_it_is_by_hand(mini: VLM, mode: str):
    """Cut before layer 2 of 4, by what layer 1 is fed.  With 144 patches seeds are 1, foreground
    29, axes 7 and 7.  All patches are still there, so the axes are the same in both modes."""
    x, P, N, A = whole(mini)
    x, _ = layers_by_hand(mini, x, [*range(P + N + A)], 0, 1)
    W = value_weights(mini, x, 1)
    question = [*range(P + N + 2, P + N + A)]
    seeds = best(W[question].mean(0)[P:P + N], 1)
    foreground = best(W[[P + seeds[0], *question]].mean(0)[P:P + N], 29)
    result = mini.ground(PICTURE, WORDS, "ivc", None, mode, max_new_tokens=1)
    assert result.keep.tolist() == sorted({*seeds, *foreground, *axes_by_hand(mini)})
    ids = result.keep.tolist() if mode == "gap" else range(len(result.keep))
    assert result.position_ids[P:P + len(ids)].tolist() == [P + own for own in ids]
    assert result.cuts == [(2, len(result.keep))]


def answer_with_whole_passes(model: VLM, keep: list[int], mode: str, most: int) -> list[int]:
    """Tokens, where behind the cut all is fed anew, below it too, with a mask on what was cut."""
    decoder, (prompt, P, N, A) = model.language_model.model, whole(model)
    stays = [*range(P), *(P + patch for patch in keep), *range(P + N, P + N + A)]
    said: list[int] = []
    while len(said) < most and not set(model.end_tokens) & set(said):
        x = torch.cat([prompt, decoder.embed_tokens(torch.tensor([said]).long())], 1)
        T, n = x.shape[1], len(said)
        sees = torch.ones(T, T, dtype=torch.bool).tril()      # in layer 0
        cut = sees.clone()                                    # in layer 1: the answer sees less
        cut[T - n:, [row for row in range(T - n) if row not in stays]] = False
        ids = torch.tensor(ids_by_hand(range(N), P, N, A + n, mode))
        for layer, mask in zip(decoder.layers[:2], (sees, cut), strict=True):
            x = layer(x, *decoder.angles(ids, x.dtype), None, mask)
        x = x[:, [*stays, *range(T - n, T)]]
        x, _ = layers_by_hand(model, x, ids_by_hand(keep, P, N, A + n, mode), 2, 3)
        said.append(int(model.language_model.logits(decoder.norm(x)[0, -1]).argmax()))
    return said


@pytest.mark.parametrize("mode", ["gap", "shifted"])
@pytest.mark.parametrize("budget", [None, 10])
def test_an_answer_goes_on_behind_small_caches_as_whole_passes_say_it(
        model: VLM, budget: int | None, mode: str):
    """Of three layers cut before the third, layer 0 alone keeps all rows.  A random model, which
    says another word when it sees anything else."""
    result = model.ground(PICTURE, WORDS, "ivc(layer=2)", budget, mode, max_new_tokens=8)
    assert answer_with_whole_passes(model, result.keep.tolist(), mode, 8) == result.tokens
    P, A = model.around_image(model.prompt(WORDS))
    K, said, c = len(result.keep), len(result.tokens) - 1, model.config.text
    rows = (P + 16 + A + said) + 2 * (P + K + A + said)
    assert result.kv_bytes == rows * 2 * c.num_key_value_heads * c.head_dim * 4
    assert result.visual_tokens == (16 + 2 * K) / 3 and result.cuts == [(2, K)]


@pytest.mark.parametrize("budget", [1, 2, 5, 10, 29, 100])
def test_a_budget_at_the_cut_is_met_nearly_and_never_exceeded(budget: int):
    n, generator = 100, torch.Generator().manual_seed(0)
    fields = {"value_attention": torch.rand(n + 4, n, generator=generator),
              "axes": torch.rand(2, n, generator=generator)}
    seen = VisualTokens(torch.zeros(n, 4), 1, n, fields)
    kept = STRATEGIES["ivc"](seen, budget, generator).ranked
    assert kept.tolist() == sorted(set(kept.tolist())) and budget - 3 < len(kept) <= budget


def test_published_shares_of_576_are_those_of_the_code():
    """6 seeds, 115 of foreground, 29 and 29 axes: 20 to 31 % of the patches, by their overlap."""
    n = 576
    fields = {"value_attention": torch.zeros(n + 4, n), "axes": torch.zeros(2, n)}
    fields["value_attention"][n:, :6] = 1
    fields["axes"][0, -29:] = fields["axes"][1, -58:-29] = 1
    kept = STRATEGIES["ivc"](VisualTokens(torch.zeros(n, 4), 1, n, fields), None, torch.Generator())
    assert kept.ranked.tolist() == [*range(115), *range(n - 58, n)]
    assert plan("ivc", n, None, 32) == [(16, None)]
    assert plan(find("ivc(layer=2)"), n, None, 28) == [(2, None)]
