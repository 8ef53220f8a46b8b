"""The losses of CLIP and of LLaVA.

In:  a batch of drawn scenes.  Out: a loss to minimise.

CLIP (arXiv 2103.00020) learns which captions are true of which scene, LLaVA (arXiv 2304.08485) the
next token of the answers, of several turns as in its own data.  Nothing here knows of pruning: in
training no token is dropped and no position ID changed.
Letters: B images, C captions, E channels of CLIP's space, N visual tokens of an image, M tokens of
all answers.
"""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from nanogap.models import VLM
from nanogap.prune import Kept
from nanogap.train import reading
from nanogap.train.batches import SINGLES, Batch
from nanogap.train.clip import CLIP
from nanogap.train.scenes import contents


def clip_loss(clip: CLIP, tokenizer: Tokenizer, batch: Batch, device: torch.device) -> Tensor:
    """CLIP's symmetric contrastive loss between B images and C captions that may be true of them.

    There is a caption for each image, which names everything in it, and one for each thing that
    there can be ("a red car").  Several are true of an image, so the targets are equal shares.
    """
    pixels, scenes, (wholes, singles) = batch
    held = [contents(scene.things) for scene in scenes]
    claims = held + [contents([thing]) for thing in SINGLES]
    truth = torch.tensor([[float(claim <= have) for claim in claims] for have in held])
    truth = truth.to(device)                                                  # (B, C)
    # each list is padded to its own longest
    ids = [[encoded.ids for encoded in tokenizer.encode_batch(said)] for said in (wholes, singles)]
    texts = torch.cat([clip.text_features(torch.tensor(rows, device=device)) for rows in ids])
    first_views = torch.cat([views[:1] for views in pixels])                  # (B, 3, S, S)
    images = clip.image_features(first_views.to(device))                      # (B, E)
    logits = clip.logit_scale.exp() * images @ texts.T                        # (B, C)
    by_image = F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
    true = truth.sum(0) > 0                                                   # (C,) of any image
    by_text = F.cross_entropy(logits.T[true], (truth / truth.sum(0)).T[true])
    return (by_image + by_text) / 2


def llava_loss(model: VLM, batch: Batch, device: torch.device) -> Tensor:
    """Next-token cross-entropy on the answers, the weighted mean over all their tokens."""
    pixels, scenes, said = batch
    with torch.no_grad():                                                     # the tower is frozen
        seen = [model.encode_pixels(views.to(device), *scene.image.size)
                for views, scene in zip(pixels, scenes, strict=True)]
    every = [torch.arange(image.n_visual) for image in seen]
    visual = [model.visual_tokens(image, Kept(index), index)                  # (N, C') each
              for image, index in zip(seen, every, strict=True)]
    share = reading.can_share(model, said)
    read = reading.read_sharing if share else reading.read_whole
    logits, targets, weights = read(model, said, visual)
    losses = F.cross_entropy(logits, targets, reduction="none")               # (M,)
    return (losses * weights).sum() / weights.sum()
