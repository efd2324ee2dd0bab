"""What an encoding job has read, kept and left out: counts by reason, statistics of the latents, and when they are too bad to go on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from tinyldm.config import DataConfig
from tinyldm.data.decoding import Unusable, upright_size
from tinyldm.data.readers import CUT, DAMAGED, Sample
from tinyldm.data.source_kind import Shard

NARROW = 0.1        # standard deviation of the posterior, relative to the latents', below which the mean is enough


class Report(NamedTuple):
    """Counts and statistics of a cache, added up over its shards."""

    shards: int
    broken: int             # shards whose archive is truncated or damaged
    read: int               # samples
    kept: int               # samples
    skipped: Counter        # {reason: samples} that are broken
    filtered: Counter       # {reason: samples} outside the user's own limits
    stats: Counter          # sums over all latents

    @property
    def width(self) -> float:
        """The standard deviation of the posterior, relative to that of the latents."""
        n, total, squares = (self.stats[name] for name in ("numbers", "sum", "squares"))
        return (self.stats["variance"] / max(squares - total**2 / n, 1e-12)) ** 0.5 if n else 0.0

    def __str__(self) -> str:
        lines = [f"{self.shards:,} shard{'s' * (self.shards != 1)}: {self.read:,} samples read, {self.kept:,} kept"]
        if self.broken:
            lines.append(f"{self.broken:,} of the shards are damaged or cut short: what they should hold besides is not known")
        for title, counts in (("skipped", self.skipped), ("filtered out", self.filtered)):
            if n := sum(counts.values()):
                lines.append(f"{title}: {n:,} ({n / self.read:.2%}): {listed(counts)}; each is named in skipped.jsonl")
        advice = "the mean is enough" if self.width < NARROW else "wide enough for --moments to be worth its space"
        return "\n".join([*lines, f"standard deviation of the VAE's posterior over that of the latents: {self.width:.2%} ({advice})"])


def add_up(facts: Iterable[dict[str, Any]]) -> Report:
    """The sum of the contents of many shard.json files."""
    facts = list(facts)
    sums = {name: sum((Counter(shard[name]) for shard in facts), Counter()) for name in ("skipped", "filtered")}
    stats = Counter()
    for shard in facts:
        stats.update(shard["stats"])
    broken = sum(bool({CUT, DAMAGED}.intersection(shard["skipped"])) for shard in facts)
    return Report(len(facts), broken, sum(shard["read"] for shard in facts), sum(shard["kept"] for shard in facts), stats=stats, **sums)


def judge(data: DataConfig, report: Report, shards: int) -> None:
    """ValueError when too large a part of the samples had to be skipped, or too large a part of the shards is broken.

    shards: how many there are in all. Broken shards count by themselves, because how many samples they lost is not known.
    """
    for what, bad, of in (("samples", sum(report.skipped.values()), report.read), ("shards", report.broken, shards)):
        if bad > data.max_skip * of:
            raise ValueError(f"{bad:,} of {of:,} {what} had to be skipped or are cut short, more than --max-skip {data.max_skip:g} "
                             f"allows ({listed(report.skipped)}; named in shards/*/skipped.jsonl): repair the data, or raise "
                             "--max-skip: encoded shards are kept")


def nothing_usable(data: DataConfig, faults: Counter) -> str:
    """The error message for sources without one usable picture."""
    fix = ": write them beside the pictures, or give all of them one with --captions" if faults["no caption"] else ""
    return f"--data {' '.join(data.sources)}: not one usable picture in it ({listed(faults) or 'no picture with a caption found'}){fix}"


def listed(reasons: Counter) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())


def print_sizes(shards: Iterable[Shard], data: DataConfig) -> None:
    """Print describe_sizes, in the first of several processes."""
    if not int(os.environ.get("RANK", 0)) and (line := describe_sizes(shards, data)):
        print(line, flush=True)


def describe_sizes(shards: Iterable[Shard], data: DataConfig, count: int = 16) -> str:
    """One line on the sizes of the first pictures of the first shard on this machine, and what becomes of them; "" where there is none:
    toyworld draws at any size."""
    shard, found = next((shard for shard in shards if not shard.remote), None), []
    with suppress(OSError, ValueError):                         # what is wrong with them is said when they are encoded
        for sample in islice(shard.read(), count) if shard else ():
            if isinstance(sample, Sample) and isinstance(sample.picture, bytes):
                with suppress(Unusable):
                    found.append(upright_size(sample.picture))
    if not found:
        return ""
    smallest, largest = ("x".join(map(str, choose(found, key=min))) for choose in (min, max))
    side, usual = data.resolution, sorted(map(min, found))[len(found) // 2]
    larger = f"; --resolution {usual // 64 * 64} would keep more of them" if usual >= max(64, 2 * side) else ""
    hint = "; they are enlarged" if usual < side else larger
    return (f"pictures of {smallest if smallest == largest else f'{smallest} to {largest}'} (the first {len(found)}) are encoded "
            f"{'with the number of tokens of' if data.buckets else 'at'} {side}x{side}, --resolution {side}{hint}")
