"""IVC-Prune: who stays, against the same in plain Python; what it leaves in caches; its axes."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nanogap
from nanogap.gap import lay_out
from nanogap.methods import find
from nanogap.methods.in_decoder import plan
from nanogap.models import VLM
from nanogap.prune import STRATEGIES, Kept, VisualTokens

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the man on the left"


@pytest.fixture(scope="module")
def mini() -> VLM:
    return nanogap.load(ROOT / "weights/mini", device="cpu", dtype="float32")


def best(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def value_weights(model: VLM, x: Tensor) -> list[list[float]]:
    """Softmax of the products of values (T, T), token by token, the mean over heads."""
    block = model.language_model.model.layers[1]
    values = block.self_attn.v_proj(block.input_layernorm(x))[0]              # (T, H D)
    D, T = model.config.text.head_dim, len(values)
    heads = values.shape[1] // D
    mean = [[0.0] * T for _ in range(T)]
    for head in range(heads):
        v = values[:, head * D:(head + 1) * D].tolist()
        for i in range(T):
            powers = [math.exp(sum(a * b for a, b in zip(v[i], other, strict=True)) / math.sqrt(D))
                      for other in v]
            for j in range(T):
                mean[i][j] += powers[j] / sum(powers) / heads
    return mean


def axes_by_hand(ids: list[int], D: int, theta: float, count: int) -> set[int]:
    """Places of the position IDs at which RoPE turns least, and most nearly by a quarter."""
    def mean(turn: Callable[[float], float], position: int) -> float:
        return sum(turn(position * theta ** (-2 * i / D)) for i in range(D // 2)) / (D // 2)
    return {*best([mean(math.cos, p) for p in ids], count),
            *best([mean(math.sin, p) for p in ids], count)}


@pytest.mark.parametrize("mode", ["gap", "shifted"])
def test_what_stays_is_what_it_is_in_plain_python(mini: VLM, mode: str):
    """Cut before layer 2 of 4, by what layer 1 is fed.  With 144 patches seeds are 1, foreground
    29, axes 7 and 7.  All patches are still there, so the axes are the same in both modes."""
    image = mini.encode_image(ROOT / "image.jpg")
    input_ids, N = mini.prompt(WORDS), image.n_visual
    P, A = mini.around_image(input_ids)
    layout = lay_out(torch.arange(N), P, N, A, mode)
    x = mini.embed(input_ids, image, Kept(torch.arange(N)), layout.order)
    decoder, c = mini.language_model.model, mini.config.text
    x = decoder.layers[0](x, *decoder.angles(layout.position_ids, x.dtype))
    W = value_weights(mini, x)
    question = range(P + N + 2, P + N + A)

    def most_looked_at(rows: list[int], count: int) -> list[int]:
        return best([sum(W[row][P + i] for row in rows) / len(rows) for i in range(N)], count)

    seeds = most_looked_at([*question], 1)
    foreground = most_looked_at([*(P + seed for seed in seeds), *question], 29)
    axes = axes_by_hand(list(range(P, P + N)), c.head_dim, c.rope_theta, 7)
    result = mini.ground(image, WORDS, "ivc", None, mode, max_new_tokens=1)
    assert result.keep.tolist() == sorted({*seeds, *foreground, *axes})
    assert result.position_ids[P] == P + (int(result.keep[0]) if mode == "gap" else 0)


@pytest.mark.parametrize("mode", ["gap", "shifted"])
def test_the_caches_below_the_cut_are_small_too_but_the_first(mini: VLM, mode: str):
    """Of four layers cut before the third, layer 0 alone keeps all rows."""
    image = mini.encode_image(ROOT / "image.jpg")
    P, A = mini.around_image(mini.prompt(WORDS))
    result = mini.ground(image, WORDS, "ivc", None, mode, max_new_tokens=3)
    K, said = len(result.keep), len(result.tokens) - 1
    rows = (P + 144 + A + said) + 3 * (P + K + A + said)
    c = mini.config.text
    assert result.kv_bytes == rows * 2 * c.num_key_value_heads * c.head_dim * 4
    assert result.visual_tokens == (144 + 3 * K) / 4 and result.cuts == [(2, K)]


def answer_with_whole_passes(model: VLM, keep: Tensor, mode: str, most: int) -> list[int]:
    """Tokens, where behind the cut all is fed anew, below it too, with a mask on what was cut."""
    image, decoder = model.encode_image(ROOT / "image.jpg"), model.language_model.model
    input_ids, N = model.prompt(WORDS), image.n_visual
    P, A = model.around_image(input_ids)
    before, behind = (lay_out(k, P, N, A, mode) for k in (torch.arange(N), keep))
    prompt = model.embed(input_ids, image, Kept(torch.arange(N)), before.order)
    stays = torch.cat([torch.arange(P), P + keep, torch.arange(P + N, P + N + A)])
    said: list[int] = []
    while len(said) < most and not set(model.end_tokens) & set(said):
        x = torch.cat([prompt, decoder.embed_tokens(torch.tensor([said]).long())], 1)
        T, n = x.shape[1], len(said)
        sees = torch.ones(T, T, dtype=torch.bool).tril()      # in layer 0
        cut = sees.clone()                                    # in layer 1: the answer sees less
        dropped = torch.ones(T, dtype=torch.bool)
        dropped[stays], dropped[T - n:] = False, False
        cut[T - n:, dropped] = False
        ids = torch.cat([before.position_ids, before.next_position + torch.arange(n)])
        for layer, mask in zip(decoder.layers[:2], (sees, cut), strict=True):
            x = layer(x, *decoder.angles(ids, x.dtype), None, mask)
        x = x[:, torch.cat([stays, torch.arange(T - n, T)])]
        ids = torch.cat([behind.position_ids, behind.next_position + torch.arange(n)])
        for layer in decoder.layers[2:]:
            x = layer(x, *decoder.angles(ids, x.dtype))
        said.append(int(model.language_model.logits(decoder.norm(x)[0, -1]).argmax()))
    return said


@pytest.mark.parametrize("mode", ["gap", "shifted"])
def test_an_answer_goes_on_behind_small_caches_as_whole_passes_say_it(mini: VLM, mode: str):
    result = mini.ground(ROOT / "image.jpg", WORDS, "ivc", 60, mode, max_new_tokens=8)
    assert answer_with_whole_passes(mini, result.keep, mode, 8) == result.tokens


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


def test_original_ids_alone_keep_axes_where_rope_has_them(mini: VLM):
    """Under `shifted` two of 14 patches kept as axes stand where RoPE has an axis, by chance."""
    c, image = mini.config.text, mini.encode_image(ROOT / "image.jpg")
    P, _ = mini.around_image(mini.prompt(WORDS))
    axes = axes_by_hand(list(range(P, P + 144)), c.head_dim, c.rope_theta, 7)
    turns = {P + axis for axis in axes}
    ids = {}
    for mode in ("gap", "shifted"):
        result = mini.ground(image, WORDS, "ivc", None, mode, max_new_tokens=1)
        at = dict(zip(result.keep.tolist(), result.position_ids[P:].tolist(), strict=False))
        ids[mode] = {at[axis] for axis in axes}
    assert ids["gap"] == turns
    assert len(turns) == 14 and ids["shifted"] & turns == {37, 38}
