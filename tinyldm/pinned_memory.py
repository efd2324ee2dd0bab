"""Pinned (page-locked) host memory, between which and a GPU copies need not be waited for."""

from __future__ import annotations

from typing import TextIO

import torch
from torch import Tensor


class PinnedMemory:
    """Pinned host memory in blocks that hold many tensors, for copies of a GPU's tensors in checkpoints, which use it again and again,
    and for weights that wait for a GPU. torch rounds each pinned tensor up to a power of two and never returns it to the system: the
    many tensors of a U-Net would take 1.6 times their size. (Batches, which are copied to a GPU, have few shapes, so torch's own
    pinned memory serves them: device.pin.) Where the system grants no more pinned memory, as happens in WSL2 and some containers,
    ordinary memory takes its place."""

    BLOCK = 2**28               # bytes of the largest blocks that hold several tensors; all sizes are powers of two

    def __init__(self, contents: str = "checkpoints", cost: str = "training waits a little longer for each", out: TextIO | None = None):
        """For the note that the system refuses: what the memory is for, what it costs to do without, and where to print (None: stdout)."""
        self.contents, self.cost, self.out = contents, cost, out
        self.blocks: list[Tensor] = []          # uint8
        self.used: list[int] = []               # bytes in each
        self.refused = False

    def clear(self) -> None:
        """The tensors that were handed out are needed no more."""
        self.used = [0] * len(self.blocks)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor on the host, of the same shape and dtype, with any values."""
        size = -(-tensor.nbytes // 64) * 64                     # 64: aligned for every dtype
        fitting = (i for i, block in enumerate(self.blocks) if self.used[i] + size <= len(block))
        if (i := next(fitting, None)) is None:
            if not self._grow(size):
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            i = len(self.blocks) - 1
        start = self.used[i]
        self.used[i] += size
        return self.blocks[i][start:start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _grow(self, size: int) -> bool:
        """Add a block for at least `size` bytes, twice as large as the one before it -> whether that was possible."""
        if self.refused:
            return False
        size = max(size, min(self.BLOCK, 2 * len(self.blocks[-1]) if self.blocks else 2**20))
        try:
            self.blocks.append(torch.empty(2 ** (size - 1).bit_length(), dtype=torch.uint8, pin_memory=True))
        except RuntimeError as error:
            self.refused = True
            print(f"no more pinned memory for {self.contents} ({' '.join(str(error).split())[:100]}): ordinary memory is used, "
                  f"and {self.cost}", file=self.out, flush=True)
            return False
        self.used.append(0)
        return True
