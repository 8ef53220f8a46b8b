"""tokenizer.model, SentencePiece's file: LLaMA's pieces and their scores, as a tokenizer of ours.

SentencePiece merges the two neighbours whose piece has the highest score, again and again; BPE
reads which two to merge from a list, so the list is every way to make a piece of two, best first.
Source: sentencepiece_model.proto; convert_slow_tokenizer.py of transformers, whose order of merges
with equal scores the published files have.
"""

import io
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nanogap.checks.reading import unreadable
from nanogap.errors import NanogapError
from nanogap.models.saving import START_TOKENS, llama_tokenizer

VARINT, BYTES = 0, 2                    # kinds of fields; those of a fixed length:
LENGTHS = {1: 8, 5: 4}
PIECE, TEXT, SCORE = 1, 1, 2            # numbers of fields: in the file, and two in a piece


def read_llama_tokenizer(path: Path, special_tokens: Iterable[str]) -> Tokenizer:
    """With special tokens behind its pieces; NanogapError where it is broken, or not LLaMA's."""
    if not path.is_file():
        raise NanogapError(f"{path.parent} lacks {path.name}, of which tokenizer.json is made; "
                           "download it as well")
    scores: dict[str, float] = {}       # in the order of IDs
    try:
        for number, value in read_fields(path.read_bytes()):
            if number == PIECE:
                piece = dict(read_fields(value))
                scores[piece[TEXT].decode()], = struct.unpack("<f", piece.get(SCORE, bytes(4)))
    except (LookupError, OverflowError, TypeError, ValueError, struct.error) as error:
        raise unreadable(path, f"it is no tokenizer.model, or is cut off: {error}",
                         "download it again") from None
    if tuple(scores)[:3] != START_TOKENS:
        raise NanogapError(f"{path} is of another kind than LLaMA's; give the one that was "
                           "published with the model")
    vocab = {piece: i for i, piece in enumerate(scores)}
    return llama_tokenizer(vocab, merges_of(scores), special_tokens)


def read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message, each its number and its value, a whole number or bytes."""
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        key = read_varint(stream)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            yield number, read_varint(stream)
            continue
        length = read_varint(stream) if kind == BYTES else LENGTHS[kind]
        value = stream.read(length)
        if len(value) < length:
            raise ValueError("bytes are missing")
        yield number, value


def read_varint(stream: io.BytesIO) -> int:
    """A number in groups of seven bits, the lowest first."""
    value = shift = 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the piece of the highest score first."""
    ids = {piece: i for i, piece in enumerate(scores)}
    ways = []
    for piece, score in scores.items():
        for i in range(1, len(piece)):
            a, b = piece[:i], piece[i:]
            if a in ids and b in ids:
                ways.append((-score, ids[piece], ids[a], ids[b], (a, b)))
    return [way[-1] for way in sorted(ways)]
