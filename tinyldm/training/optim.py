"""Optimizers: AdamW (fused), and Muon for the weight matrices inside the blocks.

Muon (K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) replaces a matrix's
momentum by the nearest semi-orthogonal matrix, so that every direction moves equally far; biases, norms,
embeddings, first and last layers stay with AdamW. Matrices of one shape are orthogonalised as one batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from tinyldm.config import OptimisationConfig
from tinyldm.training.distributed import local, part_of, sharded, whole

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """[k, m, n] -> about U V^T of each matrix's singular value decomposition U S V^T.

    Quintic Newton-Schulz iteration x <- (a + b G + c G^2) x, G = x x^T, with Muon's coefficients, which trade
    accuracy for speed: the singular values end between about 0.7 and 1.2. Near-square matrices run it in bfloat16,
    as is customary. Long ones keep to the small side: the factors commute with G, so their product is built from
    G alone and meets the long matrix once (in float32, since G squares the condition number).
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = _newton_schulz_long(x, steps) if x.shape[2] >= 2 * x.shape[1] else _newton_schulz(x.bfloat16(), steps)
    return (x if wide else x.transpose(1, 2)).to(matrices.dtype)


def _newton_schulz(x: Tensor, steps: int) -> Tensor:
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)                                       # [k, m, m]
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _newton_schulz_long(x: Tensor, steps: int) -> Tensor:
    a, b, c = QUINTIC
    gram = x @ x.transpose(1, 2)                                           # [k, m, m]
    product = identity = torch.eye(x.shape[1], device=x.device)
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. Parameters [out, ...] are treated as matrices [out, rest].

    lr: the root-mean-square of a matrix's update is about 0.2 * lr, whatever its shape, so AdamW's learning rates and weight
    decays fit (arXiv:2502.16982, Eq. 4).

    Sharded matrices are gathered: every process orthogonalises all of them, and applies its part of the update.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape[0], p.numel() // p.shape[0], sharded(p)].append(p)
            for (rows, columns, _), params in by_shape.items():
                updates = torch.stack([self.nesterov(p, group["momentum"]) for p in params])   # [k, rows, columns]
                updates = orthogonalise(whole(updates)) * (0.2 * math.sqrt(max(rows, columns)))
                for p, update in zip(params, updates):
                    own = local(p)
                    own.mul_(1 - group["lr"] * group["weight_decay"])
                    own.add_(part_of(update.view(p.shape), p), alpha=-group["lr"])

    def nesterov(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum).flatten(1)


def make_optimizers(parameters: Mapping[str, nn.Parameter], matrices: Collection[str],
                    settings: OptimisationConfig) -> list[torch.optim.Optimizer]:
    """[AdamW] or, for --optimizer muon, [AdamW, Muon], together covering parameters (name -> parameter) once each.

    matrices: the names of the parameters that Muon may train (model.muon_matrices). Muon's update of a matrix has the root mean
    square that AdamW's would have at 0.2 of the learning rate, whatever its shape, so the two learning rates are of the same order;
    they are separate settings because the best one for embeddings, norms and biases need not be the best for matrices.
    """
    inner = [p for name, p in parameters.items() if settings.optimizer == "muon" and name in matrices]
    chosen = set(map(id, inner))
    outer = [p for p in parameters.values() if id(p) not in chosen]
    kinds = [[p for p in outer if sharded(p) == kind] for kind in (False, True)]     # fused AdamW takes no mixture of the two
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([{"params": params} for params in kinds if params], lr=settings.lr, betas=(0.9, 0.95),
                          weight_decay=settings.weight_decay, fused=True)]
    if inner:
        optimizers.append(Muon(inner, lr=settings.muon_lr, weight_decay=settings.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of every parameter group to its peak times the factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
