"""What is minimised: CLIP's loss, with CLIP as a whole, and LLaVA's on the answers.

What several conversations share is run once.  Nothing here knows of pruning: in training no token
is dropped and no position ID changed.
Source: arXiv 2103.00020 (CLIP), 2304.08485 (LLaVA, whose data have several turns).
Letters: B images or other sequences, C captions or channels, E channels of CLIP's space, N visual
tokens of an image, P tokens before them, Q conversations, T tokens, V vocabulary, M tokens of all
answers, G key-value heads, R rows, D head dim.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap.clip import CLIPTextConfig, CLIPTextTower, CLIPVisionConfig, CLIPVisionTower
from nanogap.llama import LlamaModel
from nanogap.models import VLM
from nanogap.models.base import write_json
from nanogap.models.saving import save_tensors
from nanogap.prune import Kept
from nanogap.train.recipes import SINGLES, Batch, Conversation
from nanogap.train.scenes import contents


class CLIP(nn.Module):
    tokenizer: Tokenizer

    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig, projection_dim: int,
                 tower: Callable[[Any], Any] = CLIPVisionTower) -> None:
        super().__init__()
        self.vision_model = tower(vision)
        self.vision_model.depth = vision.num_hidden_layers     # LLaVA takes the last layer but one
        self.text_model = CLIPTextTower(text)
        self.visual_projection = nn.Linear(vision.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> unit vectors (B, E), of CLS after all layers and a LayerNorm."""
        _, x = self.vision_model(pixel_values)                                # (B, 1 + N, C)
        cls = x[:, 0]                                                         # (B, C)
        own = getattr(self.vision_model, "post_layernorm", None)              # EVA has none
        seen = own(cls) if own else F.layer_norm(cls, cls.shape[-1:])
        return F.normalize(self.visual_projection(seen), dim=-1)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """Texts (M, T) -> unit vectors (M, E)."""
        return F.normalize(self.text_projection(self.text_model(input_ids)), dim=-1)


def clip_loss(clip: CLIP, batch: Batch) -> Tensor:
    """The symmetric contrastive loss; of C captions, those true of an image have equal shares."""
    pixels, scenes, captions = batch
    device = clip.logit_scale.device
    held = [contents(scene.things) for scene in scenes]
    claims = held + [contents([thing]) for thing in SINGLES]
    truth = torch.tensor([[float(claim <= have) for claim in claims] for have in held],
                         device=device)                                       # (B, C)
    ids = [[encoded.ids for encoded in clip.tokenizer.encode_batch(said)]     # padded to the
           for said in captions]                                              # longest of each list
    texts = torch.cat([clip.text_features(torch.tensor(rows, device=device)) for rows in ids])
    first_views = torch.cat([views[:1] for views in pixels])                  # (B, 3, S, S)
    images = clip.image_features(first_views.to(device))                      # (B, E)
    logits = clip.logit_scale.exp() * images @ texts.T                        # (B, C)
    by_image = F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
    true = truth.sum(0) > 0                                                   # (C,) of any image
    by_text = F.cross_entropy(logits.T[true], (truth / truth.sum(0)).T[true])
    return (by_image + by_text) / 2


def save_clip(folder: Path, clip: CLIP, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write both towers in the layout of openai/clip-vit-large-patch14-336."""
    folder.mkdir(parents=True, exist_ok=True)
    start, end = map(clip.tokenizer.token_to_id, ("<|startoftext|>", "<|endoftext|>"))
    width = clip.visual_projection.out_features
    shared = {"projection_dim": width, "hidden_act": "quick_gelu"}
    config = {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "text_config": asdict(clip.text_model.config) | shared | {
            "bos_token_id": start, "eos_token_id": end, "pad_token_id": end,
            "model_type": "clip_text_model"},
        "vision_config": asdict(clip.vision_model.config) | shared | {
            "model_type": "clip_vision_model"}}
    write_json(folder / "config.json", config)
    clip.tokenizer.save(str(folder / "tokenizer.json"))
    save_tensors(folder / "model.safetensors", clip, dtype)


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
