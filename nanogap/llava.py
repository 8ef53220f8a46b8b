"""LLaVA: eyes, a projector, and a decoder; here an image and an expression become a box.

In:  a picture and a referring expression.  Out: the words of the model, the box in pixels, and every
number that pruning touched on the way.

Source: LLaVA-1.5, arXiv 2310.03744.  Pruning stands between the vision tower and the projector.
Letters: P tokens before the image, N patches, K patches kept, A tokens after; T = P + K + A.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap import gap, prune as pruning
from nanogap.clip import CLIPVisionConfig, CLIPVisionTower
from nanogap.errors import NanogapError
from nanogap.image import CLIP_MEAN, CLIP_STD, Box, box_to_pixels, open_image, to_pixel_values, to_rgb
from nanogap.llama import KVCache, LlamaConfig, LlamaForCausalLM
from nanogap.prompt import encode_prompt, parse_box, where_is
from nanogap.prune import Seen

MAX_NEW_TOKENS = 32   # "[0.12, 0.34, 0.56, 0.78]" and the end token are 25


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
class Sequence:
    """A prompt as the decoder is fed it: three numbers for each visual token, three fields."""

    embeddings: Tensor        # (1, T, C); the cache row of a token is its place in here
    position_ids: Tensor      # (T,) what RoPE sees
    next_position: int        # ID of the first token to be generated
    keep: Tensor              # (K,) raster indices of the visual tokens, in sequence order


@dataclass(frozen=True)
class Look:
    """One look at an image, which any number of questions can share."""

    width: int
    height: int
    seen: Seen
    vision_ms: float


@dataclass(frozen=True)
class Result:
    """An answer, and every number on the way to it."""

    box: Box | None           # pixels of the original image; None where the text holds no box
    text: str                 # what the model said
    keep: Tensor              # (K,) raster indices of the patches it saw, in sequence order
    position_ids: Tensor      # (T,) the prompt as RoPE saw it
    next_position: int        # ID of the first generated token
    tokens: list[int]         # what it generated, the end token included
    timings: dict             # vision_ms, prefill_ms, decode_ms, new_tokens, passes
    kv_bytes: int             # the cache in the end: keys and values of all rows in use


class Llava(nn.Module):
    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionTower(config.vision, config.vision_feature_layer)
        self.multi_modal_projector = LlavaProjector(config)
        self.language_model = LlamaForCausalLM(config.text)
        self.tokenizer: Tokenizer | None = None

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
        c = self.config
        return torch.tensor(encode_prompt(self.tokenizer, where_is(expression), c.bos_token, c.image_token))

    @torch.no_grad()
    def look(self, image: Image.Image | str | Path | Look) -> Look:
        """Run the vision tower on a picture, once for all the questions about it."""
        if isinstance(image, Look):
            return image
        image = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        start = self.clock()
        out = self.vision_tower(self.prepare_image(image), for_pruning=True)
        seen = Seen(out.features[0], out.cls[0], out.cls_attention[0])
        return Look(*image.size, seen, self.clock() - start)

    def clock(self) -> float:
        """Milliseconds, after all that the device has been asked to do is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1000

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

    def sequence(self, input_ids: Tensor, features: Tensor, keep: Tensor, mode: str) -> Sequence:
        """What the decoder is fed for one prompt: kept patches in order, projected, with their IDs.

        features: (N, C) of the vision tower; keep: (K,) raster indices, the most important first
        """
        P, A = self.around_image(input_ids)
        ids, next_position = gap.position_ids(keep, P, len(features), A, mode)
        keep = gap.arrange(keep, gap.MODES[mode][0])
        visual = self.multi_modal_projector(features[keep.to(features.device)])  # (K, C)
        return Sequence(self.splice(input_ids, visual), ids.to(self.device), next_position, keep)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, keep: Tensor | None = None,
                mode: str = "gap") -> Tensor:
        """Logits (P + K + A, V) in float32 of a prompt (T,) with one image token; keep=None keeps all."""
        features = self.vision_tower(pixel_values.to(self.device, self.dtype)).features[0]
        keep = torch.arange(len(features)) if keep is None else keep.cpu()
        fed = self.sequence(input_ids, features, keep, mode)
        return self.language_model(fed.embeddings, fed.position_ids)[0]

    # ----- generation -------------------------------------------------------------------------------

    def prefill(self, embeddings: Tensor, position_ids: Tensor, room: int) -> tuple[Tensor, KVCache]:
        """Read the prompt (1, T, C): logits (V,) of its last token, and the cache with `room` free rows."""
        cache = KVCache(self.config.text, embeddings.shape[1] + room, embeddings)
        logits = self.language_model(embeddings, position_ids, cache, last_only=True)
        return logits[0, -1], cache

    def decode(self, logits: Tensor, cache: KVCache, next_position: int,
               max_new_tokens: int) -> Iterator[int]:
        """Yield token IDs greedily, up to and including the end token; one pass of the decoder each.

        The position ID counts on from `next_position` and the cache row from the rows in use: under GAP
        the two are far apart.
        """
        for position in range(next_position, next_position + max_new_tokens):
            token = logits.argmax()
            yield int(token)
            if token == self.config.eos_token or position == next_position + max_new_tokens - 1:
                return
            embedding = self.language_model.model.embed_tokens(token.view(1, 1))  # (1, 1, C)
            ids = torch.tensor([position], device=self.device)
            logits = self.language_model(embedding, ids, cache)[0, -1]        # (V,)

    @torch.no_grad()
    def ground(self, image: Image.Image | str | Path | Look, expression: str, prune: str = "cls_attention",
               keep: int | None = None, mode: str = "gap", seed: int = 0,
               max_new_tokens: int = MAX_NEW_TOKENS, on_token: Callable[[int], None] | None = None) -> Result:
        """Find what an expression refers to.

        image:    a Pillow image, the path of one, or a Look, where several questions share one image
        prune:    name of a strategy, keep: its budget in visual tokens; neither counts in mode "full"
        mode:     "full", "shifted", "permuted" or "gap" (see gap.py)
        on_token: called with each token ID as it comes
        raises:   NanogapError for a mistake in any of these
        """
        if mode not in gap.MODES:
            raise NanogapError(f"unknown mode {mode!r}: choose from {', '.join(gap.MODES)}")
        input_ids, look = self.prompt(expression), self.look(image)
        self.check_length(len(input_ids) - 1 + len(look.seen.features) + max_new_tokens)
        start = self.clock()
        everything = torch.arange(len(look.seen.features))
        chosen = everything if mode == "full" else pruning.select(prune, look.seen, keep, seed)
        fed = self.sequence(input_ids, look.seen.features, chosen, mode)
        logits, cache = self.prefill(fed.embeddings, fed.position_ids, max_new_tokens)
        prefilled = self.clock()
        tokens = []
        for token in self.decode(logits, cache, fed.next_position, max_new_tokens):
            tokens.append(token)
            if on_token:
                on_token(token)
        text = self.tokenizer.decode(tokens)
        timings = {"vision_ms": look.vision_ms, "prefill_ms": prefilled - start,
                   "decode_ms": self.clock() - prefilled, "new_tokens": len(tokens),
                   "passes": len(tokens) - 1}
        return Result(in_pixels(parse_box(text), look.width, look.height), text, fed.keep,
                      fed.position_ids.cpu(), fed.next_position, tokens, timings, cache.bytes_in_use())

    def check_length(self, positions: int) -> None:
        """Refuse a question whose position IDs leave the range that the model was made for."""
        if positions > self.config.text.max_position_embeddings:
            raise NanogapError("the expression is too long: with the image the model would need "
                               f"{positions} positions and has {self.config.text.max_position_embeddings}; "
                               "shorten it")


def in_pixels(box: Box | None, width: int, height: int) -> Box | None:
    """A parsed box in pixels of the image, or None where there is none or it lies in the padding."""
    box = box and box_to_pixels(box, width, height)
    return box if box and box[0] < box[2] and box[1] < box[3] else None
