"""Pruning in the decoder by hand: all is fed again for each token, with attention written out.

Letters: P tokens before the image, N patches, n visual tokens, A tokens after the image; H heads,
T tokens of the sequence, C channels, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanogap.gap import MODES
from nanogap.llama import rope_angles, rotate
from nanogap.models import VLM
from nanogap.prune import Kept

PICTURE = Path(__file__).resolve().parents[2] / "image.jpg"
WORDS = "the man"


def best(scores: Sequence[float] | Tensor, count: int) -> list[int]:
    """Places of the highest scores, highest first; of equal ones the first."""
    known = [float(score) for score in scores]
    return sorted(range(len(known)), key=lambda i: (-known[i], i))[:count]


def whole(model: VLM) -> tuple[Tensor, int, int, int]:
    """The prompt with all patches: embeddings (1, T, C), P, N and A."""
    image, input_ids = model.encode_image(PICTURE), model.prompt(WORDS)
    every = torch.arange(image.n_visual)
    P, A = model.around_image(input_ids)
    return model.embed(input_ids, image, Kept(every), every), P, len(every), A


def layers_by_hand(model: VLM, x: Tensor, ids: list[int], start: int,
                   stop: int) -> tuple[Tensor, Tensor | None]:
    """Layers from `start` up to `stop`, attention written out: hidden states, the last (H,T,T)."""
    c, weights = model.config.text, None
    cos, sin = rope_angles(torch.tensor(ids), c.head_dim, c.rope_theta)
    for layer in model.language_model.model.layers[start:stop]:
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (project(h).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
                   for project in (a.q_proj, a.k_proj, a.v_proj))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(2, 3) / c.head_dim ** 0.5
        later = torch.ones_like(scores[0, 0]).triu(1).bool()
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        x = x + a.o_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x, None if weights is None else weights[0]


def ids_by_hand(visual: Sequence[int | None], P: int, N: int, A: int, mode: str) -> list[int]:
    """Position IDs in plain Python; a visual token is a patch, or None where it was added."""
    _, visual_ids, text_ids = MODES[mode]
    ids = list(range(P))
    for place, patch in enumerate(visual):
        original = N - 1 if patch is None else patch
        ids.append(P + (original if visual_ids == "original" else place))
    length = N if text_ids == "original" else len(visual)
    return [*ids, *range(P + length, P + length + A)]


# which visual tokens stay, given their hidden states (n, C), the weights (H, T, T) of the layer
# before the cut and of the layer behind it, and the IDs: their places, and (M, C) to be added
Pick = Callable[[Tensor, Tensor, Tensor, list[int]], tuple[list[int], Tensor]]


class Whole:
    """An answer to a prompt that is fed as a whole, again and again, and cut by cut."""

    def __init__(self, model: VLM, mode: str, cuts: Sequence[tuple[int, Pick]], most: int) -> None:
        self.model, self.mode, self.cuts = model, mode, cuts
        self.x, self.P, self.N, self.A = whole(model)
        self.visual: list[list[int | None]] = []     # in each stage
        self.ids: list[list[int]] = []               # of the prompt, in each stage
        self.said: list[int] = []
        while len(self.said) < most and not set(model.end_tokens) & set(self.said):
            self.said.append(int(self.logits(self.said).argmax()))

    def logits(self, said: Sequence[int]) -> Tensor:
        """Behind the prompt and so many tokens of the answer: (V,)."""
        decoder = self.model.language_model.model
        x = torch.cat([self.x, decoder.embed_tokens(torch.tensor([said]).long())], 1)
        visual: list[int | None] = list(range(self.N))
        self.visual, self.ids, start = [visual], [], 0
        for layer, pick in self.cuts:
            n, T = len(visual), x.shape[1] - len(said)
            ids = ids_by_hand(visual, self.P, self.N, self.A + len(said), self.mode)
            self.ids.append(ids[:T])
            x, before = layers_by_hand(self.model, x, ids, start, layer)
            _, behind = layers_by_hand(self.model, x, ids, layer, layer + 1)
            own = x[0, self.P:self.P + n]
            chosen, added = pick(own, before[:, :T, :T], behind[:, :T, :T], ids[:T])
            patches = [i for i in chosen if visual[i] is not None]
            others = [i for i in chosen if visual[i] is None]
            if MODES[self.mode][0] == "raster":
                patches.sort(key=lambda i: visual[i])
            places = [*patches, *others]
            parts = [x[0, :self.P], own[places], added, x[0, self.P + n:]]
            x, start = torch.cat(parts)[None], layer
            visual = [*(visual[i] for i in places), *[None] * len(added)]
            self.visual.append(visual)
        ids = ids_by_hand(visual, self.P, self.N, self.A + len(said), self.mode)
        self.ids.append(ids[:len(ids) - len(said)])
        x, _ = layers_by_hand(self.model, x, ids, start, len(decoder.layers))
        return self.model.language_model.lm_head(decoder.norm(x))[0, -1]


def means_of_clusters(x: Tensor, count: int) -> Tensor:
    """SparseVLM's clustering as its published code does it, in loops.

    Without its noise: of equally dense tokens the first is denser.
    """
    points = x.tolist()
    m, C = len(points), len(points[0])
    apart = [[math.dist(a, b) / C ** 0.5 for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in apart]
    farthest = max(map(max, apart))
    scores = []
    for i in range(m):
        to_denser = [apart[i][j] for j in range(m)
                     if density[j] > density[i] or density[j] == density[i] and j < i]
        scores.append(min(to_denser, default=farthest) * density[i])
    centres = sorted(range(m), key=lambda i: (-scores[i], i))[:count]
    members: list[list[int]] = [[] for _ in centres]
    for i in range(m):
        to = [apart[centre][i] for centre in centres]
        members[centres.index(i) if i in centres else to.index(min(to))].append(i)
    return torch.tensor([[sum(points[i][c] for i in own) / len(own) for c in range(C)]
                         for own in members])


def turned_ones(distance: int, head_dim: int, theta: float) -> float:
    """Product of two vectors of ones, so far apart, turned by RoPE and divided as scores are."""
    angles = (distance * theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2))
    return sum(2 * math.cos(angle) for angle in angles) / head_dim ** 0.5


def raters_by_hand(x: Tensor, P: int, n: int) -> list[int]:
    """Places in the sequence of the text tokens that look at the image, in loops over tokens."""
    sequence = x[0].tolist()
    visual, text = sequence[P:P + n], sequence[P + n:]
    share = [0.0] * len(text)
    for patch in visual:
        products = [sum(map(float.__mul__, patch, token)) for token in text]
        powers = [math.exp(product - max(products)) for product in products]
        for i, power in enumerate(powers):
            share[i] += power / sum(powers) / n
    return [P + n + i for i, own in enumerate(share) if own > sum(share) / len(text)]
