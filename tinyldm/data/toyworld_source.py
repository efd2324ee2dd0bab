"""The source `toyworld`: scenes that the library draws itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tinyldm.data import toyworld
from tinyldm.data.readers import Sample
from tinyldm.data.source_kind import ListOptions, Shard, SourceKind


def list_toyworld(spec: str, options: ListOptions) -> list[Shard]:
    """Scenes 0 .. options.scenes - 1, in shards of options.chunk."""
    if options.scenes < 1:
        raise ValueError(f"--data toyworld: {options.scenes} scenes are none: draw at least 1")
    starts = range(0, options.scenes, options.chunk)
    return [make_shard(range(i, min(i + options.chunk, options.scenes)), options.resolution, options.seed) for i in starts]


def make_shard(numbers: range, resolution: int, seed: int) -> Shard:
    return Shard(f"toyworld-{numbers.start:06d}", f"toyworld {numbers.start} to {numbers.stop - 1}",
                 f"toyworld-{numbers.start}-{numbers.stop}-{resolution}-{seed}", False,
                 partial(read_toyworld, numbers, resolution, seed))


def read_toyworld(numbers: range, resolution: int, seed: int) -> Iterator[Sample]:
    for number in numbers:
        drawn = toyworld.sample(number, resolution, seed)
        yield Sample(f"{number:06d}", drawn.image, {"text": drawn.caption})


TOYWORLD = SourceKind("toyworld", lambda spec: spec == "toyworld", list_toyworld)
