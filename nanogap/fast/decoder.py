"""Passes of the lesson's decoder that do less: for drafts, many questions, and half precision.

In:  embeddings at their position IDs, a cache, and who may look at whom.  Out: logits.

The layers are those of nanogap/llama.py and so is what they compute.  But in the last layer only
the tokens whose logits are wanted look at others; only the last few tokens are given a mask, since
those before them are causal among themselves; and one query in half precision is attended to in
float32 on a CPU, whose kernel takes three times as long otherwise.
Letters: B batch, T new tokens, M of them with a mask, R rows in the cache, C channels, V
vocabulary, H heads, G key-value heads, D head dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogap.errors import NanogapError
from nanogap.ground import NOT_FINITE
from nanogap.llama import KVCache, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel, rotate


class Cache(KVCache):
    """A cache that rows can be taken out of again."""

    def drop(self, rows: int) -> None:
        """Forget the last rows of every layer; the next ones overwrite them."""
        self.lengths = [length - rows for length in self.lengths]

    def retain(self, start: int, rows: Tensor) -> None:
        """Of the rows from `start` on only these (n,) stay, moved together."""
        end = start + len(rows)
        self.keys[..., start:end, :] = self.keys[..., rows, :]
        self.values[..., start:end, :] = self.values[..., rows, :]
        self.lengths = [end] * len(self.lengths)


# ----- who looks at whom --------------------------------------------------------------------------


def mask_of(rows: Tensor, R: int, alternatives: int, dtype: torch.dtype) -> Tensor:
    """Which of R rows the tokens in these rows (M,) look at: (M, R), 0 where they do, else -inf.

    alternatives: so many of the last tokens stand in each other's place: each sees the rows before
                  all of them, and its own.  1: every token sees all rows up to its own.
    """
    own, other = rows[:, None], torch.arange(R, device=rows.device)
    sees = (other < own.clamp(max=rows[-alternatives])) | (other == own)      # (M, R)
    return as_scores(sees, dtype)


def as_scores(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to the scores: made once for all layers."""
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, float("-inf"))


def causal_mask(T: int, R: int, alternatives: int, like: Tensor) -> Tensor | None:
    """A mask (M, R) for the last M of T tokens, in the last of R rows; None where none needs one.
    """
    M = T if 1 < T < R else alternatives
    if M == 1:
        return None
    return mask_of(torch.arange(R - M, R, device=like.device), R, alternatives, like.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in which the last query sees all keys, the one before it one key less, ...

    q: (B, H, T, D); k, v: (B, G, R, D) with R >= T; returns (B, H, T, D).
    mask: (M, R), added to the scores of the last M queries; the others see the first T - M keys.
          None only where T is 1 or R
    """
    gqa, T = q.shape[1] != k.shape[1], q.shape[2]
    if mask is None and T == 1 and q.device.type == "cpu":
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=gqa)
        return y.to(q.dtype)                                                  # (B, H, 1, D)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=gqa)
    first = T - len(mask)                                                     # without a mask
    y = F.scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=mask, enable_gqa=gqa)
    if first == 0:
        return y                                                              # (B, H, T, D)
    before = attend(q[:, :, :first], k[:, :, :first], v[:, :, :first])
    return torch.cat([before, y], dim=2)                                      # (B, H, T, D)


# ----- a pass -------------------------------------------------------------------------------------


# the number of a layer, q (B, H, T, D), k and v (B, G, T, D) -> what its tokens found (B, H, T, D)
Look = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def look_into(cache: KVCache, mask: Tensor | None) -> Look:
    """The tokens stand in the next rows of a cache, and look at all of its rows, or as masked."""
    return lambda layer, q, k, v: attend(q, *cache.append(layer, k, v), mask)


def through(layer: LlamaDecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, look: Look,
            last: int) -> Tensor:
    """Tokens (B, T, C) through a layer, where only the `last` of them look: (B, last, C)."""
    attention, y = layer.self_attn, layer.input_layernorm(x)
    q = attention.split(attention.q_proj(y[:, -last:]))                       # (B, H, last, D)
    q = rotate(q, cos[..., -last:, :], sin[..., -last:, :])
    k = rotate(attention.split(attention.k_proj(y)), cos, sin)                # (B, G, T, D)
    v = attention.split(attention.v_proj(y))                                  # (B, G, T, D)
    y = look(attention.layer, q, k, v)                                        # (B, H, last, D)
    x = x[:, -last:] + attention.o_proj(y.transpose(1, 2).flatten(2))         # (B, last, C)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def run(model: LlamaModel, x: Tensor, position_ids: Tensor, cache: KVCache, alternatives: int = 1,
        mask: Tensor | None = None, last: int | None = None) -> Tensor:
    """Embeddings (B, T, C) at position_ids (T,) -> hidden states (B, last, C), after the norm.

    alternatives: so many of the last tokens do not see one another (see mask_of)
    mask:         (T, R), where the new rows are not the next of the cache; None: made here
    last:         so many tokens look in the last layer, and come back; None: all of them
    """
    T = x.shape[1]
    R, last = cache.lengths[0] + T, last or T
    look = look_into(cache, causal_mask(T, R, alternatives, x) if mask is None else mask)
    if mask is not None or last == T:
        return run_layers(model, x, position_ids, look, last, look)
    last_look = look_into(cache, causal_mask(last, R, alternatives, x))
    return run_layers(model, x, position_ids, look, last, last_look)


def run_layers(model: LlamaModel, x: Tensor, position_ids: Tensor, look: Look, last: int,
               last_look: Look) -> Tensor:
    """The same, for any way to look; that of the last layer is given for its `last` tokens."""
    layers = list(model.layers)                                               # not a new ModuleList
    cos, sin = model.angles(position_ids, x.dtype)
    for layer in layers[:-1]:
        x = through(layer, x, cos, sin, look, x.shape[1])                     # (B, T, C)
    return model.norm(through(layers[-1], x, cos, sin, last_look, last))


def feed(model: LlamaForCausalLM, x: Tensor, position_ids: Tensor, cache: KVCache,
         alternatives: int = 1, last: int | None = None) -> Tensor:
    """A pass over embeddings (1, T, C): the logits (last, V) behind its `last` tokens."""
    return model.logits(run(model.model, x, position_ids, cache, alternatives, last=last))[0]


def likeliest(logits: Tensor) -> list[int]:
    """The token of highest logit in each row (T, V).

    raises: NanogapError where logits are not finite, for any token would do then
    """
    best = logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), -1).tolist()
    if -1 in best:
        raise NanogapError(NOT_FINITE)
    return best
