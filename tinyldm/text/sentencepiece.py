"""Reads spiece.model, the file of a SentencePiece vocabulary, without the package.

It is a protocol buffer (sentencepiece_model.proto of google/sentencepiece): a sequence of fields, each of which is a number and a
type, then a value. Fields that are not needed here are skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tinyldm.files import INCOMPLETE

# Fields of the messages ModelProto, SentencePiece, TrainerSpec and NormalizerSpec.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE, SCORE, KIND = 1, 2, 3
MODEL_TYPE, UNKNOWN_ID = 3, 40
CHARSMAP = 2

UNIGRAM = 1                                 # of MODEL_TYPE, and its default
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4     # of KIND; NORMAL is its default


class Piece(NamedTuple):
    text: str
    score: float                # log-probability
    kind: int


class SentencePieces(NamedTuple):
    """What a file holds."""

    pieces: list[Piece]         # by id
    unknown_id: int
    charsmap: bytes             # how characters are normalised, in SentencePiece's own form; b"": not at all


def read_sentencepieces(file: Path) -> SentencePieces:
    """ValueError for a file that is damaged, is not one of SentencePiece's, or holds another kind of vocabulary than unigrams."""
    data = file.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a git-lfs pointer, not the vocabulary: run 'git lfs pull' in its folder")
    try:
        pieces, trainer, normalizer = [], {}, {}
        for number, value in _fields(memoryview(data)):
            if number == PIECES:
                pieces.append(_piece(dict(_fields(value))))
            elif number == TRAINER:
                trainer = dict(_fields(value))
            elif number == NORMALIZER:
                normalizer = dict(_fields(value))
        if not pieces:
            raise ValueError("it holds no pieces")
    except (ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{file} is damaged or no vocabulary of SentencePiece ({error}): {INCOMPLETE}") from error
    if trainer.get(MODEL_TYPE, UNIGRAM) != UNIGRAM:
        raise ValueError(f"{file} is no vocabulary of unigrams, which T5's is: is it the tokenizer of another model?")
    return SentencePieces(pieces, trainer.get(UNKNOWN_ID, 0), bytes(normalizer.get(CHARSMAP, b"")))


def _piece(fields: dict) -> Piece:
    score = struct.unpack("<f", fields[SCORE])[0] if SCORE in fields else 0.0
    return Piece(bytes(fields[PIECE]).decode(), score, fields.get(KIND, NORMAL))


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of one message: (number, value). A value is a whole number, or bytes that its field says how to read."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at:at + size], at + size
            if at > len(data):
                raise ValueError("it ends too early")
        yield key >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A whole number in groups of seven bits, the lowest first, all but the last of which have the eighth bit set; and where it ends."""
    value = shift = 0
    while data[at] & 128:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1
