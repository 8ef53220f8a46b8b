"""tokenizer.model, SentencePiece's file: LLaMA's pieces and their scores, as a tokenizer of ours.

In:  the file that LLaMA, Vicuna and Mistral are published with, and a model's own special tokens.
Out: a tokenizer that is written as tokenizer.json, the same as the one on the hub.

The file is a protobuf message: fields one behind the other, each a number and a kind, and then its
value.  Field 1 comes once for each piece, a message of its own (1: text, 2: score, 3: type).
SentencePiece merges the two neighbours whose piece has the highest score, again and again; BPE
reads which two to merge from a list, so the list is every way to make a piece of two, best first.
Source: sentencepiece_model.proto; convert_slow_tokenizer.py of transformers, whose order of merges
with equal scores the published files have.
"""

import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from nanogap.checks.reading import instead
from nanogap.errors import NanogapError
from nanogap.models.tokenizer import START_TOKENS, llama_tokenizer

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5     # kinds of fields
MOST_BYTES = 1 << 24                                    # of a file; LLaMA's has 2^19
Field = tuple[int, int | bytes]                         # its number, and what stands in it


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def read_fields(data: bytes) -> Iterator[Field]:
    """The fields of a message; IndexError or ValueError where it is none."""
    at = 0
    while at < len(data):
        key, at = read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = read_varint(data, at)
            yield number, value
            continue
        if kind == BYTES:
            length, at = read_varint(data, at)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            length = 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + length > len(data):
            raise IndexError("it is cut off")
        yield number, data[at:at + length]
        at += length


def read_piece(message: bytes) -> tuple[str, float]:
    """The text of a piece, and its score; no score stands for 0."""
    found = {number: value for number, value in read_fields(message) if isinstance(value, bytes)}
    return found[1].decode(), struct.unpack("<f", found.get(2, bytes(4)))[0]


def read_scores(path: Path) -> dict[str, float]:
    """The pieces of a tokenizer.model, in the order of their IDs, and the score of each.

    raises: NanogapError where it is missing, broken, or none of LLaMA's kind
    """
    if not path.is_file():
        raise NanogapError(f"{path.parent} lacks {path.name}, of which tokenizer.json is made; "
                           "download it as well")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    scores: dict[str, float] = {}
    try:
        for number, value in read_fields(data):
            if number == 1 and isinstance(value, bytes):
                text, score = read_piece(value)
                if text in scores:
                    raise ValueError(f"two pieces are {text!a:.20}")
                if not math.isfinite(score):
                    raise ValueError(f"the score of {text!a:.20} is {score}")
                scores[text] = score
            elif number in SETTINGS and isinstance(value, bytes):
                check_settings(number, dict(read_fields(value)))
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise NanogapError(instead(path) or f"{path} is no tokenizer.model of LLaMA's, or is cut "
                           f"off ({error}); download it again") from None
    if tuple(scores)[:3] != START_TOKENS or len(data) > MOST_BYTES:
        raise NanogapError(f"{path} is no tokenizer.model of LLaMA's: its pieces do not begin with "
                           f"{' '.join(START_TOKENS)}; give the one that was published with it")
    return scores


# what makes another tokenizer: field of the file -> field in it -> name, the value of LLaMA's
SETTINGS: dict[int, dict[int, tuple[str, int]]] = {
    2: {3: ("model_type", 2), 35: ("byte_fallback", 1)},                      # trainer_spec; 2: BPE
    3: {3: ("add_dummy_prefix", 1), 4: ("remove_extra_whitespaces", 0)}}      # normalizer_spec


def check_settings(number: int, found: dict[int, int | bytes]) -> None:
    """ValueError where the file says that it works in another way than LLaMA's."""
    for field, (name, value) in SETTINGS[number].items():
        if found.get(field, value) != value:
            raise ValueError(f"its {name} is {found[field]!r}, and LLaMA's {value}")


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the piece of the highest score first."""
    ids = {piece: i for i, piece in enumerate(scores)}
    merges = []
    for piece, score in scores.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        ways = [(a, b) for a, b in halves if a in ids and b in ids]
        merges += [(score, way) for way in sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))]
    return [way for _, way in sorted(merges, key=lambda merge: -merge[0])]    # stable


def read_llama_tokenizer(path: Path, special_tokens: Iterable[str]) -> Tokenizer:
    """The tokenizer of a tokenizer.model, with special tokens behind its pieces."""
    scores = read_scores(path)
    vocab = {piece: i for i, piece in enumerate(scores)}
    return llama_tokenizer(vocab, merges_of(scores), special_tokens)
