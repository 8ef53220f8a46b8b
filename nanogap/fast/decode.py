"""Decoding several tokens to a pass where the form of a box foretells them.

In:  a prompt that is laid out.  Out: the words of nanogap/ground.py's `greedy`, in fewer passes.

Of the 25 tokens of "[0.12, 0.34, 0.56, 0.78]" and its end only eight digits are news.  So a pass is
fed the last new tokens, those that the format puts behind them, and where it leaves a choice, all
ten digits side by side: alternatives, which do not see one another and have one position ID.  The
logits of all of them come out at once.  They show how far greedy decoding would have said the same,
and what it would say next.  The rest is dropped from the cache, where the next rows overwrite it.
A pass in the middle of a box:

    fed             1   2   ,   ▁   0   .   0 1 2 3 4 5 6 7 8 9     said before, a chain, a choice
    position IDs    81  82  83  84  85  86  87 ...           87
    greedy behind       ,   ▁   0   .   3         4                 the chain agrees; "3", then "4"

A pass over several tokens rounds differently from passes over one: of two words that are as good as
equal the other may win, as happens in half precision.
Letters: T tokens of the prompt, D drafted, C channels, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nanogap.fast.decoder import Cache, feed, likeliest
from nanogap.fast.draft import accepted, draft, foretell
from nanogap.gap import Layout
from nanogap.ground import Answer
from nanogap.llava import Llava, clock_ms

# a pass: embeddings (1, T, C), position_ids (T,), cache, alternatives -> logits (T, V)
Pass = Callable[[Tensor, Tensor, Cache, int], Tensor]


@torch.inference_mode()                                                       # no_grad, but faster
def decode(model: Llava, x: Tensor, layout: Layout, max_new_tokens: int, *, drafts: bool = True,
           next_pass: Pass | None = None) -> Answer:
    """Read the prompt and answer: a `decode=` for nanogap/ground.py.

    x:         (1, T, C) embeddings of the prompt; what is drafted behind it is read with it
    next_pass: another way to run the passes behind that: see graph.py
    """
    start, language_model = clock_ms(x.device), model.language_model
    embed_tokens = language_model.model.embed_tokens
    next_pass = next_pass or partial(feed, language_model)
    form = foretell(model.box_format, model.tokenizer) if drafts else ()
    drafted = draft(form, [], max_new_tokens - 1)
    D, room = len(drafted.tokens), max_new_tokens + max(map(len, form), default=0)
    cache = Cache(language_model.model.config, x.shape[1] + D + room, x)
    ids = layout.position_ids.tolist() + drafted.places(layout.next_position)
    position_ids = torch.tensor(ids, device=x.device)                         # (T + D,)
    behind = torch.tensor(drafted.tokens, device=x.device).long()             # (D,)
    x = torch.cat([x, embed_tokens(behind)[None]], dim=1)                     # (1, T + D, C)
    logits = feed(language_model, x, position_ids, cache, drafted.alternatives, last=1 + D)
    prompt_rows, passes, prefill_ms = cache.lengths[0] - D, 0, 0.0
    tokens: list[int] = []
    while True:
        agreed, new = accepted(likeliest(logits[-1 - D:]), drafted)
        cache.drop(D - agreed)
        prefill_ms = prefill_ms or clock_ms(x.device) - start
        for token in new:
            tokens.append(token)
            if token in model.end_tokens or len(tokens) >= max_new_tokens:
                return Answer(tokens, prefill_ms, passes, cache.bytes_in_use())
        rows = cache.lengths[0] - prompt_rows         # how many of the tokens have a row by now
        drafted = draft(form, tokens, max_new_tokens - len(tokens) - 1)
        D = len(drafted.tokens)
        # GAP, 3: token t of the answer stands at next_position + t, whatever the cache's length
        places = [*range(rows, len(tokens)), *drafted.places(len(tokens))]
        position_ids = torch.tensor(places, device=x.device) + layout.next_position
        fed = torch.tensor([[*tokens[rows:], *drafted.tokens]], device=x.device)
        logits = next_pass(embed_tokens(fed), position_ids, cache, drafted.alternatives)
        passes += 1
