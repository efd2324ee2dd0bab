"""What a kind of source is: one row of the table `tinyldm.data.sources.SOURCES`.

A source is what a user names with --data. It is listed as shards, which are read, encoded and cached one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tinyldm.data.readers import Sample, Skip


@dataclass(frozen=True)
class Shard:
    """A part of a source that is read on its own."""

    name: str                       # unique over all sources, the same in every listing, and a valid folder name on any system
    url: str                        # used in messages
    stamp: str                      # changes whenever the contents may have changed
    remote: bool
    read: Callable[[], Iterator[Sample | Skip]] = field(repr=False)
    content: Callable[[], str] | None = field(default=None, repr=False)      # a hash of all that is read; None: unknown before reading


class ListOptions(NamedTuple):
    """What a listing of shards depends on besides the source's spec."""

    resolution: int                 # of pictures that are drawn for the run, in pixels
    scenes: int                     # how many scenes toyworld draws
    seed: int                       # of drawn pictures
    chunk: int                      # samples per shard where the source is not divided into shards itself


class SourceKind(NamedTuple):
    """A row of SOURCES."""

    description: str                                        # completes "what is read: ..." in error messages
    matches: Callable[[str], bool]                          # whether a spec (without its weight) is of this kind
    shards: Callable[[str, ListOptions], list[Shard]]       # all shards of a spec, in a fixed order


class NothingReadable(ValueError):
    """What a spec names is not of any kind that is read. `list_shards` adds to the message what is read."""
