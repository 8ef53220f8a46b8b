"""Passes of the lesson's decoder over the tokens of several caches.

The layers are those of nanogap/llama.py and so is what they compute, but in the last one only the
tokens whose logits are wanted look at others.
Letters: T tokens of a pass, R rows in a cache, C channels, H heads, G key-value heads, D head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogap.llama import KVCache, LlamaDecoderLayer, LlamaModel, rotate


class Part(NamedTuple):
    """Some tokens of a pass, which are written into the next rows of a cache."""

    cache: KVCache
    size: int                 # how many
    mask: Tensor | None       # (size, R) added to the scores.  None: a prompt, or one token


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of q (1, H, T, D) to k and v (1, G, R, D): (1, H, T, D).

    One query in half precision goes through float32 on a CPU, whose kernel takes three times as
    long otherwise.
    """
    causal, gqa = mask is None and q.shape[2] > 1, q.shape[1] != k.shape[1]
    if mask is None and not causal and q.device.type == "cpu":
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=gqa)
        return y.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)


def look(parts: Sequence[Part], layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The tokens of each part are written into its cache, and look at all of its rows.

    k, v: (1, G, T, D)
    q:    (1, H, T, D), or of the last tokens alone: the parts before them do not look
    """
    if len(parts) == 1:                    # as below, without the copies
        return attend(q, *parts[0].cache.append(layer, k, v), parts[0].mask)
    found = []
    start = q.shape[2] - k.shape[2]        # of a part among the queries; below 0 it has none
    sizes = [part.size for part in parts]
    for part, own_k, own_v in zip(parts, k.split(sizes, 2), v.split(sizes, 2), strict=True):
        rows = part.cache.append(layer, own_k, own_v)                         # (1, G, R, D) each
        if start >= 0:
            found.append(attend(q[:, :, start:start + part.size], *rows, part.mask))
        start += part.size
    return torch.cat(found, dim=2)


def through(layer: LlamaDecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, parts: Sequence[Part],
            last: int) -> Tensor:
    """Tokens (1, T, C) through a layer, where only the `last` of them look: (1, last, C)."""
    attention, y = layer.self_attn, layer.input_layernorm(x)
    q = attention.split(attention.q_proj(y[:, -last:]))                       # (1, H, last, D)
    q = rotate(q, cos[..., -last:, :], sin[..., -last:, :])
    k = rotate(attention.split(attention.k_proj(y)), cos, sin)                # (1, G, T, D)
    v = attention.split(attention.v_proj(y))                                  # (1, G, T, D)
    y = look(parts, attention.layer, q, k, v)                                 # (1, H, last, D)
    x = x[:, -last:] + attention.o_proj(y.transpose(1, 2).flatten(2))         # (1, last, C)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def run(model: LlamaModel, x: Tensor, position_ids: Tensor, parts: Sequence[Part],
        last: int) -> Tensor:
    """Embeddings (1, T, C) at position_ids (T,) -> hidden states of the last ones (last, C)."""
    layers = list(model.layers)                                               # not a new ModuleList
    cos, sin = model.angles(position_ids, x.dtype)
    for layer in layers[:-1]:
        x = through(layer, x, cos, sin, parts, x.shape[1])                    # (1, T, C)
    return model.norm(through(layers[-1], x, cos, sin, parts, last))[0]
