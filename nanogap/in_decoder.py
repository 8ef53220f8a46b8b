"""Reading the prompt, and pruning on the way, between two layers of the decoder.

In:  a prompt with its visual tokens, and a list of cuts.
Out: logits, and a cache whose later layers hold fewer rows where there were cuts.

With an empty list this is prefill as everybody knows it.  A cut stands before a layer.  The layers
below it have read everything, and what the prompt's last token looked at there says which visual
tokens stay.  The mode decides about their order and IDs (gap.py), as it does before the decoder.
FastV (arXiv 2403.06764) is one cut.  Its published code lets the kept tokens have their old
position IDs, so it has always been GAP; mode "shifted" shows what renumbering would have cost.
Its own names for the budget are K, the layer before which it cuts, and R, the share that it drops.
Letters: P tokens before the image, N visual tokens, K of them kept, A tokens after it; H heads,
T tokens in the sequence, D of them drafted, R rows in the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from nanogap import gap
from nanogap.cli import NanogapError
from nanogap.gap import Layout
from nanogap.llama import Decoder, KVCache, LlamaDecoderLayer, LlamaForCausalLM, rope_angles, rotate
from nanogap.prompt import NOTHING, Draft
from nanogap.prune import Kept, View, VisualTokens, check, ranked, select, strategy

FASTV_LAYER = 2   # FastV's K: how many layers see all tokens, where nothing else is asked for


@dataclass(frozen=True)
class Cut:
    """Visual tokens are dropped before a layer."""

    layer: int                         # counted from 0
    choose: Callable[[Tensor], Kept]   # of n visual tokens, by the last token's attention (H, n)


@strategy(needs={"attention"})
def fastv(seen: VisualTokens, budget: int, generator: torch.Generator) -> Kept:
    """Patches that the prompt's last token attends to in a decoder layer: FastV, arXiv 2403.06764.

    The paper speaks of the attention of all tokens; its code takes the last one's row, as here.
    """
    return Kept(ranked(seen.attention.float().mean(0), budget))


def cuts_of(name: str, views: Sequence[View], budget: int | None, seed: int, layer: int,
            layers: int) -> list[Cut]:
    """The cuts of a strategy in a decoder of so many layers.

    layer:  before which FastV cuts
    raises: NanogapError for a layer or a budget that there cannot be
    """
    check(name, sum(len(view.index) for view in views), budget)
    if not 0 < layer < layers:
        raise NanogapError(f"{name} cannot cut before layer {layer} of {layers}: "
                           f"choose one from 1 to {layers - 1}")

    def choose(attention: Tensor) -> Kept:
        looked_at = []
        for view in views:
            fields = {"attention": attention[:, view.index.to(attention.device)]}   # (H, n)
            seen = replace(view.seen, fields=view.seen.fields | fields)
            looked_at.append(replace(view, seen=seen))
        return select(name, looked_at, budget, seed)

    return [Cut(layer, choose)]


def last_token_looks_at(model: LlamaForCausalLM, layer: int, x: Tensor, position: Tensor,
                        cache: KVCache) -> Tensor:
    """Attention weights (H, R) of one layer's last token over all R rows, written out.

    x: (1, 1, C), the last token as that layer was fed it; position: (1,), its position ID
    """
    block = cast(LlamaDecoderLayer, model.model.layers[layer])
    attention, config, rows = block.self_attn, model.model.config, cache.lengths[layer]
    cos, sin = rope_angles(position, config.head_dim, config.rope_theta)
    q = attention.split(attention.q_proj(block.input_layernorm(x)))           # (1, H, 1, D)
    q = rotate(q, cos.to(x.dtype), sin.to(x.dtype))                           # (1, H, 1, D)
    k = cache.keys[layer, :, :, :rows]                                        # (1, G, R, D), turned
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)                  # (1, H, R, D)
    scores = q @ k.transpose(2, 3) * config.head_dim ** -0.5  # (1,H,1,D) x (1,H,D,R) -> (1,H,1,R)
    return scores.float().softmax(-1)[0, :, 0]


# ----- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A run of layers that see the same tokens."""

    start: int                # the first of these layers
    layout: Layout            # which token stands where, in them


