"""One question, from a picture and an expression to a box in pixels.

In:  a model, a picture, an expression, and how to prune.
Out: the words, the box, and every number that pruning touched on the way.

`ground` is the whole path in one function; each of its steps is one call into one file:

    encode     nanogap/models     the picture as N visual tokens
    select     prune.py           which of them stay
    lay out    gap.py             in which order, at which position IDs
    embed      nanogap/models     the prompt with these tokens in the place of its image
    prefill    in_decoder.py      one pass over all of it, into a cache
    decode     decode.py          the answer
    read       prompt.py          the box in it

Letters: P tokens before the image, N visual tokens, K of them kept, M added, A tokens after it;
T = P + K + M + A.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from nanogap import gap
from nanogap.checks.command import NanogapError
from nanogap.fast.decode import decode, decode_drafted
from nanogap.gap import Layout
from nanogap.image import Box
from nanogap.llama import Decoder, KVCache, LlamaForCausalLM
from nanogap.methods.in_decoder import Cut, Prefilled, cuts_of, prefill
from nanogap.prompt import DESCRIBE, BoxFormat, Form, draft
from nanogap.prune import Kept, View, budget_of, close_rows, find, in_decoder, needs_of, select

MAX_NEW_TOKENS = 64   # a box and the end token are 25, and a sentence may stand before it


@dataclass
class EncodedImage:
    """A picture as a model sees it, which any number of questions can share."""

    width: int
    height: int
    features: Tensor          # (N, C) before the projector, in the order of the prompt
    views: list[View]         # rectangles of patches, with what strategies asked to see
    at: Tensor                # (N, 4) which part of the picture each token shows, in pixels
    hidden: Any               # of the vision tower: more fields are made of it when needed
    row_end: Tensor | None = None   # (N,) which token closes the row of each, -1 where none does
    vision_ms: float = 0.0
    share: bool = False       # whether questions share the decoder's work on the image
    seen_by: Any = field(default=None, repr=False)   # the state of the weights that encoded it
    prefix: "Prefix | None" = field(default=None, repr=False)

    @property
    def n_visual(self) -> int:
        """N: visual tokens before pruning."""
        return len(self.at)

    @property
    def n_patches(self) -> int:
        """How many of them a strategy can choose from: not the ends of rows."""
        return sum(len(view.index) for view in self.views)

    @property
    def newlines(self) -> set[int]:
        """The tokens that close rows, and show nothing."""
        return set() if self.row_end is None else set(self.row_end.tolist()) - {-1}

    def patches(self, keep: Tensor) -> Tensor:
        """Where those of the tokens (K,) lie that show something, not the ends of rows: (n, 4)."""
        at = self.at[keep.cpu()]
        return at[at[:, 0] < at[:, 2]]

    def padding(self, keep: Tensor) -> float:
        """Which share of the patches among (K,) tokens shows no part of the picture, only padding.

        0 where there are none, as where SparseVLM keeps only what it added at an earlier cut
        """
        x1, y1, x2, y2 = self.patches(keep).T
        if len(x1) == 0:
            return 0.0
        outside = (x2 <= 0) | (y2 <= 0) | (x1 >= self.width) | (y1 >= self.height)
        return float(outside.float().mean())


@dataclass(frozen=True)
class Prefix:
    """A prompt that was read up to the end of its image."""

    x: Tensor                 # (1, P + K + M, C) what was fed
    position_ids: Tensor      # (P + K + M,)
    cache: KVCache


@dataclass(frozen=True)
class Result:
    """An answer, and every number on the way to it."""

    box: Box | None           # pixels of the original image; None where the text holds no box
    text: str                 # what the model said
    keep: Tensor              # (K,) indices of the visual tokens that it saw, in sequence order
    visual_tokens: float      # kept and added tokens; the mean over layers where these differ
    cuts: list[tuple[int, int]]   # (layer, visual tokens from there on), of pruning in the decoder
    position_ids: Tensor      # (T,) the prompt as RoPE saw it (after the last cut)
    next_position: int        # ID of the first generated token (after the last cut)
    tokens: list[int]         # what it generated, the end token included
    timings: dict             # vision_ms, prefill_ms, decode_ms, new_tokens, passes
    kv_bytes: int             # the cache in the end: keys and values of all rows in use
    padding: float            # share of the kept tokens that show no part of the picture
    cut_off: bool             # whether the answer was cut off at max_new_tokens, before its end


class Model(Protocol):
    """What a question asks of a model: nanogap/models/base.py says the rest."""

    language_model: LlamaForCausalLM
    tokenizer: Tokenizer
    box_format: BoxFormat
    decoder: Decoder | None

    @property
    def end_tokens(self) -> Collection[int]: ...

    def encode_image(self, image: Any, needs: Collection[str] = ()) -> EncodedImage: ...

    def see(self, image: EncodedImage, needs: Collection[str], expression: str) -> list[View]: ...

    def question(self, expression: str) -> str: ...

    def encode_question(self, question: str) -> Tensor: ...

    def around_image(self, input_ids: Tensor) -> tuple[int, int]: ...

    def check_length(self, positions: int) -> None: ...

    def embed(self, input_ids: Tensor, image: EncodedImage, kept: Kept,
              order: Tensor) -> Tensor: ...

    def to_pixels(self, box: Any, width: int, height: int) -> Box: ...

    def clock_ms(self) -> float: ...


def ground(model: Model, image: Image.Image | str | Path | EncodedImage, expression: str,
           prune: str = "cls_attention", keep: int | str | Tensor | None = "50%", mode: str = "gap",
           seed: int = 0, *, layer: int | None = None, max_new_tokens: int = MAX_NEW_TOKENS,
           drafts: bool = True, on_token: Callable[[int], None] | None = None,
           question: str | None = None) -> Result:
    """Find what an expression refers to.

    image:          a Pillow image, the path of one, or an EncodedImage, which questions can share
    prune:          name of a strategy, or FILE.py:NAME for one of your own
    keep:           its budget in visual tokens, 64 or "25%"; None where it finds one itself; or
                    indices (K,) of your own, the most important first.  Mode "full" keeps all
    mode:           one of gap.MODES
    seed:           of the strategies that draw lots
    layer:          of FastV: the decoder's layer before which it prunes; None: its published one
    max_new_tokens: the answer is cut off there
    drafts:         whether a pass may be fed several tokens (decode.py); the words are the same
    on_token:       called with each token ID as it comes
    question:       asked in place of the model's own question for a box
    raises:         NanogapError for a mistake in any of these
    """
    query = Query(expression, find(prune), keep, mode, seed, layer)
    check_whole("max_new_tokens", max_new_tokens, 1)
    image = model.encode_image(image, query.needs())
    with torch.inference_mode():                                              # no_grad, but faster
        start = model.clock_ms()
        input_ids = model.encode_question(question or model.question(expression))
        P, A = model.around_image(input_ids)
        model.check_length(P + image.n_visual + A + max_new_tokens)
        kept, cuts = choose(model, image, query)
        layout = gap.lay_out(kept.keep, P, image.n_visual, A, mode, kept.n_added)
        x = model.embed(input_ids, image, kept, layout.order)                 # (1, T, C)
        form = model.box_format.foretell(model.tokenizer) if drafts else ()
        prompt = read(model, image, x, layout, cuts, form, max_new_tokens)
        read_at = model.clock_ms()
        tokens = []
        for token in (decode_drafted(prompt, max_new_tokens, model.end_tokens, form) if drafts
                      else decode(prompt, max_new_tokens, model.end_tokens)):
            tokens.append(token)
            if on_token is not None:
                on_token(token)
        text = model.tokenizer.decode(tokens)
    timings = {"vision_ms": image.vision_ms, "prefill_ms": read_at - start,
               "decode_ms": model.clock_ms() - read_at, "new_tokens": len(tokens),
               "passes": prompt.passes}
    layout = prompt.layout
    return Result(
        box_in(text, model, image), text, layout.keep.clone(), prompt.visual_tokens(),
        [(stage.start, stage.layout.visual_tokens) for stage in prompt.stages[1:]],
        layout.position_ids.cpu().clone(), layout.next_position, tokens, timings,
        prompt.cache.bytes_in_use(), image.padding(layout.keep),              # no inference tensors
        cut_off=tokens[-1] not in model.end_tokens)


def describe(model: Model, image: Image.Image | str | Path | EncodedImage,
             prune: str = "cls_attention", keep: int | str | Tensor | None = "50%",
             mode: str = "gap", seed: int = 0, *, layer: int | None = None,
             max_new_tokens: int = MAX_NEW_TOKENS,
             drafts: bool = True, on_token: Callable[[int], None] | None = None) -> Result:
    """Say what is in a picture; the arguments are those of `ground`."""
    return ground(model, image, DESCRIBE, prune, keep, mode, seed, layer=layer,
                  max_new_tokens=max_new_tokens, drafts=drafts, on_token=on_token,
                  question=DESCRIBE)


# ----- its steps ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """An expression, and how to prune for it: the arguments of `ground`."""

    expression: str
    prune: str
    keep: int | str | Tensor | None
    mode: str
    seed: int
    layer: int | None

    def __post_init__(self) -> None:
        gap.check_mode(self.mode)
        check_whole("seed", self.seed, -1 << 63)
        if self.layer is not None:
            check_whole("layer", self.layer, -1 << 63)

    def needs(self) -> frozenset[str]:
        """What must be seen in the picture for that."""
        pruned = self.mode != "full" and not isinstance(self.keep, Tensor)
        return needs_of(self.prune) - {"attention"} if pruned else frozenset()


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse an argument that is no whole number of 64 bits."""
    if type(value) is not int or not least <= value < 1 << 63:
        given = value if type(value) is int and abs(value) < 1 << 80 else type(value).__name__
        raise NanogapError(f"{name} is {given} here: give a whole number"
                           + (f" from {least} on" if least >= 0 else ""))


