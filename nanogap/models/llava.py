"""LLaVA: eyes, a projector, and a decoder; here an image and an expression become a box.

In:  a picture and a referring expression.  Out: the words of the model, the box in pixels, and every
number that pruning touched on the way.

Source: LLaVA-1.5, arXiv 2310.03744.  Pruning stands between the vision tower and the projector, but for
FastV's, which waits for the decoder (fastv.py).
Letters: P tokens before the image, N patches, K patches kept, A tokens after; T = P + K + A, and more
where a method adds tokens of its own.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap import gap
from nanogap import in_decoder as fastv
from nanogap.ground import MAX_NEW_TOKENS, Question, Result, answer
from nanogap.clip import CLIPVisionConfig, CLIPVisionTower, TextGuide
from nanogap.errors import NanogapError
from nanogap.decode import Decoder, decode
from nanogap.image import CLIP_MEAN, CLIP_STD, open_image, to_pixel_values, to_rgb
from nanogap.llama import KVCache, LlamaConfig, LlamaForCausalLM
from nanogap.prompt import DESCRIBE, encode_prompt, where_is
from nanogap.prune import Kept, Seen

CLIP_DOWNLOAD = ("`hf download openai/clip-vit-large-patch14-336 pytorch_model.bin config.json "
                 "tokenizer.json --local-dir weights/clip-vit-large-patch14-336` (1.7 GB)")


def clock(device: torch.device) -> float:
    """Seconds, after all that the device has been asked to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class LlavaConfig:
    text: LlamaConfig
    vision: CLIPVisionConfig
    image_token: int = 32000
    vision_feature_layer: int = -2
    projector_bias: bool = True
    bos_token: int = 1
    eos_token: int = 2
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    dtype: str = "float32"        # of the checkpoint on disk


