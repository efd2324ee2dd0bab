"""The source `toyworld`: scenes that the library draws itself. `toyworld-without-fox` is the same without foxes, for models that are to
learn that subject later."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

from tinyldm.data import toyworld
from tinyldm.data.readers import Sample
from tinyldm.data.source_kind import ListOptions, Shard, SourceKind
from tinyldm.lookup import lookup

SPEC = re.compile(r"toyworld(?:-without-(?P<subject>\w+))?")


def left_out(spec: str) -> str | None:
    """The subject that a spec leaves out, "" for none; None where it is the spec of another source."""
    return (found["subject"] or "") if (found := SPEC.fullmatch(spec)) else None


def all_toyworld(specs: Sequence[str]) -> bool:
    """Whether toyworld is the only source."""
    return len(specs) == 1 and left_out(specs[0]) is not None


def list_toyworld(spec: str, options: ListOptions) -> list[Shard]:
    """Scenes 0 .. options.scenes - 1, in shards of options.chunk."""
    if options.scenes < 1:
        raise ValueError(f"--data {spec}: {options.scenes} scenes are none: draw at least 1")
    if subject := left_out(spec):
        lookup(toyworld.SUBJECTS, subject, f"subject in --data {spec}")
    starts = range(0, options.scenes, options.chunk)
    return [make_shard(spec, range(i, min(i + options.chunk, options.scenes)), options.resolution, options.seed) for i in starts]


def make_shard(spec: str, numbers: range, resolution: int, seed: int) -> Shard:
    return Shard(f"{spec}-{numbers.start:06d}", f"{spec} {numbers.start} to {numbers.stop - 1}",
                 f"{spec}-{numbers.start}-{numbers.stop}-{resolution}-{seed}", False,
                 partial(read_toyworld, numbers, resolution, seed, left_out(spec) or ""))


def read_toyworld(numbers: range, resolution: int, seed: int, without: str) -> Iterator[Sample]:
    for number in numbers:
        drawn = toyworld.sample(number, resolution, seed, without=without)
        yield Sample(f"{number:06d}", drawn.image, {"text": drawn.caption})


TOYWORLD = SourceKind("toyworld", lambda spec: left_out(spec) is not None, list_toyworld)
