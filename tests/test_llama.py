"""The decoder: RoPE by hand, who sees whom, and a cache that changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanogap.llama import (
    KVCache,
    LlamaAttention,
    LlamaConfig,
    LlamaForCausalLM,
    RMSNorm,
    rope_angles,
    rotate,
)

CONFIG = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=50,
                     rms_norm_eps=1e-5)


@pytest.fixture(scope="module")
def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, count, 32, generator=torch.Generator().manual_seed(seed))


# ----- RoPE ---------------------------------------------------------------------------------------


def test_rope_turns_four_numbers_by_hand():
    """D = 4, theta = 100: pair 0 is (x0, x2) and turns by p, pair 1 is (x1, x3), by p / 10."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = rope_angles(torch.tensor([5]), head_dim=4, theta=100.0)
    a, b = 5.0, 0.5
    by_hand = [1 * math.cos(a) - 3 * math.sin(a), 2 * math.cos(b) - 4 * math.sin(b),
               3 * math.cos(a) + 1 * math.sin(a), 4 * math.cos(b) + 2 * math.sin(b)]
    assert rotate(x, cos, sin).flatten().tolist() == pytest.approx(by_hand, abs=1e-6)
    assert by_hand == pytest.approx([3.16, -0.16, -0.11, 4.47], abs=0.01)


def test_position_zero_turns_nothing():
    x = torch.randn(1, 1, 1, 8)
    assert torch.equal(rotate(x, *rope_angles(torch.tensor([0]), 8, 10000.0)), x)


def test_angles_come_from_the_ids_and_from_no_table():
    """ID 100000 is far beyond any sequence here, and has the angle that the formula gives."""
    cos, _ = rope_angles(torch.tensor([3, 100_000]), 8, 10000.0)
    assert cos[1, 3].item() == pytest.approx(math.cos(100_000 / 10000 ** (6 / 8)), abs=1e-3)
    assert cos[0, 0].item() == cos[0, 4].item() == pytest.approx(math.cos(3))


def test_the_decoder_demands_position_ids(decoder: LlamaForCausalLM):
    with pytest.raises(TypeError, match="position_ids"):
        decoder(tokens(3))


def test_only_differences_of_ids_count(decoder: LlamaForCausalLM):
    x, ids = tokens(6), torch.tensor([0, 1, 4, 5, 9, 10])
    assert torch.allclose(decoder(x, ids), decoder(x, ids + 37), atol=1e-4)
    assert not torch.allclose(decoder(x, ids), decoder(x, torch.arange(6)), atol=1e-2)


# ----- attention ----------------------------------------------------------------------------------


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                sees: torch.Tensor | None = None) -> torch.Tensor:
    """Attention row by row, with the key-value heads repeated: the fused kernel must agree with it.

    sees: (T, R), which rows each query sees; None: all up to its own
    """
    T, R, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    sees = torch.ones(T, R).tril(R - T).bool() if sees is None else sees
    out = torch.empty_like(q)
    for t in range(T):
        rows = sees[t].nonzero()[:, 0]
        scores = q[:, :, t:t + 1] @ k[:, :, rows].transpose(2, 3) / q.shape[-1] ** 0.5
        out[:, :, t:t + 1] = scores.softmax(-1) @ v[:, :, rows]
    return out


DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]