class LlavaProjector(nn.Module):
    """From CLIP's channels to the decoder's, patch by patch; GELU is the exact one here."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        vision, text, bias = config.vision.hidden_size, config.text.hidden_size, config.projector_bias
        self.linear_1 = nn.Linear(vision, text, bias=bias)
        self.linear_2 = nn.Linear(text, text, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


@dataclass(frozen=True)
class Fed:
    """A prompt as the decoder is fed it: three numbers for each visual token, three fields."""

    embeddings: Tensor        # (1, T, C); the cache row of a token is its place in here
    position_ids: Tensor      # (T,) what RoPE sees
    next_position: int        # ID of the first token to be generated
    keep: Tensor              # (K,) raster indices of the patches, in sequence order


@dataclass(frozen=True)
class Look:
    """One look at an image, which any number of questions can share."""

    width: int
    height: int
    seen: Seen
    vision_ms: float
    prefixes: dict[str, tuple[Tensor, Tensor, KVCache]] | None = None   # shared: read up to the image's end


class Llava(nn.Module):
    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionTower(config.vision, config.vision_feature_layer)
        self.multi_modal_projector = LlavaProjector(config)
        self.language_model = LlamaForCausalLM(config.text)
        self.tokenizer: Tokenizer | None = None
        self.text_guide: TextGuide | None = None   # for strategies that read the expression
        self.fastv_layer = fastv.CUT               # for "fastv": the decoder's layer before which it prunes
        self.graphed: Decoder | None = None        # runs the passes in place of the language model: graph.py

    @property
    def device(self) -> torch.device:
        return self.multi_modal_projector.linear_1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.multi_modal_projector.linear_1.weight.dtype

    # ----- from what a person gives to tensors ------------------------------------------------------

    def prepare_image(self, image: Image.Image) -> Tensor:
        """A picture -> pixel_values (1, 3, S, S), padded to a square, on the model's device."""
        c = self.config
        pixels = to_pixel_values(to_rgb(image), c.vision.image_size, c.image_mean, c.image_std)
        return pixels.to(self.device, self.dtype)

    def prompt(self, expression: str) -> Tensor:
        """The question about an expression as input_ids (T,) with one image token, on the CPU."""
        return self.encode_question(where_is(expression))

    def encode_question(self, question: str) -> Tensor:
        c = self.config
        return torch.tensor(encode_prompt(self.tokenizer, question, c.bos_token, c.image_token))

    @torch.no_grad()
    def look(self, image: Image.Image | str | Path | Look, share: bool = False,
             for_pruning: bool = True) -> Look:
        """Run the vision tower on a picture, once for all the questions about it.

        share:       let the questions share the decoder's work on the image as well
        for_pruning: note what strategies look at; mode "full" does without
        """
        if isinstance(image, Look):
            return image
        image = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        start = self.clock()
        out = vars(self.vision_tower(self.prepare_image(image), for_pruning))
        seen = Seen(**{name: of_batch[0] for name, of_batch in out.items() if of_batch is not None},
                    projected=self.multi_modal_projector(out["features"][0]) if for_pruning else None)
        return Look(*image.size, seen, self.clock() - start, {} if share else None)

    def with_text(self, seen: Seen, expression: str) -> Seen:
        """Add what CLIP makes of the expression, in the space that it shares with the patches.

        open: which words the paper gave to these methods is not known; here it is the expression alone
        """
        if self.text_guide is None:
            raise NanogapError("to compare patches with words takes CLIP's text tower, which LLaVA's "
                               f"checkpoints do not hold; get it with {CLIP_DOWNLOAD} and give it by --clip")
        patches = self.vision_tower.post_layernorm(seen.features)             # (N, C)
        return replace(seen, aligned=self.text_guide.clip.visual_projection(patches),
                       text=self.text_guide.embed(expression))

    def clock(self) -> float:
        """Milliseconds, after all that its device has been asked to do is done."""
        return 1000 * clock(self.device)

    # ----- the sequence -----------------------------------------------------------------------------

    def around_image(self, input_ids: Tensor) -> tuple[int, int]:
        """P and A: how many tokens stand before and after the one image token."""
        places = (input_ids == self.config.image_token).nonzero().flatten().tolist()
        if len(places) != 1:
            raise ValueError(f"the prompt must hold one image token, not {len(places)}")
        return places[0], len(input_ids) - places[0] - 1

    def splice(self, input_ids: Tensor, visual: Tensor) -> Tensor:
        """Put visual tokens (K, C) in the place of the image token: embeddings (1, P + K + A, C)."""
        P, _ = self.around_image(input_ids)
        embed = self.language_model.model.embed_tokens
        input_ids = input_ids.to(self.device)
        return torch.cat([embed(input_ids[:P]), visual, embed(input_ids[P + 1:])])[None]

    def sequence(self, input_ids: Tensor, features: Tensor, kept: Kept, mode: str) -> Fed:
        """What the decoder is fed for one prompt: visual tokens in order, projected, with their IDs.

        features: (N, C) of the vision tower
        """
        P, A = self.around_image(input_ids)
        ids, next_position = gap.position_ids(kept.keep, P, len(features), A, mode, kept.n_added)
        arranged = kept.keep.argsort() if gap.MODES[mode][0] == "raster" else torch.arange(len(kept.keep))
        keep = kept.keep[arranged]
        features = features[keep] if kept.features is None else kept.features[arranged]  # (K, C)
        if kept.added is not None:
            features = torch.cat([features, kept.added])                      # (K + M, C)
        visual = self.multi_modal_projector(features)
        return Fed(self.splice(input_ids, visual), ids.to(self.device), next_position, keep)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, keep: Tensor | None = None,
                mode: str = "gap") -> Tensor:
        """Logits (P + K + A, V) in float32 of a prompt (T,) with one image token; keep=None keeps all."""
        features = self.vision_tower(pixel_values.to(self.device, self.dtype)).features[0]
        keep = torch.arange(len(features)) if keep is None else keep.cpu()
        fed = self.sequence(input_ids, features, Kept(keep), mode)
        return self.language_model(fed.embeddings, fed.position_ids)[0]

    # ----- generation -------------------------------------------------------------------------------

    def prefill(self, embeddings: Tensor, position_ids: Tensor, room: int, last: int = 1,
                prefix: KVCache | None = None, siblings: int = 1) -> tuple[Tensor, KVCache]:
        """Read the prompt (1, T, C): logits (last, V) of its last tokens, and the cache.

        room:     rows of the cache that stay free; prefix: the first rows, where they were read before
        siblings: so many of the last tokens are alternatives to one another
        """
        cache = KVCache(self.config.text, embeddings.shape[1] + room, embeddings)
        cache.siblings = siblings
        start = cache.copy(prefix) if prefix else 0
        logits = self.language_model(embeddings[:, start:], position_ids[start:], cache, last)
        return logits[0], cache

    def generate(self, embeddings: Tensor, position_ids: Tensor, next_position: int,
                 max_new_tokens: int = MAX_NEW_TOKENS) -> list[int]:
        """Answer any sequence of embeddings (1, T, C) at any position IDs (T,), greedily."""
        logits, cache = self.prefill(embeddings, position_ids, max_new_tokens)
        steps = decode(self.language_model, logits, cache, next_position, max_new_tokens,
                       self.config.eos_token)
        return [token for tokens in steps for token in tokens]

    def ground(self, image: Image.Image | str | Path | Look, expression: str,
               prune: str = "cls_attention", keep: int | None = None, mode: str = "gap",
               seed: int = 0, **options: Any) -> Result:
        """Find what an expression refers to.

        image:   a Pillow image, the path of one, or a Look, where several questions share one image
        prune:   name of a strategy, keep: its budget in visual tokens; neither counts in mode "full"
        mode:    "full", "shifted", "permuted" or "gap" (see gap.py)
        seed:    of the strategies that draw lots
        options: max_new_tokens, drafts and on_token, as in answer.py
        raises:  NanogapError for a mistake in any of these
        """
        question = Question(where_is(expression), expression, prune, keep, mode, seed)
        return answer(self, self.look(image, for_pruning=mode != "full"), question, **options)

    def describe(self, image: Image.Image | str | Path | Look, prune: str = "cls_attention",
                 keep: int | None = None, mode: str = "gap", seed: int = 0, **options: Any) -> Result:
        """Say what is in a picture; the arguments are those of `ground`."""
        question = Question(DESCRIBE, DESCRIBE, prune, keep, mode, seed)
        look = self.look(image, for_pruning=mode != "full")
        return answer(self, look, question, **{"max_new_tokens": 2 * MAX_NEW_TOKENS} | options)

    def check_length(self, positions: int) -> None:
        """Refuse a question whose position IDs leave the range that the model was made for."""
        if positions > self.config.text.max_position_embeddings:
            raise NanogapError("the expression is too long: with the image the model would need "
                               f"{positions} positions and has {self.config.text.max_position_embeddings}; "
                               "shorten it")
