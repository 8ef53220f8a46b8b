"""Greedy decoding, with drafts: several tokens to a pass of the decoder where the format foretells them.

In:  the logits after a prompt, and its cache.  Out: token IDs, exactly those of plain greedy decoding.

Of the 25 tokens of "[0.12, 0.34, 0.56, 0.78]" and its end only eight digits are news.  So a pass is fed
the last new token together with those that the format puts behind it; the logits of all of them come
out at once, and show how far greedy decoding would have said the same.  What it would not have said is
dropped from the cache, where the next rows overwrite it.  (In half precision a pass over several tokens
rounds differently from passes over one, and of two words that are as good as equal the other may win.)
A pass in the middle of a box:

    fed                  2    ,    ▁    0    .        the last new token, and four drafts
    greedy behind each   ,    ▁    0    .    3        all drafts agree, and "3" is new

Letters: T tokens fed in a pass, D of them drafted, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nanogap.llama import KVCache, LlamaForCausalLM
from nanogap.prompt import encode, format_box

# a pass of the decoder: embeddings (1, T, C), position_ids (T,), cache, `last` -> logits (1, last, V)
Decoder = Callable[[Tensor, Tensor, KVCache, int], Tensor]


def template(tokenizer: Tokenizer) -> list[int | None]:
    """The tokens of a box as LLaVA says it; None for the digits, which nothing foretells.

    Empty where the tokenizer does not split numbers into digits.
    """
    one, other = (encode(tokenizer, format_box((share,) * 4)) for share in (0.00, 0.11))
    return [a if a == b else None for a, b in zip(one, other)] if len(one) == len(other) else []


def draft(template: Sequence[int | None], said: Sequence[int], most: int) -> list[int]:
    """What the format puts behind the tokens said so far, up to the next digit: at most so many tokens.

    Nothing where those tokens are not the beginning of such a box.
    """
    if any(token not in (None, found) for token, found in zip(template, said)):
        return []
    foretold = takewhile(lambda token: token is not None, template[len(said):])
    return list(foretold)[:max(most, 0)]


def decode(model: LlamaForCausalLM, logits: Tensor, cache: KVCache, next_position: int, most: int,
           end: int, template: Sequence[int | None] = (),
           decoder: Decoder | None = None) -> Iterator[list[int]]:
    """Yield the new tokens of each pass, up to `most` of them or the end token; the first cost no pass.

    logits:        (1 + D, V) after the prompt, and after each of the tokens that were drafted behind it
    next_position: ID of the first new token.  It counts on from here and the cache row from the rows in
                   use: under GAP the two are far apart, and a draft that is dropped moves only the row.
    decoder:       what runs a pass; None: the model itself
    """
    drafts, said = draft(template, [], len(logits) - 1), []
    while True:
        greedy = logits.argmax(-1).tolist()                                   # 1 + D tokens
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(greedy, drafts)))
        cache.drop(len(drafts) - agreed)
        new = greedy[:agreed + 1]
        new = new[:new.index(end) + 1] if end in new else new
        said += new
        yield new
        if new[-1] == end or len(said) >= most:
            return
        drafts = draft(template, said, most - len(said) - 1)
        fed = torch.tensor([said[-1], *drafts], device=logits.device)         # (T,), T = 1 + D
        ids = next_position + len(said) - 1 + torch.arange(len(fed), device=logits.device)
        logits = (decoder or model)(model.model.embed_tokens(fed)[None], ids, cache, len(fed))[0]