@dataclass
class Prefilled:
    """A prompt that was read: what an answer goes on from."""

    model: LlamaForCausalLM
    cache: KVCache
    logits: Tensor                 # (1 + D, V) after the prompt, and after each of D drafted tokens
    drafted: Draft
    stages: list[Stage]             # one, and one more for each cut
    decoder: Decoder | None = None  # runs a pass in place of the model: bench/graph.py
    passes: int = 0                 # of the decoder since then

    @property
    def layout(self) -> Layout:
        """Which token stands where in the last layers."""
        return self.stages[-1].layout

    @property
    def next_position(self) -> int:
        """ID of the first generated token, as the first layers see it."""
        return self.stages[0].layout.next_position

    def feed(self, tokens: Sequence[int], position_ids: Sequence[int],
             alternatives: int = 1) -> Tensor:
        """A pass over new tokens: logits (T, V).

        position_ids: as the first layers see them; behind a cut that renumbered they are lower
        """
        decoder, device = self.model.model, self.logits.device
        x = decoder.embed_tokens(torch.tensor(tokens, device=device))[None]   # (1, T, C)
        ids = torch.tensor(position_ids, device=device)                       # (T,)
        self.passes += 1
        if len(self.stages) == 1:
            return (self.decoder or self.model)(x, ids, self.cache, alternatives)[0]
        for stage, stop in zip(self.stages, self.ends(), strict=True):
            moved = self.next_position - stage.layout.next_position
            x = decoder.run(x, ids - moved, self.cache, stage.start, stop, alternatives)
        return self.model.logits(decoder.norm(x))[0]

    def ends(self) -> list[int]:
        """Before which layer each stage ends."""
        return [stage.start for stage in self.stages[1:]] + [len(self.cache.lengths)]

    def visual_tokens(self) -> float:
        """Visual tokens in the decoder, the mean over its layers."""
        if len(self.stages) == 1:
            return self.layout.visual_tokens
        total = sum((end - stage.start) * stage.layout.visual_tokens
                    for stage, end in zip(self.stages, self.ends(), strict=True))
        return total / len(self.cache.lengths)


def prefill(model: LlamaForCausalLM, x: Tensor, layout: Layout, cuts: Sequence[Cut] = (),
            drafted: Draft = NOTHING, room: int = 0, prefix: KVCache | None = None) -> Prefilled:
    """Read a prompt, and drop visual tokens before the layer of each cut.

    x:       (1, T, C) embeddings of the prompt
    layout:  which of its tokens stands where
    drafted: tokens that are read with it and stand behind it; none where there are cuts
    room:    rows of the cache that stay free
    prefix:  the cache of its first tokens, where these were read before; None where there are cuts
    """
    decoder, ids = model.model, layout.position_ids.to(x.device)              # (T,)
    behind = torch.tensor(drafted.tokens, device=x.device).long()             # (D,)
    places = torch.tensor(drafted.places(layout.next_position), device=x.device).long()
    x = torch.cat([x, decoder.embed_tokens(behind)[None]], dim=1)             # (1, T + D, C)
    ids = torch.cat([ids, places])                                            # (T + D,)
    cache, stages = KVCache(decoder.config, len(ids) + room, x), [Stage(0, layout)]
    read = cache.copy(prefix) if prefix else 0
    x, ids = x[:, read:], ids[read:]
    for cut in cuts:
        x, stage = run_to(cut, model, x, stages[-1], cache)
        stages.append(stage)
        ids = stage.layout.position_ids.to(x.device)
    x = decoder.run(x, ids, cache, stages[-1].start, None, drafted.alternatives)
    logits = model.logits(decoder.norm(x), 1 + len(drafted.tokens))[0]        # (1 + D, V)
    return Prefilled(model, cache, logits, drafted, stages)


def run_to(cut: Cut, model: LlamaForCausalLM, x: Tensor, stage: Stage,
           cache: KVCache) -> tuple[Tensor, Stage]:
    """Run a stage up to a cut: what stays of the sequence (1, T, C), and the next stage."""
    layout, decoder = stage.layout, model.model
    P, n, ids = layout.P, layout.visual_tokens, layout.position_ids.to(x.device)
    x = decoder.run(x, ids, cache, stage.start, cut.layer - 1)                # (1, T, C)
    last = x[:, -1:]
    x = decoder.run(x, ids, cache, cut.layer - 1, cut.layer)
    weights = last_token_looks_at(model, cut.layer - 1, last, ids[-1:], cache)  # (H, T)
    kept = cut.choose(weights[:, P:P + n]).keep                               # (K,), of the n
    left = gap.drop(layout, kept)
    rows = torch.arange(len(ids), device=x.device)
    stays = torch.cat([rows[:P], P + kept[left.order].to(x.device), rows[P + n:]])
    return x[:, stays], Stage(cut.layer, left)
