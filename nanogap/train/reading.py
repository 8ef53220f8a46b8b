"""How conversations are read in training: side by side, or what they share only once.

In:  conversations, and the visual tokens of their images.
Out: of the tokens of all answers, the logits (M, V), which tokens they should be (M,), and what
     they weigh (M,).
Letters: N visual tokens of an image, P tokens before them, Q conversations, T tokens, V vocabulary,
M tokens of all answers, B images or other sequences, G key-value heads, R rows, D head dim,
C channels.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nanogap.llama import LlamaModel
from nanogap.models import VLM
from nanogap.train.questions import Conversation

Read = tuple[Tensor, Tensor, Tensor]


def read_whole(model: VLM, said: Sequence[Conversation], visual: Sequence[Tensor]) -> Read:
    """Run each conversation as it would run alone, all side by side.

    visual: of each image, as the decoder is fed them (N, C')
    """
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


# ----- the same, faster on a CPU ------------------------------------------------------------------


class SharedPast:
    """A cache for training: rows of keys and values, which several sequences may continue.

    Gradients flow into them from all of these.
    """

    def __init__(self, past: "SharedPast | None" = None, parents: Tensor | None = None) -> None:
        """parents: (B,) which sequence of `past` each of these continues; None, None: nothing."""
        self.past, self.parents = past, parents
        self.rows: list[tuple[Tensor, Tensor]] = []   # (B, G, R, D) each, per layer
        self.length: int = past.length if past else 0                         # R

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, G, T, D) behind the rows of the past; return all rows (B, G, R, D)."""
        if self.past:
            old_k, old_v = self.past.rows[layer]
            k = torch.cat([old_k[self.parents], k], dim=2)                    # (B, G, R, D)
            v = torch.cat([old_v[self.parents], v], dim=2)
        self.rows.append((k, v))
        return k, v


def run(decoder: LlamaModel, x: Tensor, cache: SharedPast) -> Tensor:
    """Tokens (B, T, C) behind those that they continue -> hidden states (B, T, C).

    Nothing is pruned in training, so that the position ID of a token is its row.
    """
    before = cache.length
    cache.length += x.shape[1]
    rows = torch.arange(cache.length, device=x.device)                        # (R,)
    new = rows[before:]                                                       # (T,)
    mask = rows <= new[:, None]                                               # (T, R)
    return decoder(x, new, cache, mask)                               # type: ignore[arg-type]


def can_share(model: VLM, said: Sequence[Conversation]) -> bool:
    """Whether all that is said begins alike, up to the image.

    On a GPU a step costs by the number of operations, and whole conversations take fewest.
    """
    before = {tuple(one.tokens[:one.tokens.index(model.config.image_token)]) for one in said}
    return model.device.type == "cpu" and len(before) == 1


def read_sharing(model: VLM, said: Sequence[Conversation], visual: Sequence[Tensor]) -> Read:
    """What `read_whole` returns, in another order; what several sequences share is run once.

    Every conversation sees only the system sentence, its image and itself, at the position IDs that
    it would have alone.  So the sequences form a tree, and each level of it is run once:
    [system sentence] -> [image] -> ["Please provide ... describes:"] -> [expression, answer].
    """
    decoder, device = model.language_model.model, model.device
    P = said[0].tokens.index(model.config.image_token)
    below_system = SharedPast()
    system = torch.tensor([said[0].tokens[:P]], device=device)                # (1, P)
    run(decoder, decoder.embed_tokens(system), below_system)
    read = []
    for N in dict.fromkeys(map(len, visual)):                                 # images of one length
        images = [i for i, features in enumerate(visual) if len(features) == N]
        parents = torch.zeros(len(images), dtype=torch.long, device=device)
        below_images = SharedPast(below_system, parents)
        run(decoder, torch.stack([visual[i] for i in images]), below_images)  # (B, N, C')
        about = [replace(one, image=images.index(one.image)) for one in said if one.image in images]
        for kind in dict.fromkeys(one.kind for one in about):
            of_kind = [one for one in about if one.kind == kind]
            read.append(read_kind(model, of_kind, below_images, len(images), P))
    logits, targets, weights = map(torch.cat, zip(*read, strict=True))
    return logits, targets, weights


def read_kind(model: VLM, said: Sequence[Conversation], past: SharedPast, B: int, P: int) -> Read:
    """Conversations of one kind, behind their B images and the P tokens before these."""
    decoder, device = model.language_model.model, model.device
    # what all questions begin with is run once for each image; the token before the first one that
    # counts must stay in the rest, for its logits foretell it (commonprefix takes any sequences)
    texts = [one.tokens[P + 1:] for one in said]
    answered = min(next(at for at, weight in enumerate(one.weights) if weight) for one in said)
    shared = min(len(os.path.commonprefix(texts)), answered - P - 2)
    head = torch.tensor(texts[0][:shared], device=device)                     # (shared,)
    below_head = SharedPast(past, torch.arange(B, device=device))
    run(decoder, decoder.embed_tokens(head).expand(B, -1, -1), below_head)
    # and then the rest of each
    tokens = padded([text[shared:] for text in texts], device)                # (Q, T)
    weights = padded([one.weights[P + 1 + shared:] for one in said], device)
    about = torch.tensor([one.image for one in said], device=device)          # (Q,)
    hidden = run(decoder, decoder.embed_tokens(tokens[:, :-1]), SharedPast(below_head, about))
    return answers(model, hidden, tokens, weights)
