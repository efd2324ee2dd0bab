"""Batches of cached latents and token ids for training, the batch of any one step; and a thread that makes batches ahead of time.

Everything about a batch is a function of (seed, step): the samples, the view and the caption of each, and the noise where the
cache holds the standard deviations of the autoencoder's posterior. All of it is drawn for the whole global batch, and every
process takes its slice, so the number of processes changes nothing. One thread reads and draws fast enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import count
from queue import Empty, Queue
from threading import Event, Thread
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from tinyldm.data.cache import Cache
from tinyldm.data.order import Order, Size
from tinyldm.random_streams import Stream

T = TypeVar("T")


class Batch(NamedTuple):
    samples: np.ndarray     # int64 [b]: flat numbers in the cache
    latents: Tensor         # float32 [b, c, h, w], standardised
    tokens: Tensor          # int64 [b, L1 + L2 + ...]: token ids of one caption from each tokenizer, side by side
    sizes: Tensor | None = None     # float32 [b, 6], see Cache.picture_sizes; None: the loader was not asked for them
    weights: Tensor | None = None   # float32 [b], factors of the samples' losses; None: all are 1
    # -> uint8 [b, 3, k h, k w], the pictures behind the latents, see Cache.read_pictures. They are only read for objectives that ask.
    pictures: Callable[[], Tensor] | None = None


def keep_back(ranges: Sequence[dict[Size, range]], count: int) -> tuple[list[dict[Size, range]], np.ndarray]:
    """Split off the last `count` samples of the largest range of flat numbers, but at most a tenth of that range.

    Returns the ranges without these samples, and their flat numbers int64 [at most count].
    """
    source, size = max(((i, size) for i, sizes in enumerate(ranges) for size in sizes), key=lambda at: len(ranges[at[0]][at[1]]))
    largest = ranges[source][size]
    count = min(count, len(largest) // 10)
    remaining = [dict(sizes) for sizes in ranges]
    remaining[source][size] = largest[:len(largest) - count]
    return remaining, np.arange(largest.stop - count, largest.stop)


class Loader:
    """This process's slice of every global batch of a cache.

    fingerprints: of the tokenizers, one per text encoder, in the order in which their token ids stand in a batch.
    batch_size: of the global batch. weights: one per source, see `Order`. caption_weights: one per caption key, see
    `Cache.tokens`. rank, world: the number of this process, and how many processes there are. hold_out: how many samples are kept
    for validation (`held_out`) and never drawn. sizes: whether batches tell the sizes of pictures. loss_weights: one per source, a factor
    of its samples' losses; (): all are 1.

    ValueError: the cache has no tokens of one of the tokenizers or does not know the sizes, there are too few caption weights, or
    the batch is too small to give every process a sample.
    """

    def __init__(self, cache: Cache, fingerprints: Sequence[str], *, batch_size: int, seed: int,
                 weights: Sequence[Fraction] | None = None, caption_weights: Sequence[float] = (1.0,), rank: int = 0,
                 world: int = 1, hold_out: int = 0, sizes: bool = False, loss_weights: Sequence[float] = ()):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} processes: ranks run from 0 to {world - 1}")
        if batch_size < world:
            raise ValueError(f"a global batch of {batch_size} leaves some of {world} processes without a sample: "
                             f"use --batch-size {world} or more")
        if isinstance(fingerprints, str) or not fingerprints:
            raise TypeError(f"fingerprints {fingerprints!r}: pass a list with the fingerprint of each tokenizer")
        for fingerprint in fingerprints:
            cache.check_tokens(fingerprint)
        cache.check_weights(caption_weights)
        if sizes:
            cache.check_has_sizes()
        ranges, self.held_out = keep_back(cache.ranges, hold_out)
        self.order = Order(ranges, batch_size, seed, weights)
        self.cache, self.fingerprints, self.seed, self.sizes = cache, tuple(fingerprints), seed, sizes
        self.caption_weights, self.loss_weights = tuple(caption_weights), np.array(loss_weights, np.float32)
        # Of each source, the flat number behind its last sample.
        self.ends = np.cumsum([sum(map(len, source.values())) for source in cache.ranges])
        self.part = own_part(batch_size, rank, world)

    def batch(self, step: int) -> Batch:
        """This rank's slice of global batch `step`, split over the ranks as np.array_split does."""
        samples = self.order.batch(step)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(Stream.LOADER, step))))
        views = rng.integers(self.cache.shape[0], size=len(samples))
        choose = rng.random(len(samples))
        own = samples[self.part]
        tokens = torch.from_numpy(np.concatenate([self.cache.tokens(own, fingerprint, choose[self.part], self.caption_weights)
                                                  for fingerprint in self.fingerprints], axis=1))           # [b, L1 + L2 + ...]
        latents = torch.from_numpy(self.cache.latents(own, views[self.part])).float()       # [b, parts, c, h, w]
        if latents.shape[1] == 2:                                                           # mean and standard deviation
            noise = rng.standard_normal((len(samples), *latents.shape[2:]), np.float32)[self.part]
            latents = torch.addcmul(latents[:, 0], latents[:, 1], torch.from_numpy(noise))
        else:
            latents = latents[:, 0]
        pictures = lambda: torch.from_numpy(self.cache.read_pictures(own, views[self.part])).movedim(3, 1)
        return Batch(own, latents, tokens, self._sizes(own, views[self.part]), self._weights(own), pictures)

    def held_out_batch(self) -> Batch | None:
        """All held-out samples: means of the latents, first views, and of the captions one that is always the same. None: there are
        no such samples."""
        chosen, cache = self.held_out, self.cache
        if not len(chosen):
            return None
        latents = torch.from_numpy(cache.latents(chosen)[:, 0]).float()
        weights = [1.0] * cache.kinds
        tokens = [cache.tokens(chosen, fingerprint, np.zeros(len(chosen)), weights) for fingerprint in self.fingerprints]
        pictures = lambda: torch.from_numpy(cache.read_pictures(chosen)).movedim(3, 1)
        return Batch(chosen, latents, torch.from_numpy(np.concatenate(tokens, axis=1)), self._sizes(chosen, None), self._weights(chosen),
                     pictures)

    def _sizes(self, samples: np.ndarray, views: np.ndarray | None) -> Tensor | None:
        return torch.from_numpy(self.cache.picture_sizes(samples, views)).float() if self.sizes else None

    def _weights(self, samples: np.ndarray) -> Tensor | None:
        if not len(self.loss_weights):
            return None
        return torch.from_numpy(self.loss_weights[np.searchsorted(self.ends, samples, side="right")])


