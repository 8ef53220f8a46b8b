"""Greedy decoding: token by token, and several tokens to a pass where the format foretells them.

In:  a prompt that was read.  Out: token IDs, one after the other.

`decode` is all that decoding is.  `decode_drafted` gives the same words in fewer passes of the
decoder.  Of the 25 tokens of "[0.12, 0.34, 0.56, 0.78]" and its end only eight digits are news.  So
a pass is fed the last new tokens, those that the format puts behind them, and where it leaves a
choice, all ten digits side by side: alternatives, which do not see one another and have one
position ID.  The logits of all of them come out at once.  They show how far greedy decoding would
have said the same, and what it would say next.  The rest is dropped from the cache, where the next
rows overwrite it.  A pass in the middle of a box:

    fed             1   2   ,   ▁   0   .   0 1 2 3 4 5 6 7 8 9     said before, a chain, a choice
    position IDs    81  82  83  84  85  86  87 ...           87
    greedy behind       ,   ▁   0   .   3         4                 the chain agrees; "3", then "4"

A pass over several tokens rounds differently from passes over one: of two words that are as good as
equal the other may win, as happens in half precision.
Letters: T tokens fed in a pass, D of them drafted, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from nanogap.checks.command import NOT_FINITE
from nanogap.errors import NanogapError
from nanogap.methods.in_decoder import Prefilled
from nanogap.prompt import Draft, Form, draft


def decode(prompt: Prefilled, max_new_tokens: int, ends: Collection[int]) -> Iterator[int]:
    """Yield the new tokens one by one, up to `max_new_tokens` or one that ends an answer."""
    token = greedy(prompt.logits[-1:])[0]
    yield token
    for t in range(max_new_tokens - 1):
        if token in ends:
            return
        # GAP: token t stands at next_position + t, whatever the length of the cache
        logits = prompt.feed([token], [prompt.next_position + t])             # (1, V)
        token = greedy(logits[-1:])[0]
        yield token


def greedy(logits: Tensor) -> list[int]:
    """The token of highest logit in each row (T, V).

    raises: NanogapError where logits are not finite, for any token would do then
    """
    best = logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), -1).tolist()
    if -1 in best:
        raise NanogapError(NOT_FINITE)
    return best


def decode_drafted(prompt: Prefilled, max_new_tokens: int, ends: Collection[int],
                   form: Form) -> Iterator[int]:
    """Yield the tokens that `decode` yields, in fewer passes where they follow the form.

    prompt: read with what was drafted behind it; its cache has room for the widest choice
    form:   the tokens that may stand at each place, as prompt.py foretells them
    """
    cache, drafted, logits = prompt.cache, prompt.drafted, prompt.logits      # (1 + D, V)
    prompt_rows = cache.lengths[0] - len(drafted.tokens)
    tokens: list[int] = []
    while True:
        agreed, new = accepted(greedy(logits), drafted)
        cache.drop(len(drafted.tokens) - agreed)
        for token in new:
            tokens.append(token)
            yield token
            if token in ends:
                return
        if len(tokens) >= max_new_tokens:
            return
        rows = cache.lengths[0] - prompt_rows         # how many of the tokens have a row by now
        drafted = draft(form, tokens, max_new_tokens - len(tokens) - 1)
        places = [*range(rows, len(tokens)), *drafted.places(len(tokens))]
        position_ids = [prompt.next_position + place for place in places]
        logits = prompt.feed([*tokens[rows:], *drafted.tokens], position_ids, drafted.alternatives)
        logits = logits[-1 - len(drafted.tokens):]                            # (1 + D, V)


def accepted(greedy: Sequence[int], drafted: Draft) -> tuple[int, list[int]]:
    """How many tokens of the chain greedy decoding would have said, and the new tokens.

    greedy: the 1 + D tokens of highest logit: behind what was fed, and behind each drafted token
    """
    chain, choice = drafted.chain, drafted.choice
    agreed = 0
    while agreed < len(chain) and greedy[agreed] == chain[agreed]:
        agreed += 1
    new = list(greedy[:agreed + 1])
    if agreed == len(chain) and new[-1] in choice:                          # known: what follows it
        new.append(greedy[agreed + 1 + choice.index(new[-1])])
    return agreed, new
