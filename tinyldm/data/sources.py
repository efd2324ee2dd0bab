"""Data sources: what a user types after --data, the table of the kinds of sources, and the shards of a source.

Notable: a shard keeps its name when other shards are added or removed, and its stamp changes with its contents, so finished
work on a shard can be found again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from tinyldm.data.file_sources import FILES
from tinyldm.data.source_kind import ListOptions, NothingReadable, Shard, SourceKind
from tinyldm.data.toyworld_source import TOYWORLD

# The kind of a spec is the first row that matches it. A spec that no row matches is a path or a URL (FILES).
SOURCES: dict[str, SourceKind] = {"toyworld": TOYWORLD}


class Source(NamedTuple):
    spec: str                       # without the weight
    weight: Fraction | None         # exactly as typed


def find_kind(spec: str) -> SourceKind:
    return next((kind for kind in SOURCES.values() if kind.matches(spec)), FILES)


def readable() -> str:
    """A clause for error messages that lists all kinds of sources."""
    return "what is read: " + ", ".join(kind.description for kind in [*SOURCES.values(), FILES])


def parse_sources(words: Sequence[str]) -> list[Source]:
    """Sources, either each with its weight after a last colon ("A:0.7", "B:0.3") or all without weights.

    A word that names an existing path, or that a row of SOURCES matches, is a spec as a whole, even where it ends in a colon
    and a number. ValueError for weights that are not above 0, or that only some of the sources have.
    """
    sources = []
    for word in words:
        spec, colon, number = word.rpartition(":")
        port = number.isdigit() and re.fullmatch(r"\w[\w+.-]*://([^/@]*@)?(\[[^]]*\]|[^/:]*)", spec)
        whole = os.path.exists(os.path.expanduser(word)) or find_kind(word) is not FILES
        if whole or port or not colon or not re.fullmatch(
                r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d\d?)?|[+-]?(nan|inf)", number, re.IGNORECASE | re.ASCII):
            sources.append(Source(word, None))
            continue
        if not spec:
            raise ValueError(f"--data {word}: a weight without a source; expected SOURCE:WEIGHT")
        if "n" in number.lower() or len(number) > 40 or (weight := Fraction(number)) <= 0:
            raise ValueError(f"--data {word}: a weight must be a number above 0; leave the source out to train without it")
        sources.append(Source(spec, weight))
    if any(not spec for spec, _ in sources):
        raise ValueError(f"--data '': {readable()}")
    if len({source.weight is None for source in sources}) > 1:
        bare = next(source.spec for source in sources if source.weight is None)
        raise ValueError(f"--data {bare} has no weight, others have: give every source one (SOURCE:WEIGHT), or none")
    if twice := {spec for spec, _ in sources if [other for other, _ in sources].count(spec) > 1}:
        raise ValueError(f"--data {min(twice)} is named twice: name it once, with a larger weight")
    return sources


def list_shards(source: Source, *, resolution: int, scenes: int, seed: int, chunk: int = 2048) -> list[Shard]:
    """All shards of a source, in a fixed order. The options are those of `ListOptions`.

    ValueError, with what was looked for: there is no shard. SourceLost: a URL cannot be reached.
    """
    options = ListOptions(resolution, scenes, seed, chunk)
    try:
        shards = find_kind(source.spec).shards(source.spec, options)
    except NothingReadable as error:
        raise ValueError(f"{error}; {readable()}") from error
    return list({shard.name: shard for shard in shards}.values())