def own_part(batch_size: int, rank: int, world: int) -> slice:
    """The samples of a global batch that process `rank` of `world` takes."""
    part = np.array_split(np.arange(batch_size), world)[rank]
    return slice(int(part[0]), int(part[-1]) + 1)


def prefetch(make: Callable[[int], T], start: int, stop: int | None = None, depth: int = 4) -> Iterator[T]:
    """make(position) for start .. stop - 1 (None: without end), ahead of time, by one thread that ends with the iterator. depth: how
    many results are kept ready; 0: each is made when it is asked for, without a thread.

    An exception in the thread is raised here, after the results that were made before it.
    """
    positions = count(start) if stop is None else range(start, stop)
    if not depth:
        yield from map(make, positions)
        return
    ready: Queue = Queue(depth)
    abandoned = Event()

    def work() -> None:
        try:
            for position in positions:
                ready.put(make(position))
                if abandoned.is_set():
                    return
        except BaseException as error:
            ready.put(error)

    thread = Thread(target=work, name="prefetch", daemon=True)      # daemon: an iterator that is never closed must not keep the
    thread.start()                                                  # program alive
    try:
        for _ in (count() if stop is None else range(start, stop)):
            result = ready.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        abandoned.set()
        while thread.is_alive():                # the thread may be blocked on a full queue: empty it
            try:
                ready.get(timeout=0.01)
            except Empty:
                pass
        thread.join()
