"""Which samples make up the batch of a training step: a pure function of (seed, step) for any number of samples or processes.

No list of samples is shuffled and no state is kept. A keyed permutation computes which sample is at any position of any
epoch, so a run resumes at any step without replaying earlier ones, and ten million samples need no memory. Sources are mixed
by a precomputed table of one period, which solves the chairman assignment problem (R. Tijdeman, Discrete Mathematics 32, 1980).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush
from math import gcd, isqrt, lcm

import numpy as np

from tinyldm.random_streams import Stream

Size = tuple[int, int]      # rows and columns of a latent
ROUNDS = 8                  # of the Feistel network
LONGEST_PERIOD = 1_000_000  # entries of the table that mixes the sources


class Order:
    """The order in which training draws samples.

    ranges: for each source and latent size, the range of its samples' flat numbers (`Cache.ranges`).
    weights: one positive number per source, in any scale; None puts all sources into one pool, which is drawn evenly.

    A pool is what is drawn evenly: one source, or all of them without weights.

    With one latent size: position p = step * batch_size + i of the global order belongs to one pool, and the positions of a
    pool run through its samples epoch after epoch. Every epoch has its own permutation, in which each sample comes exactly once.

    With several sizes: all samples of a batch have the same size (and, with weights, the same source), and the statements
    above hold for whole batches. In an epoch, a size with n samples gives n // batch_size batches; which samples are left over
    differs from epoch to epoch.

    Mixing: in the first p positions (or batches), counted from the start of any period, the number drawn from a source
    differs from p * weight by at most 1 - 1 / (2k - 2) with k sources. Any interval is the difference of two such prefixes:
    the number drawn in it differs from the exact proportion by at most 1 with two sources, and 2 - 1 / (k - 1) with more.
    (A bound of 1 in every interval is impossible for most weights of three or more sources.)

    ValueError: no samples, no size with enough samples for a batch, or weights with too long a period.
    """

    def __init__(self, ranges: Sequence[Mapping[Size, range]], batch_size: int, seed: int,
                 weights: Sequence[Fraction] | None = None):
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: use 1 or more")
        if seed < 0:
            raise ValueError(f"seed {seed} is negative: use 0 or more")
        self.batch_size, self.seed, self.weighted = batch_size, seed, weights is not None
        self.sizes = sorted({size for source in ranges for size, numbers in source.items() if len(numbers)})
        if weights is None:
            pools, proportions = [ranges], [1]
        else:
            pools, proportions = [[source] for source in ranges], _integer_proportions(weights, len(ranges))
        self._pools = [[_Group([source[size] for source in pool if size in source]) for size in self.sizes] for pool in pools]
        self._pool_table = interleave(proportions)              # [period]: the pool of each position
        self._proportions = np.array(proportions)               # [pools]: how many positions of a period each pool has
        self._rank_table = _ranks(self._pool_table)             # [period]: how many earlier positions have the same pool
        self._batches = [np.array([group.count // batch_size for group in pool]) for pool in self._pools]
        for number, (pool, batches) in enumerate(zip(self._pools, self._batches)):
            name = f"source {number + 1} of {len(pools)}" if self.weighted else "the cache"
            if not any(group.count for group in pool):
                raise ValueError(f"{name} holds no samples: leave it out, or prepare it again")
            if len(self.sizes) > 1 and not batches.any():
                largest = max(group.count for group in pool)
                raise ValueError(f"no size of {name} has the {batch_size} samples of a batch (a batch is of one size, and the "
                                 f"largest size has {largest} samples): use --batch-size {largest} or less, or fewer sizes")

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps until every sample (several sizes: every full batch) has come once; None with weights, as sources differ."""
        if self.weighted:
            return None
        return -(-self._pools[0][0].count // self.batch_size) if len(self.sizes) == 1 else int(self._batches[0].sum())

    @property
    def never_drawn(self) -> list[tuple[Size, int]]:
        """(size, number of samples) of the sizes with too few samples for one batch, which are never drawn."""
        if len(self.sizes) == 1:
            return []
        counts = [sum(pool[i].count for pool in self._pools if pool[i].count < self.batch_size) for i in range(len(self.sizes))]
        return [(size, count) for size, count in zip(self.sizes, counts) if count]

    def batch(self, step: int) -> np.ndarray:
        """Flat sample numbers int64 [batch_size] of global batch `step` (0, 1, ...), all of one size."""
        if len(self.sizes) > 1:
            return self._single_size_batch(step)
        pools, positions = self._locate(step * self.batch_size + np.arange(self.batch_size))
        numbers = np.empty(self.batch_size, np.int64)
        for pool in np.unique(pools):
            selected = pools == pool
            numbers[selected] = self._samples(int(pool), 0, positions[selected])
        return numbers

    def _single_size_batch(self, step: int) -> np.ndarray:
        """The batch of a step where there are several sizes: the pool's batches are permuted within each of its epochs."""
        pools, positions = self._locate(np.array([step]))
        pool = int(pools[0])
        ends = np.cumsum(self._batches[pool])                   # [sizes]: batches of an epoch up to and with each size
        epoch, position = divmod(int(positions[0]), int(ends[-1]))
        number = int(permute(np.array([position]), int(ends[-1]), self.seed, Stream.BATCH_ORDER, pool, 0, epoch)[0])
        size = int(np.searchsorted(ends, number, side="right"))
        batch = number - int(ends[size] - self._batches[pool][size])
        first = epoch * self._pools[pool][size].count + batch * self.batch_size
        return self._samples(pool, size, first + np.arange(self.batch_size))

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the global order -> the pool of each, and its position in the order of that pool."""
        periods, positions = np.divmod(positions, len(self._pool_table))
        pools = self._pool_table[positions]
        return pools, periods * self._proportions[pools] + self._rank_table[positions]

    def _samples(self, pool: int, size: int, positions: np.ndarray) -> np.ndarray:
        """Positions in the order of one pool and size -> flat sample numbers."""
        group = self._pools[pool][size]
        epochs, positions = np.divmod(positions, group.count)
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            positions[selected] = permute(positions[selected], group.count, self.seed, Stream.SAMPLE_ORDER, pool, size, int(epoch))
        return group.flat_numbers(positions)


class _Group:
    """The samples of one pool and one size, as a concatenation of ranges of flat numbers."""

    def __init__(self, ranges: list[range]):
        lengths = np.array([len(numbers) for numbers in ranges], np.int64)
        self.ends = np.cumsum(lengths)
        self.shift = np.array([numbers.start for numbers in ranges], np.int64) - (self.ends - lengths)
        self.count = int(lengths.sum())

    def flat_numbers(self, indices: np.ndarray) -> np.ndarray:
        """Indices 0 .. count - 1 within the group -> flat numbers."""
        return indices + self.shift[np.searchsorted(self.ends, indices, side="right")]


def permute(values: np.ndarray, n: int, seed: int, *stream: int) -> np.ndarray:
    """The images of `values` (int64) under a keyed permutation of 0 .. n - 1, in constant memory.

    A Feistel network on a grid of a x b >= n cells, with a and b near sqrt(n): each round shifts one coordinate by a hash of
    the other. An image outside 0 .. n - 1 goes through the network again until it is inside (cycle walking; J. Black,
    P. Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _keys(seed, stream)

    def feistel(values: np.ndarray) -> np.ndarray:
        high, low = np.divmod(values, np.uint64(a))             # high < b, low < a
        for i in range(0, ROUNDS, 2):
            low = (low + _hash(high, keys[i])) % np.uint64(a)
            high = (high + _hash(low, keys[i + 1])) % np.uint64(b)
        return high * np.uint64(a) + low

    values = feistel(values.astype(np.uint64))
    while (outside := values >= n).any():
        values[outside] = feistel(values[outside])
    return values.astype(np.int64)


@lru_cache(maxsize=256)
def _keys(seed: int, stream: tuple[int, ...]) -> np.ndarray:
    """One uint64 key for each round of the network."""
    return np.random.SeedSequence(seed, spawn_key=stream).generate_state(ROUNDS, np.uint64)


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """uint64 -> 32 well-mixed bits as uint64 (the finaliser of MurmurHash3); 32 bits, so that adding to them cannot overflow."""
    x = x ^ key
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x >> np.uint64(32)


def interleave(proportions: Sequence[int]) -> np.ndarray:
    """The source at each of sum(proportions) positions, with every prefix close to the proportions: int64 [sum(proportions)].

    This is the chairman assignment problem (R. Tijdeman, Discrete Mathematics 32, 1980). With k sources and c = 1 / (2k - 2),
    the count x of a source after n positions may differ from n * weight (weight = proportion / sum) by at most 1 - c. So the
    occurrence number x (from 0) of a source may come no earlier than position (x + c) / weight and no later than
    (x + 1 - c) / weight. Tijdeman proved that all occurrences fit between their bounds; earliest deadline first then finds
    such an order.
    """
    total, k = sum(proportions), len(proportions)
    if k == 1:
        return np.zeros(total, np.int64)
    scale = 2 * k - 2                                           # 1 / c, which keeps all bounds in whole numbers
    earliest, job = [], []
    for source, proportion in enumerate(proportions):
        occurrence = np.arange(proportion, dtype=np.int64)
        earliest.append(-(-(occurrence * scale + 1) * total // (scale * proportion)))
        latest = ((occurrence + 1) * scale - 1) * total // (scale * proportion)
        job.append(latest * k + source)                         # sorts by deadline, then by source
    order = np.argsort(np.concatenate(earliest), kind="stable")
    pending = list(zip(np.concatenate(earliest)[order].tolist(), np.concatenate(job)[order].tolist()))[::-1]
    released: list[int] = []
    sources = np.empty(total, np.int64)
    for position in range(total):
        while pending and pending[-1][0] <= position + 1:
            heappush(released, pending.pop()[1])
        sources[position] = heappop(released) % k
    return sources


def _ranks(table: np.ndarray) -> np.ndarray:
    """For each position of the table, how many earlier positions hold the same value."""
    ranks = np.empty_like(table)
    for value in np.unique(table):
        selected = table == value
        ranks[selected] = np.arange(selected.sum())
    return ranks


def _integer_proportions(weights: Sequence[Fraction], sources: int) -> list[int]:
    """The smallest whole numbers with the proportions of the weights."""
    weights = [Fraction(weight) for weight in weights]
    if len(weights) != sources:
        raise ValueError(f"{len(weights)} weights for {sources} sources: give one for each")
    if min(weights) <= 0:
        raise ValueError(f"weight {min(weights)}: weights must be above 0; leave out a source that is not wanted")
    scale = lcm(*(weight.denominator for weight in weights))
    proportions = [int(weight * scale) for weight in weights]
    proportions = [proportion // gcd(*proportions) for proportion in proportions]
    if sum(proportions) > LONGEST_PERIOD:
        raise ValueError(f"weights {', '.join(map(str, weights))} have a period of {sum(proportions):,} samples, more than "
                         f"{LONGEST_PERIOD:,}: use rounder weights")
    return proportions
