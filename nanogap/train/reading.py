"""LLaVA's loss, and how conversations are read for it: side by side, or what they share only once.

In:  a batch of drawn scenes and conversations about them.  Out: a loss to minimise.

It learns the next token of the answers, of several turns as in its own data (arXiv 2304.08485).
Nothing here knows of pruning: in training no token is dropped and no position ID changed.
Letters: N visual tokens of an image, P tokens before them, Q conversations, T tokens, V vocabulary,
M tokens of all answers, B images or other sequences, G key-value heads, R rows, D head dim,
C channels.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogap.llama import LlamaModel
from nanogap.models import VLM
from nanogap.prune import Kept
from nanogap.train.questions import Batch, Conversation

# of the tokens of all answers the logits (M, V), which tokens they should be (M,), their weights
Read = tuple[Tensor, Tensor, Tensor]


def llava_loss(model: VLM, batch: Batch, device: torch.device) -> Tensor:
    """Next-token cross-entropy on the answers, the weighted mean over all their tokens."""
    pixels, scenes, said = batch
    with torch.no_grad():                                                     # the tower is frozen
        seen = [model.encode_pixels(views.to(device), *scene.image.size)
                for views, scene in zip(pixels, scenes, strict=True)]
    every = [torch.arange(image.n_visual) for image in seen]
    visual = [model.visual_tokens(image, Kept(index), index)                  # (N, C') each
              for image, index in zip(seen, every, strict=True)]
    # Shikra's questions do not begin alike; and on a GPU a step costs by the number of operations,
    # of which whole conversations take fewest
    heads = {tuple(one.tokens[:one.tokens.index(model.config.image_token)]) for one in said}
    read = read_sharing if len(heads) == 1 and device.type == "cpu" else read_whole
    logits, targets, weights = read(model, said, visual)
    losses = F.cross_entropy(logits, targets, reduction="none")               # (M,)
    return (losses * weights).sum() / weights.sum()


def read_whole(model: VLM, said: Sequence[Conversation], visual: Sequence[Tensor]) -> Read:
    """Run each conversation as it would run alone, all side by side."""
    image_token, decoder = model.config.image_token, model.language_model.model
    rows, row_weights = [], []
    for one in said:
        at, N = one.tokens.index(image_token), len(visual[one.image])
        rows.append(one.tokens[:at] + N * [image_token] + one.tokens[at + 1:])
        row_weights.append(one.weights[:at] + N * [0.0] + one.weights[at + 1:])
    tokens, weights = padded(rows, model.device), padded(row_weights, model.device)   # (Q, T)
    fed = tokens[:, :-1]
    in_image = (fed == image_token)[..., None]                                # (Q, T - 1, 1)
    x = decoder.embed_tokens(fed).masked_scatter(
        in_image, torch.cat([visual[one.image] for one in said]))             # (Q, T - 1, C')
    hidden = decoder(x, torch.arange(fed.shape[1], device=model.device))
    return answers(model, hidden, tokens, weights)


def padded(rows: Sequence[list], device: torch.device) -> Tensor:
    """Rows of different lengths as one tensor, with zeros behind them."""
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)


def answers(model: VLM, hidden: Tensor, tokens: Tensor, weights: Tensor) -> Read:
    """What counts in the loss: hidden (Q, T - 1, C), tokens and weights (Q, T)."""
    wanted = weights[:, 1:] > 0
    return (model.language_model.logits(hidden[wanted]), tokens[:, 1:][wanted],
            weights[:, 1:][wanted])


# ----- the same, three to five times faster on a CPU ----------------------------------------------


class SharedPast:
    """A cache for training: rows of keys and values, which several sequences may continue.

    Gradients flow into them from all of these.
    """

    def __init__(self, past: "SharedPast | None" = None, parents: Tensor | None = None) -> None:
        """parents: (B,) which sequence of `past` each of these continues; None, None: nothing."""
        self.past, self.parents = past, parents
        self.rows: list[tuple[Tensor, Tensor]] = []   # (B, G, R, D) each, per layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, G, T, D) behind the rows of the past; return all rows (B, G, R, D)."""
        if self.past:
            old_k, old_v = self.past.rows[layer]
            k = torch.cat([old_k[self.parents], k], dim=2)                    # (B, G, R, D)
            v = torch.cat([old_v[self.parents], v], dim=2)
        self.rows.append((k, v))
        return k, v

    def run(self, decoder: LlamaModel, x: Tensor) -> Tensor:
        """Tokens (B, T, C) behind those of the past -> hidden states (B, T, C)."""
        before = self.past.rows[0][0].shape[2] if self.past else 0
        rows = torch.arange(before + x.shape[1])                              # (R,)
        new = rows[before:]                                                   # (T,) and their IDs
        return decoder(x, new, self, rows <= new[:, None])            # type: ignore[arg-type]


def read_sharing(model: VLM, said: Sequence[Conversation], visual: Sequence[Tensor]) -> Read:
    """What `read_whole` returns, in another order; what several sequences share is run once.

    Every conversation sees only the system sentence, its image and itself, at the position IDs that
    it would have alone.  So the sequences form a tree, and each level of it is run once:
    [system sentence] -> [image] -> ["Please provide ... describes:"] -> [expression, answer].
    """
    decoder = model.language_model.model
    P = said[0].tokens.index(model.config.image_token)
    system = SharedPast()
    system.run(decoder, decoder.embed_tokens(torch.tensor([said[0].tokens[:P]])))
    read = []
    for N in dict.fromkeys(map(len, visual)):                                 # images of one length
        images = [i for i, features in enumerate(visual) if len(features) == N]
        seen = SharedPast(system, torch.zeros(len(images), dtype=torch.long))
        seen.run(decoder, torch.stack([visual[i] for i in images]))           # (B, N, C')
        about = [replace(one, image=images.index(one.image)) for one in said if one.image in images]
        for kind in dict.fromkeys(one.kind for one in about):
            of_kind = [one for one in about if one.kind == kind]
            read.append(read_kind(model, of_kind, seen, len(images), P))
    logits, targets, weights = map(torch.cat, zip(*read, strict=True))
    return logits, targets, weights


def read_kind(model: VLM, said: Sequence[Conversation], seen: SharedPast, B: int, P: int) -> Read:
    """Conversations of one kind, behind their B images and the P tokens before these."""
    decoder = model.language_model.model
    # what all questions begin with is run once for each image; the token before the first one that
    # counts must stay in the rest, for its logits foretell it (commonprefix takes any sequences)
    texts = [one.tokens[P + 1:] for one in said]
    answered = min(next(at for at, weight in enumerate(one.weights) if weight) for one in said)
    shared = min(len(os.path.commonprefix(texts)), answered - P - 2)
    head = SharedPast(seen, torch.arange(B))
    head.run(decoder, decoder.embed_tokens(torch.tensor(texts[0][:shared])).expand(B, -1, -1))
    # and then the rest of each
    tokens = padded([text[shared:] for text in texts], model.device)          # (Q, T)
    weights = padded([one.weights[P + 1 + shared:] for one in said], model.device)
    rest = SharedPast(head, torch.tensor([one.image for one in said]))
    hidden = rest.run(decoder, decoder.embed_tokens(tokens[:, :-1]))
    return answers(model, hidden, tokens, weights)
