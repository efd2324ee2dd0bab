"""The training loss, which noise levels it sees, and how it weighs them.

Noise and times come in as arguments: the trainer makes them functions of (seed, step, position in the batch),
so that they do not depend on how a batch is split.

References
  Simple loss: arXiv:2006.11239, Eq. 14.  Min-SNR: arXiv:2303.09556, Section 3.4.
  Logit-normal times: arXiv:2403.03206, Eq. 19.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from tinyldm.diffusion.prediction import PREDICTIONS, Network, to_target
from tinyldm.diffusion.process import Level, Process
from tinyldm.lookup import lookup

Weight = Callable[[Level], Tensor]


def sample_losses(
    net: Network, x0: Tensor, eps: Tensor, t: Tensor, cond: Any, process: Process, *, prediction: str
) -> Tensor:
    """Mean squared error of every sample, unweighted. x0, eps: [b, c, h, w]; t: [b] in [0, 1] -> [b] float32."""
    now = process(t)  # alpha, sigma: [b, 1, 1, 1]
    x_t = now.alpha * x0 + now.sigma * eps
    target = to_target(prediction, x0, eps, now)
    out = net(x_t, now.t, cond).to(target.dtype)  # float32, even when the network runs in bfloat16
    return (out - target).square().flatten(1).mean(1)


def diffusion_loss(
    net: Network, x0: Tensor, eps: Tensor, t: Tensor, cond: Any, process: Process, *, prediction: str, weight: Weight
) -> Tensor:
    """The weighted mean of `sample_losses`: a scalar to call backward() on. `weight` is from `make_weight`."""
    losses = sample_losses(net, x0, eps, t, cond, process, prediction=prediction)  # [b]
    return (weight(process(t)).flatten() * losses).mean()  # flatten, or [b, 1, 1, 1] * [b] broadcasts silently


def uniform_weight(level: Level) -> Tensor:
    """1 everywhere: the simple loss (arXiv:2006.11239, Eq. 14). [b, 1, 1, 1]."""
    return torch.ones_like(level.alpha)


def min_snr_weight(level: Level, prediction: str, gamma: float) -> Tensor:
    """min(SNR, gamma) in units of the x0 error (arXiv:2303.09556, Section 3.4), SNR = alpha^2 / sigma^2.

    An eps error is worth 1 / SNR of it, a v error 1 / (SNR + 1) (where alpha^2 + sigma^2 = 1). Finite at both
    ends of the curve: written so that neither SNR = 0 nor SNR = inf divides 0 by 0.
    """
    snr = (level.alpha / level.sigma) ** 2  # [b, 1, 1, 1]
    if prediction == "eps":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1 if prediction == "v" else 1)


WEIGHTS = {"none": uniform_weight, "min_snr": min_snr_weight}


def make_weight(name: str, prediction: str, gamma: float = 5.0) -> Weight:
    """A weight by name. ValueError for min_snr with flow, or a name that is not in WEIGHTS."""
    weight = lookup(WEIGHTS, name, "loss weight")
    lookup(PREDICTIONS, prediction, "prediction")
    if weight is not min_snr_weight:
        return weight
    if prediction == "flow":
        raise ValueError(
            "min_snr weighs levels of a variance-preserving curve; rectified flow chooses its levels by how often "
            "it draws them: use weight 'none' with times 'logit_normal', or prediction 'eps', 'v' or 'x0'"
        )
    return partial(min_snr_weight, prediction=prediction, gamma=gamma)


def _uniform(n: int, generator: Generator, mean: float, scale: float) -> Tensor:
    return torch.rand(n, generator=generator)


def _logit_normal(n: int, generator: Generator, mean: float, scale: float) -> Tensor:
    return torch.sigmoid(mean + scale * torch.randn(n, generator=generator))


T_SAMPLERS = {"uniform": _uniform, "logit_normal": _logit_normal}


def sample_t(kind: str, n: int, generator: Generator | None = None, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """Training times [n], float32 on the CPU: uniform in [0, 1), or logit-normal in (0, 1) with this mean and
    scale of logit(t) (arXiv:2403.03206, Eq. 19; a larger mean trains more on noise)."""
    return lookup(T_SAMPLERS, kind, "time sampler")(n, generator, mean, scale)
