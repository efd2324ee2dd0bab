"""Batches of cached latents and token ids for training: any step at once, or a run of them made ahead.

Everything about a batch is a function of (seed, step): which samples, which view and which caption of each, and the noise
where the autoencoder's standard deviations are cached. It is drawn for the whole global batch, of which each
process takes its part: the number of processes changes nothing. Reading is quick enough for one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count
from queue import Empty, Queue
from threading import Event, Thread
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyldm.data.cache import Cache
from tinyldm.data.order import Order, Size

DRAWS = 5                   # the stream of random numbers that is the loader's


class Batch(NamedTuple):
    samples: np.ndarray     # int64 [b]: flat numbers in the cache
    latents: Tensor         # float32 [b, c, h, w], standardised
    tokens: Tensor          # int64 [b, L]


def keep_back(ranges: Sequence[dict[Size, range]], count: int) -> tuple[list[dict[Size, range]], np.ndarray]:
    """Ranges of flat sample numbers -> the same without the last `count` of the largest (a tenth of it at most), and those."""
    source, size = max(((i, size) for i, sizes in enumerate(ranges) for size in sizes), key=lambda at: len(ranges[at[0]][at[1]]))
    whole = ranges[source][size]
    count = min(count, len(whole) // 10)
    left = [dict(sizes) for sizes in ranges]
    left[source][size] = whole[:len(whole) - count]
    return left, np.arange(whole.stop - count, whole.stop)


class Loader:
    """This process's share of every global batch of a cache.

    batch_size: of the global batch. weights: one per source, see `Order`. caption_weights: one per caption key, see
    `Cache.tokens`. rank, world: this process and how many there are. pin: put batches in page-locked memory.
    depth: how many batches `run` keeps ready. hold_out: how many samples are never drawn, for validation (`held_out`).

    ValueError: the cache has no tokens of this tokenizer, too few caption weights, or nothing for a rank to do.
    """

    def __init__(self, cache: Cache, tokenizer_fingerprint: str, *, batch_size: int, seed: int,
                 weights: Sequence[Fraction] | None = None, caption_weights: Sequence[float] = (1.0,), rank: int = 0,
                 world: int = 1, pin: bool = False, depth: int = 4, hold_out: int = 0):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} processes: ranks run from 0 to {world - 1}")
        if batch_size < world:
            raise ValueError(f"a global batch of {batch_size} leaves some of {world} processes without a sample: "
                             f"use --batch-size {world} or more")
        if depth < 1:
            raise ValueError(f"depth {depth}: keep at least 1 batch ready")
        cache.check_tokens(tokenizer_fingerprint)
        cache.check_weights(caption_weights)
        ranges, self.held_out = keep_back(cache.ranges, hold_out)
        self.order = Order(ranges, batch_size, seed, weights)
        self.cache, self.fingerprint, self.seed, self.pin, self.depth = cache, tokenizer_fingerprint, seed, pin, depth
        self.caption_weights = tuple(caption_weights)
        part = np.array_split(np.arange(batch_size), world)[rank]
        self.part = slice(int(part[0]), int(part[-1]) + 1)

    def batch(self, step: int) -> Batch:
        """This rank's share of global batch `step`: np.array_split of it over the ranks."""
        samples = self.order.batch(step)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(DRAWS, step))))
        views = rng.integers(self.cache.shape[0], size=len(samples))
        choose = rng.random(len(samples))
        mine = samples[self.part]
        tokens = torch.from_numpy(self.cache.tokens(mine, self.fingerprint, choose[self.part], self.caption_weights))
        latents = torch.from_numpy(self.cache.latents(mine, views[self.part])).float()      # [b, parts, c, h, w]
        if latents.shape[1] == 2:
            noise = rng.standard_normal((len(samples), *latents.shape[2:]), np.float32)[self.part]
            latents = torch.addcmul(latents[:, 0], latents[:, 1], torch.from_numpy(noise))
        else:
            latents = latents[:, 0]
        if self.pin:
            latents, tokens = latents.pin_memory(), tokens.pin_memory()
        return Batch(mine, latents, tokens)

    def run(self, start: int, stop: int | None = None) -> Iterator[Batch]:
        """The batches of steps start .. stop - 1 (None: without end), made ahead by one thread, which ends with the iterator.

        What goes wrong in the thread is raised here, after the batches before it.
        """
        steps = count(start) if stop is None else range(start, stop)
        ready: Queue = Queue(self.depth)
        left = Event()

        def make() -> None:
            try:
                for step in steps:
                    ready.put(self.batch(step))
                    if left.is_set():
                        return
            except BaseException as error:
                ready.put(error)

        thread = Thread(target=make, name="loader", daemon=True)    # daemon: a forgotten iterator must not keep a program alive
        thread.start()
        try:
            for _ in (count() if stop is None else range(start, stop)):
                made = ready.get()
                if isinstance(made, BaseException):
                    raise made
                yield made
        finally:
            left.set()
            while thread.is_alive():                # it may be waiting for room: make some
                try:
                    ready.get(timeout=0.01)
                except Empty:
                    pass
            thread.join()
