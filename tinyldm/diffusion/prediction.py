"""Predictions: what a network predicts about (x0, eps), and how x0 is recovered from it.

A target is a linear mixture of x0 and eps. Together with x = alpha x0 + sigma eps it makes two equations in two unknowns,
which are solved here for *any* (alpha, sigma). So every prediction works on every process: v on the straight line of a
flow, a flow velocity on Stable Diffusion's arc. In the table, s is `input_scale`: 1, except on VE, where it is
sqrt(1 + sigma^2) and v is, up to its sign, what EDM's network outputs (arXiv:2206.00364, Eq. 7 and Table 1): F = -v. That
needs sigma_data = 1, the standard deviation that EDM assumes of the data. Here it holds without a parameter, because a
VAE's scaling factor standardises the latents before diffusion sees them.

    kind   target                     determinant (where it is 0, the target does not determine x0)
    eps    eps                        alpha, 0 at pure noise; arXiv:2006.11239, Eq. 14
    x0     x0                         1
    v      (alpha eps - sigma x0) / s alpha^2 + sigma^2; arXiv:2202.00512, Appendix D
    flow   eps - x0                   alpha + sigma; arXiv:2209.03003, Eq. 1, with time reversed
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyldm.diffusion.process import Level, input_scale
from tinyldm.lookup import lookup

Network = Callable[[Tensor, Tensor, Any], Tensor]  # net(x / input_scale, t, cond) -> out; t: [b]


class Prediction(NamedTuple):
    target: Callable[[Tensor, Tensor, Level], Tensor]  # (x0, eps, level) -> the network's target
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
    """What a network of this kind is trained to output for alpha x0 + sigma eps. x0, eps: [b, c, h, w]."""
    return lookup(PREDICTIONS, kind, "prediction").target(x0, eps, level)


def to_x0(kind: str, x: Tensor, out: Tensor, level: Level) -> Tensor:
    """The x0 that the network's output for x implies. Of 2c channels only the first c count; the others hold a learned
    variance. ValueError for eps-prediction at alpha = 0, where the output implies no x0. An alpha on a GPU is not checked, because the
    host would have to wait for it: Denoising.check does it before a training begins, and drawing has levels of Python floats."""
    alpha = torch.as_tensor(level.alpha)
    if kind == "eps" and alpha.device.type == "cpu" and bool((alpha == 0).any()):
        raise ValueError("eps-prediction does not determine x0 at alpha = 0 (pure noise): "
                         "train with prediction 'v', 'x0' or 'flow', or start from a level with alpha > 0")
    return lookup(PREDICTIONS, kind, "prediction").x0(x, out[:, : x.shape[1]], level)


def to_eps(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    """The noise that x0 implies: x = alpha x0 + sigma eps, solved for eps. Needs sigma > 0."""
    return (x - level.alpha * x0) / level.sigma


def to_output(kind: str, x: Tensor, x0: Tensor, level: Level) -> Tensor:
    """The output for x of a network of this kind whose guess is x0: the inverse of `to_x0`. Needs sigma > 0."""
    return to_target(kind, x0, to_eps(x, x0, level), level)
