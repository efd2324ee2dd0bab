"""Predictions: what a network says about (x0, eps), and how x0 is read out of it.

A target is a linear mixture of x0 and eps; together with x = alpha x0 + sigma eps that makes two equations for two
unknowns. They are solved here for *any* (alpha, sigma), so that every prediction works on every process: v on the
straight line of a flow, a flow velocity on Stable Diffusion's arc. s is input_scale: 1, and sqrt(1 + sigma^2) on VE,
where v is thus the network's answer of EDM for data of unit variance, F = -v (arXiv:2206.00364, Eq. 7 and Table 1).

    kind   target                     determinant (0 = the target does not tell x0)
    eps    eps                        alpha             lost at pure noise; arXiv:2006.11239, Eq. 14
    x0     x0                         1
    v      (alpha eps - sigma x0) / s alpha^2 + sigma^2 arXiv:2202.00512, Appendix D
    flow   eps - x0                   alpha + sigma     arXiv:2209.03003, Eq. 1, with time reversed
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyldm.diffusion.process import Level, input_scale
from tinyldm.lookup import lookup

Network = Callable[[Tensor, Tensor, Any], Tensor]  # net(x / input_scale, t, cond) -> out; t: [b]


class Prediction(NamedTuple):
    target: Callable[[Tensor, Tensor, Level], Tensor]  # (x0, eps, level) -> what the network should say
    x0: Callable[[Tensor, Tensor, Level], Tensor]  # (x, out, level) -> x0


PREDICTIONS = {
    "eps": Prediction(lambda x0, eps, at: eps, lambda x, eps, at: (x - at.sigma * eps) / at.alpha),
    "x0": Prediction(lambda x0, eps, at: x0, lambda x, x0, at: x0),
    "v": Prediction(
        lambda x0, eps, at: (at.alpha * eps - at.sigma * x0) / input_scale(at),
        lambda x, v, at: (at.alpha * x - at.sigma * (input_scale(at) * v)) / (at.alpha**2 + at.sigma**2),
    ),
    "flow": Prediction(lambda x0, eps, at: eps - x0, lambda x, u, at: (x - at.sigma * u) / (at.alpha + at.sigma)),
}


def to_target(kind: str, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """What a network of this kind should answer to alpha x0 + sigma eps. x0, eps: [b, c, h, w]."""
    return lookup(PREDICTIONS, kind, "prediction").target(x0, eps, level)


def to_x0(kind: str, x: Tensor, out: Tensor, level: Level) -> Tensor:
    """The x0 that the answer `out` to `x` implies; of 2c channels the first c, the others are a learned variance's.
    ValueError for eps at alpha = 0, where none is implied."""
    if kind == "eps" and bool(torch.as_tensor(level.alpha == 0).any()):
        raise ValueError("eps-prediction says nothing about x0 at alpha = 0 (pure noise): "
                         "train with prediction 'v', 'x0' or 'flow', or start from a level with alpha > 0")
    return lookup(PREDICTIONS, kind, "prediction").x0(x, out[:, : x.shape[1]], level)
