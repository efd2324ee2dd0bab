"""Optimizers: AdamW (fused), and Muon for the weight matrices inside the blocks.

Muon (K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) replaces a matrix's
momentum by the nearest semi-orthogonal matrix, so that every direction moves equally far; biases, norms,
embeddings, first and last layers stay with AdamW. Matrices of one shape are orthogonalised as one batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tinyldm.config import OptimisationConfig
from tinyldm.training.distributed import World, local, part_of, sharded, whole
from tinyldm.training.packing import buckets

QUINTIC = (3.4445, -4.7750, 2.0315)
BYTES_AT_ONCE = 256 * 2**20                                # of matrices that are orthogonalised at the same time


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """[k, m, n] -> about U V^T of each matrix's singular value decomposition U S V^T, in the dtype of working_dtype(m, n).

    Quintic Newton-Schulz iteration x <- (a + b G + c G^2) x, G = x x^T, with Muon's coefficients, which trade
    accuracy for speed: the singular values end between about 0.7 and 1.2. Near-square matrices run it in bfloat16,
    as is customary. Long ones keep to the small side: the factors commute with G, so their product is built from
    G alone, then multiplied with the long matrix once (in float32, since G squares the condition number).
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(working_dtype(*x.shape[1:]))
    if x.dtype == torch.bfloat16:
        x = _newton_schulz(x, steps)
    else:
        with tf32(x.device):
            x = _newton_schulz_long(x, steps)
    return x if wide else x.mT


def working_dtype(rows: int, columns: int) -> torch.dtype:
    """The precision in which a matrix of this size is orthogonalised: bfloat16, or float32 where one side is twice the other."""
    return torch.float32 if max(rows, columns) >= 2 * min(rows, columns) else torch.bfloat16


# Both iterations leave scaling and adding to the products (baddbmm), which round once, after adding in float32: with operations of
# their own the bfloat16 one had twice the error, 2.5 % instead of 1.2 % of the result's norm, and took twice as long.


