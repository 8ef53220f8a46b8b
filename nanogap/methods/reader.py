"""Pruning between two layers of the decoder: cuts, and an answer that goes on behind them.

All visual tokens go in.  Before the layer of a cut a strategy (in_decoder.py) says which stay, by
what the layers below have made of them, and the mode decides about order and IDs (gap.py).  Here
each can be asked in every mode; of the published codes those of FastV, SparseVLM+ and IVC-Prune
keep the old IDs, and PyramidDrop's and SparseVLM's renumber what is left at each cut.
Letters: P tokens before the image, N visual tokens, n of them at a cut, K kept, M added, A tokens
after the image; H heads, G key-value heads, T tokens in the sequence, Q that look at the others.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor

from nanogap import ground as lesson
from nanogap.gap import Layout, lay_out
from nanogap.ground import MAX_NEW_TOKENS, Answer, Keep, Result
from nanogap.llama import KVCache, LlamaAttention, LlamaModel, rotate
from nanogap.llava import Llava
from nanogap.methods.in_decoder import mean_tokens, method_of, plan
from nanogap.prune import STRATEGIES, VisualTokens, budget_of, needs_of


@dataclass(frozen=True)
class Pruned(Result):
    """The answer of a decoder that dropped tokens: `keep` and IDs are those after its last cut."""
    cuts: list[tuple[int, int]]   # (layer, visual tokens from there on)


def ground(model: Llava, image: Any, expression: str, prune: str = "fastv", keep: Keep = "50%",
           mode: str = "gap", seed: int = 0, *, max_new_tokens: int = MAX_NEW_TOKENS,
           question: str | None = None) -> Pruned:
    """Find what an expression refers to, with cuts in the decoder: see nanogap/ground.py."""
    encoded = model.encode_image(image)
    N, decoder = encoded.n_visual, model.language_model.model
    cuts = dict(plan(prune, N, budget_of(keep, N, prune), len(decoder.layers)))
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
    last, made = reader.layouts[-1], [(layer, reader.n_visual(layer)) for layer in reader.cuts]
    return Pruned(**vars(result) | {
        "keep": last.kept, "position_ids": last.position_ids, "cuts": made,
        "next_position": last.next_position,
        "visual_tokens": mean_tokens(prune, N, made, len(decoder.layers))})


class Reader:
    """A decoder that drops visual tokens of the prompt before some layers, called like another."""

    def __init__(self, decoder: LlamaModel, prune: str, mode: str, seed: int, cuts: dict[int, Any],
                 P: int, N: int, A: int) -> None:
        self.decoder, self.prune, self.mode, self.seed = decoder, prune, mode, seed
        self.config, self.embed_tokens = decoder.config, decoder.embed_tokens
        self.cuts, self.method = cuts, method_of(prune)   # layer -> visual tokens it keeps
        self.P, self.N, self.A = P, N, A
        self.looking = torch.tensor([-1], device=decoder.norm.weight.device)   # from the end
        everything = lay_out(torch.arange(N), P, N, A, mode)
        self.layouts = [everything] * len(decoder.layers)   # which token stands where, by layer

    def n_visual(self, layer: int) -> int:
        """How many visual tokens a layer sees, kept and added."""
        return len(self.layouts[layer].position_ids) - self.P - self.A

    def __call__(self, x: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
        """Hidden states (1, T', C) of the prompt (1, T, C), or of a token of the answer (1, 1, C).

        position_ids: (T,) or (1,) as they are without a cut
        """
        reading = cache.lengths[0] == 0
        if reading and self.method.raters:
            self.looking = raters_of(x, self.P, self.N)
        # token t of the answer goes on behind the prompt's IDs, which each layer has of its own
        t = position_ids - self.layouts[0].next_position                      # (1,)
        fed = x
        for number, layer in enumerate(self.decoder.layers):
            if reading and number in self.cuts:
                x = self.cut(number, fed, x, cache)                           # (1, T', C)
            if number == 0 or number in self.cuts:
                layout = self.layouts[number]
                ids = layout.position_ids.to(x.device) if reading else layout.next_position + t
                cos, sin = self.decoder.angles(ids, x.dtype)
            fed, x = x, layer(x, cos, sin, cache)
        return self.decoder.norm(x)

    def cut(self, layer: int, fed: Tensor, x: Tensor, cache: KVCache) -> Tensor:
        """What stays of a prompt x before a layer: (1, T', C).  fed: what the one before it was."""
        before, n, P = self.layouts[layer - 1], self.n_visual(layer - 1), self.P
        shown, hidden = (layer, x) if self.method.ahead else (layer - 1, fed)
        fields = self.fields(shown, hidden, before.position_ids.to(x.device), n)
        visual, budget = x[0, P:P + n], self.cuts[layer]                      # (n, C)
        kept = STRATEGIES[self.prune](VisualTokens(visual, 1, n, fields), budget and min(budget, n),
                                      Generator().manual_seed(self.seed))
        if kept.features is not None:
            x[0, P + kept.ranked] = kept.features
        # patches come first; those added at earlier cuts have no place in the image, and stay last
        ranked, n_before = kept.ranked.cpu(), len(before.kept)                # (K,)
        patches, others = ranked[ranked < n_before], ranked[ranked >= n_before]
        left = lay_out(before.kept[patches], P, self.N, self.A, self.mode,
                       len(others) + kept.n_added)
        self.layouts[layer:] = [left] * len(self.layouts[layer:])
        visual = P + torch.cat([patches[left.order], others])                 # (K,)
        stays = torch.cat([torch.arange(P), visual, torch.arange(P + n, x.shape[1])])
        stays = stays.to(x.device)                                            # (P + K + A,)
        if self.method.caches:
            for below in range(1, layer):
                for rows in (cache.keys[below], cache.values[below]):         # (B, G, rows, D)
                    rows[:, :, :len(stays)] = rows[:, :, stays]
                cache.lengths[below] = len(stays)
        x = x[:, stays]                                                       # (1, P + K + A, C)
        if kept.added is None:
            return x
        before_added, text = x.split([P + len(ranked), self.A], dim=1)
        return torch.cat([before_added, kept.added[None], text], dim=1)

    def fields(self, layer: int, x: Tensor, ids: Tensor, n: int) -> dict[str, Tensor]:
        """What the strategy needs to see of what a layer is fed (1, T, C): see in_decoder.py."""
        fields, needs, P = {}, needs_of(self.prune), self.P
        block = self.decoder.layers[layer]
        h = block.input_layernorm(x)                                          # (1, T, C)
        if "attention" in needs:
            weights = self.attention(block.self_attn, h, ids)                 # (H, Q, T)
            fields["attention"] = weights.mean(1)[:, P:P + n]                 # (H, n)
        if "value_attention" in needs:
            fields["value_attention"] = value_attention(block.self_attn, h[0], P, n)
        if "axes" in needs:
            cos, sin = self.decoder.angles(ids[P:P + n], torch.float32)       # (1, n, D)
            fields["axes"] = torch.cat([cos, sin]).mean(-1)                   # (2, n)
        return fields

    def attention(self, projected: LlamaAttention, h: Tensor, ids: Tensor) -> Tensor:
        """How much the tokens that look attend to all others in a layer: (H, Q, T)."""
        T, D, queries = h.shape[1], self.config.head_dim, h.shape[1] + self.looking
        cos, sin = self.decoder.angles(ids, h.dtype)
        q = projected.split(projected.q_proj(h[:, queries]))                  # (1, H, Q, D)
        q = rotate(q, cos[:, queries], sin[:, queries])
        k = rotate(projected.split(projected.k_proj(h)), cos, sin)            # (1, G, T, D)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)              # (1, H, T, D)
        scores = q @ k.transpose(2, 3) * D ** -0.5                            # (1, H, Q, T)
        later = torch.arange(T, device=h.device) > queries[:, None]           # (Q, T)
        weights = scores.float().masked_fill(later, float("-inf")).softmax(-1)[0]
        if self.method.corrected:   # by the products of vectors of ones under RoPE
            cos, sin = self.decoder.angles(ids, torch.float32)                # (1, T, D)
            turned = rotate(torch.ones_like(cos), cos, sin)[0]                # (T, D)
            weights = weights / (turned[queries] @ turned.T * D ** -0.5)
        return weights


def raters_of(x: Tensor, P: int, n: int) -> Tensor:
    """Which tokens after the image are about it: places (Q,), counted from the end, -1 the last.

    In x (1, T, C) they have more than the mean share of the products with visual tokens; where all
    are equal, the last token rates.  source: SparseVLM's code
    """
    visual, text = x[0, P:P + n].float(), x[0, P + n:].float()                # (n, C), (A, C)
    share = (visual @ text.T).softmax(1).mean(0)                              # (A,)
    raters = (share > share.mean()).nonzero()[:, 0]
    return raters - len(text) if len(raters) else raters.new_tensor([-1])


def value_attention(projected: LlamaAttention, h: Tensor, P: int, n: int) -> Tensor:
    """How much visual tokens, and then the question's, would look at visual ones: (n + Q, n).

    Softmax of the products of values, without position and mask; the mean over heads.  The question
    begins two tokens behind the image, as in the code.  differs: at the last token at the latest
    """
    values = projected.split(projected.v_proj(h[None]))[0].float()            # (G, T, D)
    question = min(P + n + 2, len(h) - 1)
    total = torch.zeros((), device=h.device)
    for v in values:                                                          # (T, D) of each head
        rows = torch.cat([v[P:P + n], v[question:]])                          # (n + Q, D)
        total = total + (rows @ v.T * v.shape[1] ** -0.5).softmax(-1)[:, P:P + n]
    return total / len(values)
