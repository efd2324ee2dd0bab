"""How a batch is cut into micro-batches, and what happens where one does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch


class MicroBatches:
    """The number of micro-batches per step. It doubles when memory runs out, so the global batch stays the same.

        for attempt in micro_batches.attempts():        # runs once; again with smaller micro-batches when memory has run out
            with attempt:
                ...                                     # forward and backward passes of `attempt.count` micro-batches

    count       number of micro-batches at first
    most        the largest possible number: one sample each, of this process's part of the batch
    agree       a process's own result -> whether any process ran out of memory; all processes must use the same count
    start_over  called with the new count before another attempt: drops gradients, prints a message
    give_up     makes the exception for when even single samples do not fit
    retry       False: out of memory ends the run (with a sharded network the other processes would wait forever)
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
    """Whether an error says that a GPU or the CPU is out of memory."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in words))
