"""How a batch is cut into micro-batches, and what happens where one does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch


class MicroBatches:
    """The number of micro-batches per step, doubled where memory does not suffice: the global batch stays the same.

        for attempt in micro_batches.attempts():        # one; after out of memory another, in smaller micro-batches
            with attempt:
                ...                                     # forward and backward of `attempt.count` micro-batches

    count       micro-batches to begin with
    most        samples of this process, so the largest number there can be
    agree       whether any process is out of memory (all of them must cut alike)
    start_over  called before another attempt: drop gradients, tell the user. Its argument is the new count
    give_up     what to raise where even single samples do not fit
    retry       False: an error ends the run (sharded networks leave the other processes waiting)
    """

    def __init__(self, count: int, most: int, agree: Callable[[bool], bool], start_over: Callable[[int], None],
                 give_up: Callable[[], Exception], retry: bool = True):
        self.count, self.most = count, most
        self.agree, self.start_over, self.give_up, self.retry = agree, start_over, give_up, retry
        self.failed = False

    def attempts(self) -> Iterator[MicroBatches]:
        while True:
            self.failed = False
            yield self
            if not self.agree(self.failed):
                return
            if self.count == self.most:
                raise self.give_up()
            self.count = min(2 * self.count, self.most)
            self.start_over(self.count)

    def __enter__(self) -> MicroBatches:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> bool:
        self.failed = self.retry and error is not None and out_of_memory(error)
        return self.failed


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says, on a GPU or a CPU."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in words))
