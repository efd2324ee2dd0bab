"""Pieces of many files, read by position: no memory maps, few files open, nothing read but what is asked for."""

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
    """Reads pieces of many files by their positions, with few of them open. Threads take turns."""

    def __init__(self):
        self.open: OrderedDict = OrderedDict()
        self.lock = Lock()
        self.limit = _handles()

    def read(self, path: Callable[[int], str], which: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Of the files path(which[i]) the sizes[i] bytes at offsets[i], end to end: uint8 [sum of sizes]."""
        ends = np.cumsum(sizes)
        out = np.empty(int(sizes.sum()), np.uint8)
        view = memoryview(out)
        order = np.lexsort((offsets, which))
        order = order[sizes[order] > 0]
        pieces = list(zip(*(values[order].tolist() for values in (which, offsets, ends - sizes, ends))))
        with self.lock:
            if hasattr(os, "posix_fadvise"):                    # all at once: a disk serves many requests in the time of one
                for file, offset, start, end in self._opened(path, pieces):
                    os.posix_fadvise(file.fileno(), offset, end - start, os.POSIX_FADV_WILLNEED)
            for file, offset, start, end in self._opened(path, pieces):
                while start < end:                              # a read may end early
                    got = _read_at(file, view[start:end], offset)
                    if not got:
                        raise ValueError(f"{file.name} ends before byte {offset:,}: delete {Path(file.name).parent} "
                                         "and run prepare.py again")
                    start, offset = start + got, offset + got
        return out

    def _opened(self, path: Callable[[int], str], pieces: list[tuple[int, ...]]) -> Iterator[tuple]:
        """Pieces sorted by their files, with the file in place of its number."""
        for number, group in groupby(pieces, itemgetter(0)):
            file = self._get(path(number))
            for _, *place in group:
                yield file, *place

    def _get(self, path: str):
        if path in self.open:
            self.open.move_to_end(path)
            return self.open[path]
        try:
            file = open(path, "rb", buffering=0)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: {AGAIN}") from None
        if hasattr(os, "posix_fadvise"):                        # else every row drags its neighbours from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self.open[path] = file
        if len(self.open) > self.limit:
            self.open.popitem(last=False)[1].close()
        return file

    def __del__(self):
        for file in self.open.values():
            file.close()


def _read_at(file, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [view], offset)
    file.seek(offset)                                           # callers hold the lock
    return file.readinto(view)


def _handles() -> int:
    """How many files to hold open: a part of what the system allows."""
    try:
        import resource
    except ImportError:
        return 128
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 512 if soft < 0 else max(8, min(512, soft // 4))
