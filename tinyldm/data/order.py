"""Which samples make up batch `step`: a pure function of (seed, step), whatever the number of samples or processes.

Nothing is shuffled and nothing remembered: a keyed permutation says which sample stands at any place of any epoch, so a run
resumes at any step without replaying, and ten million samples take no memory. Sources are mixed by a table of one
period, made by the rule for the chairman assignment problem (R. Tijdeman, Discrete Mathematics 32, 1980).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush
from math import gcd, isqrt, lcm

import numpy as np

Size = tuple[int, int]
ROUNDS = 8
LONGEST_PERIOD = 1_000_000
SAMPLES, BATCHES = 0, 1                     # what is permuted: streams of random numbers that share nothing


class Order:
    """The order of training.

    ranges: for each source and latent size the flat numbers of its samples (`Cache.ranges`).
    weights: one positive number per source, in any scale; None makes all sources one pool, drawn evenly.

    One size in all: position p = step * batch_size + i of the global order belongs to a source, whose positions run
    through epoch after epoch of its samples, each in an order of its own; within an epoch every sample comes exactly once.

    Several sizes: a batch is of one size (and, with weights, of one source), and the same holds of whole batches. In an
    epoch a size of n samples gives n // batch_size batches; the samples left over differ from epoch to epoch.

    Mixing: in the first p positions (or batches), and from the start of any period, the number taken from a source differs from
    p * weight by at most 1 - 1 / (2k - 2) with k sources. Any window is a difference of two such stretches: it is
    within 1 of its due with two sources, and within 2 - 1 / (k - 1) with more. (Within 1 in any window is impossible
    for most weights of three and more sources.)

    ValueError: nothing to draw, a size too small for a batch everywhere, or weights with too long a period.
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
            pools, shares = [ranges], [1]
        else:
            pools, shares = [[source] for source in ranges], _shares(weights, len(ranges))
        self._pools = [[_Group([source[size] for source in pool if size in source]) for size in self.sizes] for pool in pools]
        self._turns = chairmen(shares)                          # whose turn it is at each place of a period
        self._shares = np.array(shares)
        self._ranks = _ranks(self._turns)                       # how many turns it has had before in the period
        self._batches = [np.array([group.count // batch_size for group in pool]) for pool in self._pools]
        for number, (pool, batches) in enumerate(zip(self._pools, self._batches)):
            which = f"source {number + 1} of {len(pools)}" if self.weighted else "the cache"
            if not any(group.count for group in pool):
                raise ValueError(f"{which} holds no samples: leave it out, or prepare it again")
            if len(self.sizes) > 1 and not batches.any():
                largest = max(group.count for group in pool)
                raise ValueError(f"no size of {which} has the {batch_size} samples of a batch (a batch is of one size, the "
                                 f"largest has {largest}): use --batch-size {largest} or less, or fewer sizes")

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps until every sample (several sizes: every full batch) has come once; None with weights: sources differ."""
        if self.weighted:
            return None
        return -(-self._pools[0][0].count // self.batch_size) if len(self.sizes) == 1 else int(self._batches[0].sum())

    @property
    def never_drawn(self) -> list[tuple[Size, int]]:
        """(size, samples) of what is never drawn, because a batch is of one size and these are fewer than one needs."""
        if len(self.sizes) == 1:
            return []
        counts = [sum(pool[i].count for pool in self._pools if pool[i].count < self.batch_size) for i in range(len(self.sizes))]
        return [(size, count) for size, count in zip(self.sizes, counts) if count]

    def batch(self, step: int) -> np.ndarray:
        """Flat sample numbers int64 [batch_size] of global batch `step` (0, 1, ...), all of one size."""
        if len(self.sizes) > 1:
            return self._bucket(step)
        pools, turns = self._mix(step * self.batch_size + np.arange(self.batch_size))
        numbers = np.empty(self.batch_size, np.int64)
        for pool in np.unique(pools):
            mine = pools == pool
            numbers[mine] = self._samples(int(pool), 0, turns[mine])
        return numbers

    def _bucket(self, step: int) -> np.ndarray:
        pools, turns = self._mix(np.array([step]))
        pool = int(pools[0])
        ends = np.cumsum(self._batches[pool])
        epoch, place = divmod(int(turns[0]), int(ends[-1]))
        place = int(permute(np.array([place]), int(ends[-1]), self.seed, BATCHES, pool, 0, epoch)[0])
        size = int(np.searchsorted(ends, place, side="right"))
        batch = place - int(ends[size] - self._batches[pool][size])
        first = epoch * self._pools[pool][size].count + batch * self.batch_size
        return self._samples(pool, size, first + np.arange(self.batch_size))

    def _mix(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the whole order -> whose they are, and which place of that pool's own order each is."""
        periods, places = np.divmod(places, len(self._turns))
        pools = self._turns[places]
        return pools, periods * self._shares[pools] + self._ranks[places]

    def _samples(self, pool: int, size: int, places: np.ndarray) -> np.ndarray:
        group = self._pools[pool][size]
        epochs, places = np.divmod(places, group.count)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            places[now] = permute(places[now], group.count, self.seed, SAMPLES, pool, size, int(epoch))
        return group.numbers(places)


class _Group:
    """The samples of one pool and one size, as the ranges of flat numbers that they are."""

    def __init__(self, ranges: list[range]):
        lengths = np.array([len(numbers) for numbers in ranges], np.int64)
        self.ends = np.cumsum(lengths)
        self.shift = np.array([numbers.start for numbers in ranges], np.int64) - (self.ends - lengths)
        self.count = int(lengths.sum())

    def numbers(self, places: np.ndarray) -> np.ndarray:
        return places + self.shift[np.searchsorted(self.ends, places, side="right")]


def permute(places: np.ndarray, n: int, seed: int, *stream: int) -> np.ndarray:
    """Where a keyed permutation of 0 .. n - 1 sends `places` (int64), in constant memory.

    A Feistel network on a grid of a x b >= n places, a and b near sqrt(n): each round turns one coordinate by a hash of
    the other. Who lands outside 0 .. n - 1 walks on (J. Black, P. Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _keys(seed, stream)

    def walk(places: np.ndarray) -> np.ndarray:
        high, low = np.divmod(places, np.uint64(a))                     # below b, below a
        for i in range(0, ROUNDS, 2):
            low = (low + _hash(high, keys[i])) % np.uint64(a)
            high = (high + _hash(low, keys[i + 1])) % np.uint64(b)
        return high * np.uint64(a) + low

    places = walk(places.astype(np.uint64))
    while (outside := places >= n).any():
        places[outside] = walk(places[outside])
    return places.astype(np.int64)


@lru_cache(maxsize=256)
def _keys(seed: int, stream: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(seed, spawn_key=stream).generate_state(ROUNDS, np.uint64)


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """uint64 -> 32 well-mixed bits as uint64 (the finaliser of MurmurHash3); half the bits leave room for a sum."""
    x = x ^ key
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x >> np.uint64(32)


def chairmen(shares: Sequence[int]) -> np.ndarray:
    """Whose turn it is at each of sum(shares) places, so that no prefix is far from its due: int64 [sum(shares)].

    With k sources and c = 1 / (2k - 2), a source that has had x of its turns after n places keeps n * share / sum within 1 - c
    of x. That lets its turn number x come no earlier than (x + c) / weight and no later than (x + 1 - c) / weight;
    Tijdeman proved that all turns can be so placed, and then taking the most urgent of those allowed places them.
    """
    total, k = sum(shares), len(shares)
    if k == 1:
        return np.zeros(total, np.int64)
    scale = 2 * k - 2
    earliest, job = [], []
    for source, share in enumerate(shares):
        turn = np.arange(share, dtype=np.int64)
        earliest.append(-(-(turn * scale + 1) * total // (scale * share)))
        latest = ((turn + 1) * scale - 1) * total // (scale * share)
        job.append(latest * k + source)
    order = np.argsort(np.concatenate(earliest), kind="stable")
    coming = list(zip(np.concatenate(earliest)[order].tolist(), np.concatenate(job)[order].tolist()))[::-1]
    allowed: list[int] = []
    turns = np.empty(total, np.int64)
    for place in range(total):
        while coming and coming[-1][0] <= place + 1:
            heappush(allowed, coming.pop()[1])
        turns[place] = heappop(allowed) % k
    return turns


def _ranks(turns: np.ndarray) -> np.ndarray:
    """For each place of the table how often the same source stands before it."""
    ranks = np.empty_like(turns)
    for source in np.unique(turns):
        mine = turns == source
        ranks[mine] = np.arange(mine.sum())
    return ranks


def _shares(weights: Sequence[Fraction], sources: int) -> list[int]:
    """Weights as the smallest integers of the same proportions."""
    weights = [Fraction(weight) for weight in weights]
    if len(weights) != sources:
        raise ValueError(f"{len(weights)} weights for {sources} sources: give one for each")
    if min(weights) <= 0:
        raise ValueError(f"weight {min(weights)}: weights are above 0; leave out a source that is not wanted")
    scale = lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * scale) for weight in weights]
    shares = [share // gcd(*shares) for share in shares]
    if sum(shares) > LONGEST_PERIOD:
        raise ValueError(f"weights {', '.join(map(str, weights))} repeat only every {sum(shares):,} samples: use rounder ones, "
                         f"that repeat within {LONGEST_PERIOD:,}")
    return shares