def _newton_schulz(x: Tensor, steps: int) -> Tensor:
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)                                          # [k, m, m]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_long(x: Tensor, steps: int) -> Tensor:
    a, b, c = QUINTIC
    gram, product = torch.bmm(x, x.mT), None                               # [k, m, m]
    for step in range(steps):
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)           # the factor is a + inner
        if product is None:
            product = inner.clone()
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, inner, product, beta=a)
        if step < steps - 1:
            half = torch.baddbmm(gram, inner, gram, beta=a)
            gram = torch.baddbmm(half, half, inner, beta=a)
    return torch.bmm(product, x)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Inside, a GPU multiplies float32 matrices in TF32 (10 bits of mantissa, sums in float32), several times faster. With it the
    error of _newton_schulz_long is 0.2 % of the result's norm for matrices of random numbers and 2 % at a condition number of 1e5,
    a fifth of the bfloat16 iteration's, because the largest term, a times the matrix, stays outside the products."""
    usual = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(usual)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. Parameters [out, ...] are treated as matrices [out, rest].

    lr: the root-mean-square of a matrix's update is about 0.2 * lr, whatever its shape, so AdamW's learning rates and weight
    decays fit (arXiv:2502.16982, Eq. 4).

    world: the processes that share the work. Each orthogonalises some of the matrices and sends the results to the others, so all
    apply the same bits. Sharded matrices are gathered before that, and each process applies its part of their updates.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, world: World | None = None):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.world = world or World()
        # After tf32() torch calls the usual precision "ieee" and not "none" any more, which is a part of the key of torch.compile's cache
        # on the disk. From the start on, so that what is compiled before the first step is found after it.
        torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())

    @torch.no_grad()
    def step(self) -> None:
        """Uses up the gradients: it overwrites them, which saves a copy."""
        for group in self.param_groups:
            params = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
            for bucket in buckets(params, BYTES_AT_ONCE):      # so that the memory needed does not grow with the network
                self.step_bucket(bucket, group)

    def step_bucket(self, params: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        by_shape, updates, first = defaultdict(list), [], 0
        for p in params:
            by_shape[p.shape, sharded(p)].append(p)
        for same in by_shape.values():
            updates.append(self.directions(self.nesterov(same, group["momentum"]), first))
            first += len(same)
        self.world.all_gather([update for stack in updates for update in stack])
        for same, stack in zip(by_shape.values(), updates):
            own, (rows, columns) = parts(same), stack.shape[1:]
            if group["weight_decay"]:
                torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
            moves = stack.to(own[0].dtype).reshape(len(same), *same[0].shape).unbind()
            moves = [part_of(move, p) for move, p in zip(moves, same)]
            torch._foreach_add_(own, moves, alpha=-0.2 * math.sqrt(max(rows, columns)) * group["lr"])

    def nesterov(self, params: Sequence[nn.Parameter], momentum: float) -> Sequence[Tensor]:
        """For parameters of one shape: update their momentum with their gradients, and overwrite the gradients by Nesterov's
        direction, what the momentum would be after the same gradient once more. -> these; of sharded parameters the whole tensors"""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients, buffers = [p.grad for p in params], parts([self.state[p]["momentum_buffer"] for p in params])
        torch._foreach_lerp_(buffers, parts(gradients), 1 - momentum)
        torch._foreach_lerp_(parts(gradients), buffers, momentum)
        return whole(torch.stack(gradients)).unbind() if sharded(gradients[0]) else gradients

    def directions(self, momenta: Sequence[Tensor], first: int) -> Tensor:
        """k momenta of one shape, orthogonalised, [k, rows, columns]. first: how many others come before them. Of all of these,
        process i of n computes the i-th, (i + n)-th, ...; the rest of the result is arbitrary."""
        if self.world.size == 1:
            return orthogonalise(torch.stack(momenta).flatten(2))
        own, (rows, *rest) = slice((self.world.rank - first) % self.world.size, None, self.world.size), momenta[0].shape
        result = momenta[0].new_empty(len(momenta), rows, math.prod(rest), dtype=working_dtype(rows, math.prod(rest)))
        if mine := momenta[own]:
            result[own] = orthogonalise(torch.stack(mine).flatten(2))
        return result


def parts(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """This process's parts of sharded tensors; ordinary tensors as they are."""
    return [local(tensor) if sharded(tensor) else tensor for tensor in tensors]


def make_optimizers(parameters: Mapping[str, nn.Parameter], matrices: Collection[str],
                    settings: OptimisationConfig, world: World | None = None,
                    betas: tuple[float, float] = (0.9, 0.95)) -> list[torch.optim.Optimizer]:
    """[AdamW] or, for --optimizer muon, [AdamW, Muon], together covering parameters (name -> parameter) once each.

    matrices: the names of the parameters that Muon may train (model.muon_matrices). Muon's update of a matrix has the root mean
    square that AdamW's would have at 0.2 of the learning rate, whatever its shape, so the two learning rates are of the same order;
    they are separate settings because the best one for embeddings, norms and biases need not be the best for matrices. betas: AdamW's.
    With --text-lr both rates are lower (or higher) in text encoders by the same factor.
    """
    def groups(params: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
        kinds: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)      # fused AdamW takes no mixture of sharded and whole
        for name, p in params.items():
            kinds[bool(settings.text_lr) and name.startswith("text"), sharded(p)].append(p)
        return [{"params": kinds[kind], "lr": lr * settings.text_lr / settings.lr if kind[0] else lr} for kind in sorted(kinds)]

    inner = {name: p for name, p in parameters.items() if settings.optimizer == "muon" and name in matrices}
    outer = {name: p for name, p in parameters.items() if name not in inner}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups(outer, settings.lr), lr=settings.lr, betas=betas, weight_decay=settings.weight_decay, fused=True)]
    if inner:
        optimizers.append(Muon(groups(inner, settings.muon_lr), lr=settings.muon_lr, weight_decay=settings.weight_decay, world=world))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of every parameter group to its peak times the factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
