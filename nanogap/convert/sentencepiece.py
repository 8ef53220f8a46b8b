"""tokenizer.model, SentencePiece's file: LLaMA's pieces and their scores, as a tokenizer of ours.

In:  the file that LLaMA, Vicuna and Mistral are published with, and a model's own special tokens.
Out: a tokenizer that is written as tokenizer.json, the same as the one on the hub.

SentencePiece merges the two neighbours whose piece has the highest score, again and again; BPE
reads which two to merge from a list, so the list is every way to make a piece of two, best first.
Source: sentencepiece_model.proto; convert_slow_tokenizer.py of transformers, whose order of merges
with equal scores the published files have.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nanogap.checks.reading import unreadable
from nanogap.errors import NanogapError
from nanogap.models.tokenizer import START_TOKENS, llama_tokenizer

VARINT, BYTES = 0, 2                    # kinds of fields; those of a fixed length:
LENGTHS = {1: 8, 5: 4}
PIECE, TRAINER, NORMALIZER = 1, 2, 3    # numbers of fields; the first comes once for each piece
TEXT, SCORE = 1, 2                      # in a piece
SETTINGS = {                            # what makes another tokenizer, and the value of LLaMA's
    (TRAINER, 3): 2,                    # model_type: BPE
    (TRAINER, 35): 1,                   # byte_fallback
    (NORMALIZER, 3): 1,                 # add_dummy_prefix
    (NORMALIZER, 4): 0}                 # remove_extra_whitespaces


def read_llama_tokenizer(path: Path, special_tokens: Iterable[str]) -> Tokenizer:
    """The tokenizer of a tokenizer.model, with special tokens behind its pieces."""
    scores = read_scores(path)
    vocab = {piece: i for i, piece in enumerate(scores)}
    return llama_tokenizer(vocab, merges_of(scores), special_tokens)


def read_scores(path: Path) -> dict[str, float]:
    """The pieces of a tokenizer.model, in the order of their IDs, and the score of each.

    raises: NanogapError where it is missing, broken, or none of LLaMA's kind
    """
    if not path.is_file():
        raise NanogapError(f"{path.parent} lacks {path.name}, of which tokenizer.json is made; "
                           "download it as well")
    scores: dict[str, float] = {}
    found = dict(SETTINGS)
    try:
        for number, value in read_fields(path.read_bytes()):
            if number == PIECE:
                piece = dict(read_fields(value))
                scores[piece[TEXT].decode()], = struct.unpack("<f", piece.get(SCORE, bytes(4)))
            elif number in (TRAINER, NORMALIZER):
                found |= {(number, field): inner for field, inner in read_fields(value)}
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise unreadable(path, f"it is no tokenizer.model, or is cut off: {error}",
                         "download it again") from None
    if tuple(scores)[:3] != START_TOKENS or not SETTINGS.items() <= found.items():
        raise NanogapError(f"{path} is of another kind than LLaMA's; give the one that was "
                           "published with the model")
    return scores


def read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message, each its number and its value, a whole number or bytes."""
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
        else:
            length = LENGTHS[kind]
        yield number, data[at:at + length]
        at += length
    if at > len(data):
        raise ValueError("bytes are missing")


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the piece of the highest score first."""
    ids = {piece: i for i, piece in enumerate(scores)}
    merges = []
    for piece, score in scores.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        ways = [(a, b) for a, b in halves if a in ids and b in ids]
        merges += [(score, way) for way in sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))]
    return [way for _, way in sorted(merges, key=lambda merge: -merge[0])]    # stable