def choices(image: EncodedImage, prune: str) -> int:
    """How many visual tokens a strategy has to choose among: in the decoder also the newlines."""
    return image.n_visual if in_decoder(prune) else image.n_patches


def choose(model: Model, image: EncodedImage, query: Query) -> tuple[Kept, list[Cut]]:
    """Which visual tokens the decoder is fed, and where it drops some of them itself."""
    everything = Kept(torch.arange(image.n_visual))
    if query.mode == "full":
        return everything, []
    if isinstance(query.keep, Tensor):
        if query.keep.numel() == 0:
            raise NanogapError("keep names no visual token: give at least one index")
        return Kept(query.keep.cpu()), []
    budget = budget_of(query.keep, choices(image, query.prune))
    if in_decoder(query.prune):
        layers = len(model.language_model.model.layers)
        return everything, cuts_of(query.prune, image.n_visual, budget, query.seed, layers,
                                   query.layer)
    views = model.see(image, query.needs(), query.expression)
    kept = select(query.prune, views, budget, query.seed)
    return kept if image.row_end is None else close_rows(kept, image.row_end), []


def read(model: Model, image: EncodedImage, x: Tensor, layout: Layout, cuts: list[Cut],
         form: Form, max_new_tokens: int) -> Prefilled:
    """Read the prompt: what was read before for the same image is not read again."""
    room = max_new_tokens + max(map(len, form), default=0)
    if cuts:
        return prefill(model.language_model, x, layout, cuts, room=room)
    drafted = draft(form, [], max_new_tokens - 1)
    prefix = shared_prefix(model, image, x, layout) if image.share else None
    prompt = prefill(model.language_model, x, layout, drafted=drafted, room=room, prefix=prefix)
    prompt.decoder = model.decoder
    return prompt


def shared_prefix(model: Model, image: EncodedImage, x: Tensor, layout: Layout) -> KVCache:
    """The cache of a prompt up to the end of its image: questions that feed the same share it.

    What is fed decides, and not what the strategy is called.  Only the last one is held, so ask all
    questions about an image under one pruning before the next.
    """
    end = len(layout.position_ids) - layout.A
    x, ids = x[:, :end], layout.position_ids[:end]
    held = image.prefix
    if held is None or not (torch.equal(held.x, x) and torch.equal(held.position_ids, ids)):
        before = prefill(model.language_model, x, replace(layout, position_ids=ids, A=0))
        held = image.prefix = Prefix(x, ids, before.cache)
    return held.cache


def box_in(text: str, model: Model, image: EncodedImage) -> Box | None:
    """The box that an answer holds, in pixels of the picture; None where it lies in the padding."""
    said = model.box_format.parse(text)
    box = said and model.to_pixels(said, image.width, image.height)
    return box if box and box[0] < box[2] and box[1] < box[3] else None
