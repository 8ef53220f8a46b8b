"""LLaVA's loss, and how conversations are read for it: what several of them share only once.

In:  a batch of drawn scenes and conversations about them.  Out: a loss to minimise.

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

# of the tokens of all answers the logits (M, V), which tokens they should be (M,), their weights
Read = tuple[Tensor, Tensor, Tensor]


def llava_loss(model: VLM, batch: Batch) -> Tensor:
    """Next-token cross-entropy on the answers, the weighted mean over all their tokens."""
    pixels, scenes, said = batch
    visual = []
    for views, scene in zip(pixels, scenes, strict=True):
        with torch.no_grad():                                                 # the tower is frozen
            seen = model.encode_pixels(views.to(model.device), *scene.image.size)
        every = torch.arange(seen.n_visual)
        visual.append(model.visual_tokens(seen, Kept(every), every))          # (N, C')
    logits, targets, weights = read(model, said, visual)
    losses = F.cross_entropy(logits, targets, reduction="none")               # (M,)
    return (losses * weights).sum() / weights.sum()


class SharedPast:
    """Sequences that are run behind others, of which each may be continued by several.

    This is the cache of one run, without position IDs.  Gradients flow from it into the past.
    """

    def __init__(self, decoder: LlamaModel, x: Tensor, past: "SharedPast | None" = None,
                 parents: Sequence[int] = ()) -> None:
        """Run tokens x (B, T, C); parents: (B,) which sequence of the past each of them continues.

        `hidden` is what the decoder makes of them (B, T, C).
        """
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


def read(model: VLM, said: Sequence[Conversation], visual: Sequence[Tensor]) -> Read:
    """Read each conversation as if it were alone, but run only once what several of them share.

    Each sees only its image and itself, at the position IDs that it would have alone.  So the
    sequences form a tree, and each level of it is run once:
    [system sentence] -> [image] -> ["Please provide ... describes:"] -> [expression, answer].
    Shikra's expression stands before the image, where its tree has many branches.
    visual: what the decoder is fed of each image, (N, C)
    """
    decoder = model.language_model.model
    parts = []
    lengths = product(dict.fromkeys(map(len, visual)), sorted({len(one.head) for one in said}))
    for N, P in lengths:                                   # sequences of one length run together
        alike = [one for one in said if (len(visual[one.image]), len(one.head)) == (N, P)]
        if not alike:
            continue
        heads = sorted({one.head for one in alike})
        head = SharedPast(decoder, decoder.embed_tokens(padded(heads, model.device)))
        branches = sorted({(one.head, one.image) for one in alike})           # B of them
        seen = SharedPast(decoder, torch.stack([visual[image] for _, image in branches]), head,
                          [heads.index(before) for before, _ in branches])
        for kind in dict.fromkeys(one.kind for one in alike):
            of_kind = [one for one in alike if one.kind == kind]
            parents = [branches.index((one.head, one.image)) for one in of_kind]
            parts.append(read_kind(model, of_kind, seen, parents))
    logits, targets, weights = map(torch.cat, zip(*parts, strict=True))
    return logits, targets, weights


def read_kind(model: VLM, said: Sequence[Conversation], seen: SharedPast,
              parents: Sequence[int]) -> Read:
    """Conversations of one kind, each behind one of the B images that were seen."""
    decoder, B = model.language_model.model, len(seen.hidden)
    # what all questions begin with is run once for each image; the token before the first one that
    # counts must stay in the rest, for its logits foretell it (commonprefix takes any sequences)
    answered = min(next(at for at, weight in enumerate(one.weights) if weight) for one in said)
    begun = os.path.commonprefix([one.tokens for one in said])[:answered - 1]
    shared = SharedPast(decoder, decoder.embed_tokens(padded([begun], model.device))
                        .expand(B, -1, -1), seen, range(B))
    # and then the rest of each
    tokens = padded([one.tokens[len(begun):] for one in said], model.device)            # (Q, T)
    weights = padded([one.weights[len(begun):] for one in said], model.device)
    rest = SharedPast(decoder, decoder.embed_tokens(tokens[:, :-1]), shared, parents)
    counts = weights[:, 1:] > 0                                               # (Q, T - 1)
    return (model.language_model.logits(rest.hidden[counts]), tokens[:, 1:][counts],
            weights[:, 1:][counts])


def padded(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Rows of different lengths as one tensor, with zeros behind them."""
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)
