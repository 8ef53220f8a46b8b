"""Greedy decoding, with drafts: several tokens to a pass of the decoder where the format foretells them.

In:  the logits after a prompt, and its cache.  Out: token IDs, exactly those of plain greedy decoding.

Of the 25 tokens of "[0.12, 0.34, 0.56, 0.78]" and its end only eight digits are news.  So a pass is fed
the last new tokens together with those that the format puts behind them, and where it leaves a choice,
with all ten digits side by side: alternatives, which do not see one another and have one position ID.
The logits of all of them come out at once, and show how far greedy decoding would have said the same,
and what it would say next.  What it would not have said is dropped from the cache, where the next rows
overwrite it.  (A pass over several tokens rounds differently from passes over one: of two words that are
as good as equal the other may win, as happens in half precision.)  A pass in the middle of a box:

    fed             1   2   ,   ▁   0   .   0 1 2 3 4 5 6 7 8 9     said before, a chain, and a choice
    position IDs    81  82  83  84  85  86  87 ...           87
    greedy behind       ,   ▁   0   .   3         4                 the chain agrees; "3", and "4" behind it

Letters: T tokens fed in a pass, D of them drafted, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nanogap.llama import KVCache, LlamaForCausalLM
from nanogap.prompt import encode, format_box

# a pass of the decoder: embeddings (1, T, C), position_ids (T,), cache, `last` -> logits (1, last, V)
Decoder = Callable[[Tensor, Tensor, KVCache, int], Tensor]


@dataclass(frozen=True)
class Draft:
    """What may come next: tokens one behind the other, and then all those among which there is a choice."""

    chain: tuple[int, ...] = ()
    choice: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.chain + self.choice

    @property
    def siblings(self) -> int:
        """How many tokens share the last place."""
        return max(len(self.choice), 1)

    def places(self, start: int) -> list[int]:
        """Where the tokens stand if the first does at `start`; those of the choice are at one place."""
        return [start + min(i, len(self.chain)) for i in range(len(self.tokens))]


@lru_cache(maxsize=1)
def template(tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The tokens that may stand at each place of a box as LLaVA says it: the one, or any of ten digits.

    Empty where the tokenizer does not split numbers into digits.
    """
    boxes = [encode(tokenizer, format_box((digit * 0.11,) * 4)) for digit in range(10)]
    form = tuple(tuple(dict.fromkeys(tokens)) for tokens in zip(*boxes))
    split = len({len(box) for box in boxes}) == 1 and sum(len(allowed) > 1 for allowed in form) == 8
    return form if split else ()


def draft(form: Sequence[tuple[int, ...]], said: Sequence[int], most: int) -> Draft:
    """What the format puts behind the tokens said so far, up to the next choice: at most so many places.

    form: as `template` gives it; nothing is drafted where the tokens are not the beginning of such a box
    """
    if any(token not in allowed for allowed, token in zip(form, said)):
        return Draft()
    ahead = form[len(said):][:max(most, 0)]
    chain = tuple(one for one, in takewhile(lambda allowed: len(allowed) == 1, ahead))
    return Draft(chain, ahead[len(chain)] if len(chain) < len(ahead) else ())


def decode(model: LlamaForCausalLM, logits: Tensor, cache: KVCache, next_position: int, most: int,
           end: int, form: Sequence[tuple[int, ...]] = (), drafted: Draft = Draft(),
           decoder: Decoder | None = None) -> Iterator[list[int]]:
    """Yield the new tokens of each pass, up to `most` of them or the end token; the first cost no pass.

    logits:        (1 + D, V) after the prompt, and after each of the tokens that were drafted behind it
    cache:         has rows left for `most` tokens and the widest choice
    next_position: ID of the first new token.  It counts on from here and the cache row from the rows in
                   use: under GAP the two are far apart, and a draft that is dropped moves only the row.
    drafted:       what was drafted behind the prompt
    decoder:       what runs a pass; None: the model itself
    """
    said, prompt = [], cache.lengths[0] - len(drafted.tokens)
    while True:
        greedy = logits.argmax(-1).tolist()                                   # 1 + D tokens
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(greedy, drafted.chain)))
        cache.drop(len(drafted.tokens) - agreed)
        new = greedy[:agreed + 1]
        if agreed == len(drafted.chain) and new[-1] in drafted.choice:        # what is behind it is known
            new.append(greedy[agreed + 1 + drafted.choice.index(new[-1])])
        new = new[:new.index(end) + 1] if end in new else new
        said += new
        yield new
        if new[-1] == end or len(said) >= most:
            return
        rows = cache.lengths[0] - prompt                  # of the tokens said; the last one or two have none
        drafted = draft(form, said, most - len(said) - 1)
        cache.siblings = drafted.siblings
        fed = [*said[rows:], *drafted.tokens], [*range(rows, len(said)), *drafted.places(len(said))]
        tokens, places = torch.tensor(fed, device=logits.device)              # (T,) each
        x = model.model.embed_tokens(tokens)[None]                            # (1, T, C)
        logits = (decoder or model)(x, next_position + places, cache, 1 + len(drafted.tokens))[0]