def drawn(T: int, R: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q (2, 4, T, 8), and k and v (2, groups, R, 8)."""
    generator = torch.Generator().manual_seed(T * R)
    heads_and_rows = ((4, T), (groups, R), (groups, R))
    return [torch.randn(2, heads, rows, 8, generator=generator).to(dtype)
            for heads, rows in heads_and_rows]


@pytest.mark.parametrize("T, R", [(1, 1), (1, 7), (7, 7), (3, 7)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype, atol", DTYPES)
def test_attention_equals_softmax_written_out(T: int, R: int, groups: int, dtype: torch.dtype,
                                              atol: float):
    """A whole prompt and a new token need no mask; tokens behind others say whom they see."""
    q, k, v = drawn(T, R, groups, dtype)
    mask = torch.ones(T, R).tril(R - T).bool() if 1 < T < R else None
    y = LlamaAttention(CONFIG, 0).attend(q, k, v, mask)
    assert y.dtype == dtype
    assert torch.allclose(y.float(), written_out(q.float(), k.float(), v.float()), atol=atol)


def test_several_tokens_behind_others_without_a_mask_are_rejected(decoder: LlamaForCausalLM):
    """The fused kernel's triangle begins at row 0, so they would see too little."""
    x, cache = tokens(5), KVCache(CONFIG, 5, tokens(5))
    decoder(x[:, :2], torch.arange(2), cache)
    with pytest.raises(AssertionError, match="several tokens behind others need a mask"):
        decoder(x[:, 2:], torch.arange(2, 5), cache)


def test_a_token_sees_the_order_of_the_sequence_not_the_order_of_the_ids(decoder: LlamaForCausalLM):
    """With the last two tokens changed, the first four logits stay, whatever the IDs say."""
    x, y, ids = tokens(6), tokens(6), torch.tensor([10, 9, 8, 3, 2, 1])
    y[:, 4:] = tokens(2, seed=5)
    assert torch.equal(decoder(x, ids)[:, :4], decoder(y, ids)[:, :4])
    assert not torch.allclose(decoder(x, ids)[:, 4:], decoder(y, ids)[:, 4:])


def test_rows_shuffled_with_their_ids_mean_the_same_only_without_a_causal_mask():
    """RoPE sees IDs, and the mask sees the order: so GAP needs raster order as well as the IDs."""
    torch.manual_seed(2)
    q, k, v = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    ids, shuffle = torch.arange(5), torch.tensor([3, 0, 4, 1, 2])

    def attend(order: torch.Tensor, causal: bool) -> torch.Tensor:
        cos, sin = rope_angles(ids[order], 8, 10000.0)
        turned = rotate(q[:, :, order], cos, sin), rotate(k[:, :, order], cos, sin)
        out = F.scaled_dot_product_attention(*turned, v[:, :, order], is_causal=causal)
        return out[:, :, order.argsort()]

    assert torch.allclose(attend(ids, causal=False), attend(shuffle, causal=False), atol=1e-6)
    assert not torch.allclose(attend(ids, causal=True), attend(shuffle, causal=True), atol=1e-2)


# ----- cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 5, 9, 12, 17, 19, 20]],
                         ids=["full", "gap"])
@pytest.mark.parametrize("steps", [[4, 1, 1, 1, 1], [3, 5], [1, 3, 4]])
def test_cached_equals_uncached(decoder: LlamaForCausalLM, ids: list[int], steps: list[int]):
    x, ids = tokens(8), torch.tensor(ids)
    cache, out = KVCache(CONFIG, 8, x), []
    for i, count in enumerate(steps):
        start = sum(steps[:i])
        span = slice(start, start + count)
        mask = torch.ones(count, start + count).tril(start).bool()
        out.append(decoder(x[:, span], ids[span], cache, mask))
    assert torch.allclose(torch.cat(out, 1), decoder(x, ids), atol=1e-4)
    assert cache.lengths == [8, 8, 8]


def test_each_row_of_a_batch_has_its_own_ids(decoder: LlamaForCausalLM):
    x, ids = torch.cat([tokens(4), tokens(4, seed=2)]), torch.tensor([[0, 1, 2, 3], [0, 1, 7, 9]])
    alone = torch.cat([decoder(x[:1], ids[0]), decoder(x[1:], ids[1])])
    assert torch.allclose(decoder(x, ids), alone, atol=1e-4)


def test_cache_rows_are_dense_whatever_the_ids(decoder: LlamaForCausalLM):
    x, ids = tokens(3), torch.tensor([0, 40, 99])
    cache = KVCache(CONFIG, 5, x)
    decoder(x, ids, cache)
    assert cache.lengths == [3, 3, 3]
    layers, k_and_v, rows, heads, D, float32 = 3, 2, 3, 2, 8, 4
    assert cache.bytes_in_use() == layers * k_and_v * rows * heads * D * float32


def test_rms_norm_is_computed_in_float32():
    """Rounded once, at the end: bfloat16 all the way would round square, mean and root too."""
    norm = RMSNorm(300, 1e-5).to(torch.bfloat16)
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    coarse = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), exact.to(torch.bfloat16))
    assert not torch.equal(coarse, exact.to(torch.bfloat16))
