"""LLaVA's loss, and how conversations are read for it: what several of them share is run once.

It learns the next token of the answers, of several turns as in its own data (arXiv 2304.08485).
Nothing here knows of pruning: in training no token is dropped and no position ID changed.
Letters: N visual tokens of an image, P tokens before them, Q conversations, T tokens, V vocabulary,
M tokens of all answers, B images or other sequences, G key-value heads, R rows, D head dim,
C channels.
"""

import os
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogap.llama import LlamaModel
from nanogap.models import VLM
from nanogap.prune import Kept
from nanogap.train.questions import Batch, Conversation


class SharedPast:
    """Sequences that are run behind others: a cache, from which gradients flow into the past.

    parents: (B,) which sequence of the past each continues
    hidden:  what the decoder makes of them (B, T, C)
    """

    def __init__(self, decoder: LlamaModel, x: Tensor, past: "SharedPast | None" = None,
                 parents: Sequence[int] = ()) -> None:
        self.past = past
        self.parents = torch.tensor(parents, device=x.device)
        self.rows: list[tuple[Tensor, Tensor]] = []       # keys and values (B, G, R, D), per layer
        before = past.rows[0][0].shape[2] if past else 0
        rows = torch.arange(before + x.shape[1], device=x.device)             # (R,)
        new = rows[before:]                                                   # (T,) and their IDs
        self.hidden = decoder(x, new, self, rows <= new[:, None])     # type: ignore[arg-type]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, G, T, D) behind the rows of the past; return all rows (B, G, R, D)."""
        if self.past:
            old_k, old_v = self.past.rows[layer]
            k = torch.cat([old_k[self.parents], k], dim=2)                    # (B, G, R, D)
            v = torch.cat([old_v[self.parents], v], dim=2)
        self.rows.append((k, v))
        return k, v


def llava_loss(model: VLM, batch: Batch) -> Tensor:
    """Next-token cross-entropy on the answers, the weighted mean over all their tokens.

    Each conversation sees only its image and itself, at the position IDs that it would have alone.
    So the sequences form a tree, and each level of it is run once:
    [system sentence] -> [image] -> ["Please provide ... describes:"] -> [expression, answer].
    Shikra's expressions stand before the image, where its tree has as many branches.
    """
    pixels, scenes, said = batch
    decoder = model.language_model.model
    visual = []
    for views, scene in zip(pixels, scenes, strict=True):
        with torch.no_grad():                                                 # the tower is frozen
            image = model.encode_pixels(views.to(model.device), *scene.image.size)
        every = torch.arange(image.n_visual)
        visual.append(model.visual_tokens(image, Kept(every), every))         # (N, C')
    heads: dict[int, list[tuple[int, ...]]] = {}           # by P: one length is run together
    for head in sorted({one.head for one in said}):
        heads.setdefault(len(head), []).append(head)
    begun = {P: SharedPast(decoder, decoder.embed_tokens(padded(rows, model.device)))
             for P, rows in heads.items()}
    found = []
    for N, P in product(dict.fromkeys(map(len, visual)), heads):
        alike = [one for one in said if (len(visual[one.image]), len(one.head)) == (N, P)]
        branches = sorted({(one.head, one.image) for one in alike})           # B of them
        if not branches:
            continue
        seen = SharedPast(decoder, torch.stack([visual[image] for _, image in branches]), begun[P],
                          [heads[P].index(head) for head, _ in branches])
        for kind in dict.fromkeys(one.kind for one in alike):
            of_kind = [one for one in alike if one.kind == kind]
            parents = [branches.index((one.head, one.image)) for one in of_kind]
            found.append(read(model, of_kind, seen, parents))
    losses, weights = map(torch.cat, zip(*found, strict=True))
    return losses.sum() / weights.sum()


def read(model: VLM, said: Sequence[Conversation], seen: SharedPast,
         parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weighted losses (M,) and weights (M,) of conversations, each behind one of B images."""
    decoder, B = model.language_model.model, len(seen.hidden)
    # what all questions begin with is run once for each image; the token before the first one that
    # counts must stay in the rest, for its logits foretell it (commonprefix takes any sequences)
    answered = min(next(at for at, weight in enumerate(one.weights) if weight) for one in said)
    begun = os.path.commonprefix([one.tokens for one in said])[:answered - 1]
    x = decoder.embed_tokens(padded([begun], model.device))                   # (1, T, C)
    shared = SharedPast(decoder, x.expand(B, -1, -1), seen, range(B))
    # and then the rest of each
    tokens = padded([one.tokens[len(begun):] for one in said], model.device)            # (Q, T)
    weights = padded([one.weights[len(begun):] for one in said], model.device)
    rest = SharedPast(decoder, decoder.embed_tokens(tokens[:, :-1]), shared, parents)
    counts = weights[:, 1:] > 0                                               # (Q, T - 1)
    logits = model.language_model.logits(rest.hidden[counts])                 # (M, V)
    losses = F.cross_entropy(logits, tokens[:, 1:][counts], reduction="none")
    return losses * weights[:, 1:][counts], weights[:, 1:][counts]


def padded(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Rows of different lengths as one tensor, with zeros behind them."""
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)
