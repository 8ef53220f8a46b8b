"""FastV: pruning between two layers of the decoder (arXiv 2403.06764).

In:  a prompt with all visual tokens.  Out: logits, and a cache whose later layers hold fewer rows.

The first layers read everything; then the prompt's last token has looked at every patch, and what it
hardly looked at is taken out of the sequence.  The published code lets the rest keep their position IDs,
so it has always been GAP; here the mode decides, and "shifted" shows what renumbering would have cost.
Its own names for the budget are K, the layer before which it cuts, and R, the share that it drops.
Letters: P tokens before the image, N patches, A tokens after it, T = P + N + A.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanogap import gap
from nanogap.decode import Decoder
from nanogap.llama import KVCache, LlamaForCausalLM, rope_angles, rotate
from nanogap.prune import Kept

CUT = 2   # FastV's K: how many layers see all tokens, where nothing else is asked for


def last_token_looks_at(model: LlamaForCausalLM, layer: int, x: Tensor, position: Tensor,
                        cache: KVCache) -> Tensor:
    """Attention weights (H, R) of one layer's last token over all R rows, written out.

    x: (1, 1, C), the last token as that layer was fed it; position: (1,), its position ID
    """
    block, rows = model.model.layers[layer], cache.lengths[layer]
    attention, config = block.self_attn, model.model.config
    cos, sin = rope_angles(position, config.head_dim, config.rope_theta)
    q = attention.split(attention.q_proj(block.input_layernorm(x)))           # (1, H, 1, D)
    q = rotate(q, cos.to(x.dtype), sin.to(x.dtype))                           # (1, H, 1, D)
    k = cache.keys[layer, :, :, :rows]                                        # (1, G, R, D), turned before
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)                  # (1, H, R, D)
    scores = q @ k.transpose(2, 3) * config.head_dim ** -0.5  # (1,H,1,D) x (1,H,D,R) -> (1,H,1,R)
    return scores.float().softmax(-1)[0, :, 0]


def prefill(model: LlamaForCausalLM, x: Tensor, cache: KVCache, before: int, n_visual: int, mode: str,
            choose: Callable[[Tensor], Kept], cut: int = CUT) -> tuple[Tensor, Tensor, Tensor, int]:
    """Read a prompt (1, T, C), and cut it before layer `cut`, counted from 0.

    choose:  from attention weights (H, N) of the last token to the patches to those that stay
    returns: logits (1, V) of the last token; what stays, in sequence order (K,); the position IDs after
             the cut (P + K + A,); and the ID of the first generated token there
    """
    decoder, T = model.model, x.shape[1]
    ids = torch.arange(T, device=x.device)
    x = decoder.run(x, ids, cache, 0, cut - 1)
    last = x[:, -1:]
    x = decoder.run(x, ids, cache, cut - 1, cut)                              # (1, T, C)
    weights = last_token_looks_at(model, cut - 1, last, ids[-1:], cache)      # (H, T)
    kept = choose(weights[:, before:before + n_visual])
    after = T - before - n_visual
    position_ids, next_position = gap.position_ids(kept.keep, before, n_visual, after, mode)
    keep = gap.arrange(kept.keep, gap.MODES[mode][0])
    stays = torch.cat([ids[:before], before + keep.to(ids.device), ids[before + n_visual:]])
    x = decoder.run(x[:, stays], position_ids.to(x.device), cache, cut, last=1)  # (1, 1, C)
    return model.lm_head(decoder.norm(x)[0]).float(), keep, position_ids, next_position


def decoder(model: LlamaForCausalLM, shift: int, cut: int = CUT) -> Decoder:
    """A pass of the decoder in which the layers after the cut see position IDs that are `shift` lower."""
    def run(x: Tensor, position_ids: Tensor, cache: KVCache, last: int) -> Tensor:
        x = model.model.run(x, position_ids, cache, 0, cut)
        x = model.model.run(x, position_ids - shift, cache, cut, last=last)
        return model.lm_head(model.model.norm(x)).float()
    return run


def mean_tokens(layers: int, n_visual: int, kept: int, cut: int = CUT) -> float:
    """Visual tokens in the decoder, the mean over its layers."""
    return (cut * n_visual + (layers - cut) * kept) / layers
