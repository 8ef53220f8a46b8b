"""One question, from the choice of visual tokens to an answer in pixels.

In:  a model, a look at an image, and a question with the pruning that it is to be asked under.
Out: the words, the box, and every number that pruning touched on the way.

    answer                      one Question under one pruning                        -> Result
        read                    choose what to keep, and read the prompt              -> Read
            model.sequence      the tokens that the decoder is fed, with their IDs    -> Fed
            model.prefill       one pass over all of them, into a cache
            read_and_cut        instead of these two, where the decoder itself drops tokens
        decode                  the answer, pass by pass (generate.py)

Letters: P tokens before the image, N patches, K patches kept, A tokens after it; T of the prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanogap import gap, prune
from nanogap import in_decoder as fastv
from nanogap.errors import NanogapError
from nanogap.decode import Decoder, Draft, decode, draft, template
from nanogap.image import Box, box_to_pixels
from nanogap.llama import KVCache
from nanogap.prompt import parse_box
from nanogap.prune import Kept, Seen

if TYPE_CHECKING:
    from nanogap.models.llava import Fed, Llava, Look

MAX_NEW_TOKENS = 32   # "[0.12, 0.34, 0.56, 0.78]" and the end token are 25


@dataclass(frozen=True)
class Question:
    """What is asked, and under which pruning."""

    text: str                 # the whole question
    words: str                # those that a strategy may read
    prune: str
    keep: int | None
    mode: str
    seed: int

    def reads_text(self) -> bool:
        return self.mode != "full" and self.prune in prune.READ_TEXT


@dataclass(frozen=True)
class Result:
    """An answer, and every number on the way to it."""

    box: Box | None           # pixels of the original image; None where the text holds no box
    text: str                 # what the model said
    keep: Tensor              # (K,) raster indices of the patches it saw, in sequence order
    visual_tokens: float      # patches and added tokens; the mean over layers where these differ
    position_ids: Tensor      # (T,) the prompt as RoPE saw it (FastV: after its cut)
    next_position: int        # ID of the first generated token (FastV: after its cut)
    tokens: list[int]         # what it generated, the end token included
    timings: dict             # vision_ms, prefill_ms, decode_ms, new_tokens, passes
    kv_bytes: int             # the cache in the end: keys and values of all rows in use


@dataclass
class Read:
    """A prompt that was read: what an answer goes on from."""

    logits: Tensor            # (1 + D, V) after the prompt, and after each of D tokens drafted behind it
    drafted: Draft            # these tokens
    cache: KVCache
    fed: "Fed"
    visual_tokens: float
    decoder: Decoder          # runs a pass over new tokens
    starts_at: int            # ID of the first of them, in the decoder's first layer


def read(model: "Llava", look: "Look", question: Question, drafted: Draft, room: int) -> Read:
    """Choose the visual tokens, and read the prompt with them and with drafted tokens behind it."""
    input_ids, seen = model.encode_question(question.text), look.seen
    N, (P, A) = len(seen.features), model.around_image(input_ids)
    model.check_length(P + N + A + room)
    if question.mode == "full":
        kept = Kept(torch.arange(N))
    elif seen.keys is None:
        raise ValueError("this look noted nothing for pruning: take it with for_pruning=True")
    elif question.prune in prune.IN_DECODER:
        # a draft behind the prompt leaves its rows to the next ones; here there is none
        return read_and_cut(model, seen, input_ids, question, room + len(drafted.choice))
    else:
        seen = model.with_text(seen, question.words) if question.reads_text() else seen
        kept = prune.select(question.prune, seen, question.keep, question.seed)
    fed = model.sequence(input_ids, seen.features, kept, question.mode)
    tokens, places = torch.tensor([drafted.tokens, drafted.places(0)], device=model.device).long()
    behind = model.language_model.model.embed_tokens(tokens)
    logits, cache = model.prefill(torch.cat([fed.embeddings, behind[None]], dim=1),
                                  torch.cat([fed.position_ids, fed.next_position + places]), room,
                                  1 + len(tokens), shared_prefix(model, look, fed, A),
                                  drafted.siblings)
    return Read(logits, drafted, cache, fed, len(kept.keep) + kept.n_added,
                model.graphed or model.language_model, fed.next_position)


def shared_prefix(model: "Llava", look: "Look", fed: "Fed", n_after: int) -> KVCache | None:
    """The cache of a prompt up to the end of its image, which all questions that feed the same share.

    None where the look is not a shared one.  Only the last prefix is held, so ask all questions about an
    image under one pruning before the next.  What is fed decides, and not what the strategy is called.
    """
    if look.prefixes is None:
        return None
    end = len(fed.position_ids) - n_after
    x, ids = fed.embeddings[:, :end], fed.position_ids[:end]
    held = look.prefixes.get("held")
    if held is None or not (torch.equal(held[0], x) and torch.equal(held[1], ids)):
        held = look.prefixes["held"] = (x, ids, model.prefill(x, ids, 0)[1])
    return held[2]


def read_and_cut(model: "Llava", seen: Seen, input_ids: Tensor, question: Question, room: int) -> Read:
    """Read the prompt with all visual tokens, some of which the decoder drops on the way: fastv.py."""
    N, (P, _), decoder = len(seen.features), model.around_image(input_ids), model.language_model
    prune.check(question.prune, N, question.keep)
    layers, cut = model.config.text.num_hidden_layers, model.fastv_layer
    if not 0 < cut < layers:
        raise NanogapError(f"{question.prune} cannot cut before layer {cut} of {layers}: "
                           f"choose one from 1 to {layers - 1}")
    whole = model.sequence(input_ids, seen.features, Kept(torch.arange(N)), "full")
    cache = KVCache(model.config.text, len(whole.position_ids) + room, whole.embeddings)

    def choose(attention: Tensor) -> Kept:
        return prune.select(question.prune, replace(seen, attention=attention), question.keep, question.seed)

    logits, keep, ids, next_position = fastv.prefill(decoder, whole.embeddings, cache, P, N,
                                                     question.mode, choose, cut)
    fed = replace(whole, position_ids=ids, next_position=next_position, keep=keep)
    return Read(logits, Draft(), cache, fed, fastv.mean_tokens(layers, N, len(keep), cut),
                fastv.decoder(decoder, whole.next_position - next_position, cut), whole.next_position)


def answer(model: "Llava", look: "Look", question: Question, max_new_tokens: int = MAX_NEW_TOKENS,
           drafts: bool = True, on_token: Callable[[int], None] | None = None) -> Result:
    """Ask, and put together what came of it.

    drafts:   whether a pass may be fed several tokens (generate.py); the words are the same
    on_token: called with each token ID as it comes
    """
    if question.mode not in gap.MODES:
        raise NanogapError(f"unknown mode {question.mode!r}: choose from {', '.join(gap.MODES)}")
    with torch.inference_mode():                                              # no_grad, but faster
        start = model.clock()
        foretold = template(model.tokenizer) if drafts else []
        reading = read(model, look, question, draft(foretold, [], max_new_tokens - 1), max_new_tokens)
        prefilled, tokens, passes = model.clock(), [], -1                     # the first tokens cost none
        for new in decode(model.language_model, reading.logits, reading.cache, reading.starts_at,
                          max_new_tokens, model.config.eos_token, foretold, reading.drafted,
                          reading.decoder):
            tokens, passes = tokens + new, passes + 1
            for token in new if on_token else ():
                on_token(token)
    text = model.tokenizer.decode(tokens)
    timings = {"vision_ms": look.vision_ms, "prefill_ms": prefilled - start,
               "decode_ms": model.clock() - prefilled, "new_tokens": len(tokens), "passes": passes}
    fed = reading.fed                                     # copied below: autograd takes no inference tensor
    return Result(in_pixels(parse_box(text), look.width, look.height), text, fed.keep.clone(),
                  reading.visual_tokens, fed.position_ids.cpu().clone(), fed.next_position, tokens, timings,
                  reading.cache.bytes_in_use())


def in_pixels(box: Box | None, width: int, height: int) -> Box | None:
    """A parsed box in pixels of the image, or None where there is none or it lies in the padding."""
    box = box and box_to_pixels(box, width, height)
    return box if box and box[0] < box[2] and box[1] < box[3] else None
