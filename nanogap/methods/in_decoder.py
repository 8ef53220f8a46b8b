"""Pruning between two layers of the decoder: cuts, and an answer that goes on behind them.

In:  a question, and a strategy that cuts inside the decoder.  Out: an answer, and its cuts.

All visual tokens go in.  The prompt is read layer by layer; before the layer of a cut a strategy
(inside.py) says which of them stay, by what the layers below have made of them.  The mode decides
about order and IDs there (gap.py), as it does before the decoder.

The published codes keep the old position IDs (FastV, SparseVLM's version 2, IVC-Prune) or renumber
what is left at each cut (PyramidDrop, SparseVLM's version 1); here each can be asked in every mode.
Letters: P tokens before the image, N visual tokens, n of them at a cut, K kept, M added, A tokens
after the image; H heads, T tokens in the sequence, Q that look at the others.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor

from nanogap import ground as lesson
from nanogap.gap import Layout, lay_out
from nanogap.ground import MAX_NEW_TOKENS, Answer, Keep, Result
from nanogap.llama import KVCache, LlamaModel, rotate
from nanogap.llava import EncodedImage, Llava
from nanogap.methods.cuts import Planned, counts, cuts_in_words, method_of, plan, prunes_there
from nanogap.prune import STRATEGIES, Kept, VisualTokens, budget_of, needs_of

__all__ = ["Pruned", "counts", "cuts_in_words", "ground", "plan", "prunes_there"]


@dataclass(frozen=True)
class Pruned(Result):
    """The answer of a decoder that dropped tokens: `keep` and IDs are those after its last cut."""

    cuts: list[tuple[int, int]]   # (layer, visual tokens from there on)


def ground(model: Llava, image: Image.Image | str | Path | EncodedImage, expression: str,
           prune: str = "fastv", keep: Keep = "50%", mode: str = "gap", seed: int = 0, *,
           max_new_tokens: int = MAX_NEW_TOKENS, question: str | None = None) -> Result:
    """Find what an expression refers to, with cuts in the decoder: see nanogap/ground.py.

    Where nothing is pruned, or indices are given, there is no cut, and no Pruned comes back.
    """
    if mode == "full" or not (keep is None or isinstance(keep, int | str)):
        return lesson.ground(model, image, expression, prune, keep, mode, seed,
                             max_new_tokens=max_new_tokens, question=question)
    encoded = model.encode_image(image)
    N, decoder = encoded.n_visual, model.language_model.model
    cuts = plan(prune, N, budget_of(keep, N, prune), len(decoder.layers))
    input_ids = model.encode_question(question or model.template.question(expression))
    P, A = model.around_image(input_ids)
    reader = Reader(decoder, prune, mode, seed, cuts, P, N, A)

    def decode(model: Llava, x: Tensor, layout: Layout, max_new_tokens: int) -> Answer:
        # as the lesson does, with the reader in the place of the decoder
        parts: Any = SimpleNamespace(end_tokens=model.end_tokens, language_model=SimpleNamespace(
            model=reader, logits=model.language_model.logits))
        return lesson.greedy(parts, x, layout, max_new_tokens)

    result = lesson.ground(model, encoded, expression, prune, torch.arange(N), mode, seed,
                           max_new_tokens=max_new_tokens, question=question, decode=decode)
    last = reader.stages[-1].layout
    return Pruned(**vars(result) | {
        "keep": last.kept, "position_ids": last.position_ids,
        "next_position": last.next_position, "visual_tokens": reader.visual_tokens,
        "cuts": [(stage.start, stage.n) for stage in reader.stages[1:]]})


@dataclass(frozen=True)
class Stage:
    """A run of layers that see the same tokens."""

    start: int                # the first of these layers
    layout: Layout            # which token stands where, in them
    n: int                    # visual tokens: kept and added


class Reader:
    """A decoder that drops visual tokens of the prompt before the layer of each cut.

    It is called as the decoder is that it reads with: with the prompt, and then token by token.
    """

    def __init__(self, decoder: LlamaModel, prune: str, mode: str, seed: int, cuts: Planned,
                 P: int, N: int, A: int) -> None:
        self.decoder, self.prune, self.mode, self.seed = decoder, prune, mode, seed
        self.config, self.embed_tokens = decoder.config, decoder.embed_tokens
        self.cuts, self.P, self.N, self.A = cuts, P, N, A
        self.method, self.needs = method_of(prune), needs_of(prune)
        self.stages = [Stage(0, lay_out(torch.arange(N), P, N, A, mode), N)]
        self.visual_tokens = float(N)        # in the mean over the caches of all layers

    def __call__(self, x: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
        """Hidden states (1, T', C) of the prompt (1, T, C), or of a token of the answer (1, 1, C).

        position_ids: (T,) or (1,) as they are without a cut
        """
        if cache.lengths[0] == 0:
            return self.read(x, cache)
        # token t of the answer goes on behind the prompt's IDs, which each stage has of its own
        t = position_ids - self.stages[0].layout.next_position                # (1,)
        ends = [stage.start for stage in self.stages[1:]] + [len(cache.lengths)]
        for stage, end in zip(self.stages, ends, strict=True):
            x = self.run(x, stage.layout.next_position + t, cache, stage.start, end)
        return self.decoder.norm(x)

    def read(self, x: Tensor, cache: KVCache) -> Tensor:
        """A prompt (1, T, C) -> what its last layers make of what is left of it (1, T', C)."""
        raters = raters_of(x, self.P, self.N) if self.method.raters else None
        for layer, budget in self.cuts:
            before, n = self.stages[-1], self.stages[-1].n
            shown_at = layer if self.method.ahead else layer - 1
            ids = before.layout.position_ids.to(x.device)                     # (T,)
            fed = self.run(x, ids, cache, before.start, shown_at)             # (1, T, C)
            x = self.run(fed, ids, cache, shown_at, layer)                    # (1, T, C)
            fields = self.fields(shown_at, fed, ids, n, raters)
            seen = VisualTokens(x[0, self.P:self.P + n], 1, n, fields)
            kept = STRATEGIES[self.prune](seen, budget and min(budget, n),
                                          Generator().manual_seed(self.seed))
            x = self.cut(x, layer, kept, cache)                               # (1, T', C)
        last = self.stages[-1]
        rows = [length - self.P - self.A for length in cache.lengths[:last.start]]
        rows += [last.n] * (len(cache.lengths) - len(rows))
        self.visual_tokens = sum(rows) / len(rows)
        ids = last.layout.position_ids.to(x.device)
        return self.decoder.norm(self.run(x, ids, cache, last.start, len(rows)))

    def run(self, x: Tensor, ids: Tensor, cache: KVCache, start: int, stop: int) -> Tensor:
        """Tokens (1, T, C) at position IDs (T,) through the layers from `start` up to `stop`."""
        cos, sin = self.decoder.angles(ids, x.dtype)
        for layer in self.decoder.layers[start:stop]:
            x = layer(x, cos, sin, cache)
        return x

    def cut(self, x: Tensor, layer: int, kept: Kept, cache: KVCache) -> Tensor:
        """What stays of a sequence (1, T, C); a new stage begins with it.

        kept.ranked: places among the n visual tokens: patches first, then those added at earlier
                     cuts, which have no place in the image and stay behind the patches
        """
        before, P, end = self.stages[-1], self.P, self.P + self.stages[-1].n
        ranked = kept.ranked.cpu()                                            # (K,)
        patch = ranked < len(before.layout.kept)
        patches, others = patch.nonzero()[:, 0], (~patch).nonzero()[:, 0]
        left = lay_out(before.layout.kept[ranked[patches]], P, self.N, self.A, self.mode,
                       len(others) + kept.n_added)
        order = torch.cat([patches[left.order], others])                      # (K,)
        visual = kept.features
        if visual is None:
            visual = x[0, P:end][ranked.to(x.device)]                         # (K, C)
        parts = [x[0, :P], visual[order.to(x.device)], x[0, end:]]
        if kept.added is not None:
            parts.insert(2, kept.added)
        self.stages.append(Stage(layer, left, len(ranked) + kept.n_added))
        if self.method.caches:
            stays = torch.cat([torch.arange(P), P + ranked[order], torch.arange(end, x.shape[1])])
            for below in range(1, layer):
                cut_rows(cache, below, stays.to(x.device))
        return torch.cat(parts)[None]

    # ----- what a strategy is shown ---------------------------------------------------------------

    def fields(self, layer: int, x: Tensor, ids: Tensor, n: int,
               raters: Tensor | None) -> dict[str, Tensor]:
        """What the strategy needs to see of what a layer is fed (1, T, C): see inside.py."""
        fields, T = {}, x.shape[1]
        if "attention" in self.needs:
            looking = torch.tensor([-1], device=x.device) if raters is None else raters
            attention = self.attention(layer, x, ids, T + looking)            # (H, T)
            fields["attention"] = attention[:, self.P:self.P + n]             # (H, n)
        if "value_attention" in self.needs:
            fields["value_attention"] = self.value_attention(layer, x, n)
        if "axes" in self.needs:
            cos, sin = self.decoder.angles(ids[self.P:self.P + n], torch.float32)   # (1, n, D)
            fields["axes"] = torch.cat([cos, sin]).mean(-1)                   # (2, n)
        return fields

    def attention(self, layer: int, x: Tensor, ids: Tensor, queries: Tensor) -> Tensor:
        """How much tokens at places (Q,) look at all others in a layer, their mean: (H, T)."""
        block, T, D = self.decoder.layers[layer], x.shape[1], self.decoder.config.head_dim
        projected, (cos, sin) = block.self_attn, self.decoder.angles(ids, x.dtype)
        h = block.input_layernorm(x)                                          # (1, T, C)
        q = projected.split(projected.q_proj(h[:, queries]))                  # (1, H, Q, D)
        q = rotate(q, cos[:, queries], sin[:, queries])
        k = rotate(projected.split(projected.k_proj(h)), cos, sin)            # (1, G, T, D)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)              # (1, H, T, D)
        scores = q @ k.transpose(2, 3) * D ** -0.5                            # (1, H, Q, T)
        later = torch.arange(T, device=x.device) > queries[:, None]           # (Q, T)
        weights = scores.float().masked_fill(later, float("-inf")).softmax(-1)[0]
        if self.method.corrected:   # by the products of vectors of ones under RoPE
            cos, sin = self.decoder.angles(ids, torch.float32)                # (1, T, D)
            turned = rotate(torch.ones_like(cos), cos, sin)[0]                # (T, D)
            weights = weights / (turned[queries] @ turned.T * D ** -0.5)
        return weights.mean(1)

    def value_attention(self, layer: int, x: Tensor, n: int) -> Tensor:
        """How much visual tokens, and then the question's, would look at visual ones: (n + Q, n).

        Softmax of the products of values, without position and without a mask; the mean over heads.
        The question begins two tokens behind the image, as in IVC-Prune's code.  differs: where no
        more than two stand there, it is the last one
        """
        block, P, end = self.decoder.layers[layer], self.P, self.P + n
        values = block.self_attn.split(block.self_attn.v_proj(block.input_layernorm(x)))
        question = min(end + 2, x.shape[1] - 1)
        total = torch.zeros((), device=x.device)
        for v in values[0].float():                                           # (T, D) of each head
            rows = torch.cat([v[P:end], v[question:]])                        # (n + Q, D)
            total = total + (rows @ v.T * v.shape[1] ** -0.5).softmax(-1)[:, P:end]
        return total / values.shape[1]


def raters_of(x: Tensor, P: int, n: int) -> Tensor:
    """Which tokens after the image are about it: places (Q,), counted from the end, -1 the last.

    x: (1, T, C) embeddings of the prompt.  A rater's share of the products with visual tokens is
    above the mean; where all are equal, the last token rates.  source: SparseVLM's code
    """
    visual, text = x[0, P:P + n].float(), x[0, P + n:].float()                # (n, C), (A, C)
    share = (visual @ text.T).softmax(1).mean(0)                              # (A,)
    raters = (share > share.mean()).nonzero()[:, 0]
    return raters - len(text) if len(raters) else raters.new_tensor([-1])


def cut_rows(cache: KVCache, layer: int, stays: Tensor) -> None:
    """Leave only some rows (R,) in the cache of a layer."""
    for rows in (cache.keys[layer], cache.values[layer]):                     # (B, G, rows, D)
        rows[:, :, :len(stays)] = rows[:, :, stays]
    cache.lengths[layer] = len(stays)
