"""Byte ranges of many files, read by position (pread) with few files open.

Why not memory maps: in shuffled order on a cold disk, np.load(mmap_mode="r") reads 30 times slower, because every page fault
waits for the disk alone and pulls in its neighbours, whereas here the kernel hears of all reads of a batch before the first.
The price: with all files in the page cache a memory map is twice as fast (434,915 against 213,502 samples/s; both figures from
benchmarks/results/cpu-2-cores.md), which does not matter as long as a training step takes longer than reading its batch.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from threading import Lock

import numpy as np

from tinyldm.data.shard import AGAIN


class Files:
    """Reads byte ranges of many files and keeps the most recently used files open. A lock lets one thread read at a time."""

    def __init__(self):
        self.open: OrderedDict = OrderedDict()
        self.lock = Lock()
        self.limit = _open_file_limit()

    def read(self, path: Callable[[int], str], numbers: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """From each file path(numbers[i]), sizes[i] bytes beginning at offsets[i]; concatenated over i: uint8 [sum of sizes].

        ValueError: a file is missing or too short.
        """
        ends = np.cumsum(sizes)
        out = np.empty(int(sizes.sum()), np.uint8)
        view = memoryview(out)
        order = np.lexsort((offsets, numbers))
        order = order[sizes[order] > 0]
        pieces = list(zip(*(values[order].tolist() for values in (numbers, offsets, ends - sizes, ends))))
        with self.lock:
            if hasattr(os, "posix_fadvise"):                    # announce all reads first: a disk serves many at the cost of one
                for file, offset, start, end in self._opened(path, pieces):
                    os.posix_fadvise(file.fileno(), offset, end - start, os.POSIX_FADV_WILLNEED)
            for file, offset, start, end in self._opened(path, pieces):
                while start < end:                              # a read may return fewer bytes than were requested
                    count = _read_at(file, view[start:end], offset)
                    if not count:
                        raise ValueError(f"{file.name} ends before byte {offset:,}: delete {Path(file.name).parent} "
                                         "and run prepare.py again")
                    start, offset = start + count, offset + count
        return out

    def _opened(self, path: Callable[[int], str], pieces: list[tuple[int, ...]]) -> Iterator[tuple]:
        """Replace the file number of each piece by the open file. The pieces come sorted by file number."""
        for number, group in groupby(pieces, itemgetter(0)):
            file = self._get(path(number))
            for _, *span in group:
                yield file, *span

    def _get(self, path: str):
        if path in self.open:
            self.open.move_to_end(path)
            return self.open[path]
        try:
            file = open(path, "rb", buffering=0)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: {AGAIN}") from None
        if hasattr(os, "posix_fadvise"):                        # otherwise readahead also fetches the neighbours of every row
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self.open[path] = file
        if len(self.open) > self.limit:
            self.open.popitem(last=False)[1].close()
        return file

    def __del__(self):
        for file in self.open.values():
            file.close()


def _read_at(file, view: memoryview, offset: int) -> int:
    """Read up to len(view) bytes at `offset` into `view`; returns how many."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [view], offset)
    file.seek(offset)                                           # the caller holds the lock, so no other thread seeks in between
    return file.readinto(view)


def _open_file_limit() -> int:
    """How many files to keep open: a quarter of the system's limit, between 8 and 512."""
    try:
        import resource
    except ImportError:
        return 128
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 512 if soft < 0 else max(8, min(512, soft // 4))
