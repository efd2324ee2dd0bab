"""How a batch is cut into micro-batches, and what happens where one does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tinyldm.device import first_line, out_of_memory


class MicroBatches:
    """The number of micro-batches per step. It doubles when memory runs out, so the global batch stays the same.

        for attempt in micro_batches.attempts():        # runs once; again with smaller micro-batches when memory has run out
            with attempt:                               # catches out-of-memory errors only
                ...                                     # forward and backward passes of `attempt.count` micro-batches
            attempt.failed = ...                        # whether that happened in any process: all must use the same count

    count       number of micro-batches at first
    most        the largest possible number: one sample each, of this process's part of the batch
    sample      what a single sample is, for the error message: "a picture of 256 px"
    start_over  called with the new count before another attempt: drops gradients, prints a message
    retry       False: out of memory ends the run (with a sharded network the other processes would wait forever)
    """

    def __init__(self, count: int, most: int, sample: str, start_over: Callable[[int], None], retry: bool = True):
        self.count, self.most, self.sample, self.start_over, self.retry = count, most, sample, start_over, retry
        self.failed, self.words = False, ""                    # words: the error's own

    def attempts(self) -> Iterator[MicroBatches]:
        """ValueError where even single samples do not fit."""
        while True:
            self.failed = False
            yield self
            if not self.failed:
                return
            if self.count == self.most:
                raise ValueError(f"out of memory with {self.sample} alone: use a smaller network, --grad-checkpointing, or --stages of "
                                 f"fewer pixels ({self.words or 'in another process'})")
            self.count = min(2 * self.count, self.most)
            self.start_over(self.count)

    def __enter__(self) -> MicroBatches:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> bool:
        self.failed = self.retry and error is not None and out_of_memory(error)
        if self.failed:
            self.words = first_line(error)
        return self.failed
