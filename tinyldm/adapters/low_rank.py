"""Low-rank changes of weights: their dense form, and the best approximation of a change at a given rank.

A change that is a product U D of low rank needs no decomposition of a matrix of the weight's size: with U = Q R and D^T = P T from
two thin QR decompositions, its singular values are those of R T^T, which is rank x rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 4           # a dense change is decomposed completely unless its smaller side is more than this many times the rank


@dataclass(frozen=True)
class LowRank:
    """scale * up @ down, a change of one weight. down [rank, in] or [rank, in, k, k]; up [out, rank] or [out, rank, 1, 1]."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The change in the weight's shape [out, in, ...], float32, on the device of `weight` where that is given."""
        device = self.down.device if weight is None else weight.device
        down, up = (factor.to(device, torch.float32).flatten(1) for factor in (self.down, self.up))
        return self.scale * (up @ down).view(self.shape)

    def like(self, shape: Sequence[int]) -> LowRank:
        """The same change of a weight of this shape with as many numbers: a linear layer stored as a 1x1 convolution, or the reverse."""
        return LowRank(self.down.reshape(self.rank, *shape[1:]), self.up.reshape(shape[0], self.rank, *[1] * (len(shape) - 2)), self.scale)

    def to(self, dtype: torch.dtype) -> LowRank:
        return LowRank(self.down.to(dtype), self.up.to(dtype), self.scale)


@dataclass(frozen=True)
class Kept:
    """A change of lower rank."""

    change: LowRank
    energy: float           # the fraction of the squared Frobenius norm that it keeps, 0 to 1
    total: float            # that norm, before


def singular(change: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a low-rank change: left [out, r], values [r], right [r, rest]; float32."""
    left, upper = torch.linalg.qr(change.up.float().flatten(1))
    right, lower = torch.linalg.qr(change.down.float().flatten(1).T)
    u, s, v = torch.linalg.svd(change.scale * upper @ lower.T)
    return left @ u, s, v @ right.T


def truncated(change: LowRank, rank: int | None = None, energy: float | None = None) -> Kept:
    """The best approximation of a change: at most of this rank, or of the lowest rank that keeps this fraction of its energy."""
    left, values, right = singular(change)
    return _kept(left, values, right, change.shape, float(values.square().sum()), rank, energy)


def approximated(delta: Tensor, rank: int) -> Kept:
    """The best approximation of a dense change [out, in, ...] of at most this rank. Large ones are decomposed by a randomised method
    with four power iterations (arXiv:0909.4061, Alg. 4.4), from fixed random numbers."""
    matrix = delta.float().flatten(1)
    if min(matrix.shape) <= EXACT * rank:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=min(2 * rank + 8, *matrix.shape), niter=4)
        right = right.T
    return _kept(left, values, right, tuple(delta.shape), float(matrix.square().sum()), rank, None)


def _kept(left: Tensor, values: Tensor, right: Tensor, shape: tuple[int, ...], total: float, rank: int | None,
          energy: float | None) -> Kept:
    parts = values.double().square().cumsum(0) / max(total, torch.finfo(torch.float64).tiny)
    if energy is not None:
        rank = int((parts < energy * (1 - 1e-6)).sum()) + 1
    noise = values[0] * max(left.shape[0], right.shape[1]) * torch.finfo(torch.float32).eps       # as in torch.linalg.matrix_rank
    rank = max(1, min(rank, int((values > noise).sum())))
    down, up = right[:rank].reshape(rank, *shape[1:]), (left[:, :rank] * values[:rank]).reshape(shape[0], rank, *[1] * (len(shape) - 2))
    return Kept(LowRank(down.contiguous(), up.contiguous(), 1.0), min(1.0, float(parts[rank - 1])) if total else 1.0, total)
