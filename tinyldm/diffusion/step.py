"""The step that most samplers share, which holds x0 fixed, and the coordinates in which other samplers step."""

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from tinyldm.diffusion.prediction import to_eps
from tinyldm.diffusion.process import Level, log_snr

Steps = Iterator[tuple[Tensor, Tensor]]
Grid = Sequence[Level]
Scale = Callable[[Level], float]
Draw = Callable[[], Tensor] | None


def step(x: Tensor, x0: Tensor, now: Level, nxt: Level, eta: float = 0.0, noise: Draw = None) -> Tensor:
    """From now to nxt with x0 held fixed (arXiv:2010.02502, Eqs. 12 and 16, for any alpha and sigma). In exponential
    integrators h = -log(shrink), and at eta = 0 this is arXiv:2211.01095, Eq. 9."""
    eps = to_eps(x, x0, now)
    std = eta * nxt.sigma * math.sqrt(max(0.0, 1 - shrink(now, nxt) ** 2))
    x = nxt.alpha * x0 + math.sqrt(max(0.0, nxt.sigma**2 - std**2)) * eps
    return x + std * noise() if std > 0 else x


def lambda_step(now: Level, nxt: Level) -> float:
    """h, the step in lambda = log(alpha / sigma): infinite from pure noise and to clean data."""
    return (log_snr(nxt) - log_snr(now)) / 2


def shrink(now: Level, nxt: Level) -> float:
    """exp(-h): 0 from pure noise or to clean data, otherwise below 1."""
    return now.alpha * nxt.sigma / (nxt.alpha * now.sigma)


def straight(level: Level) -> float:
    """The scale that turns any curve into rectified flow: with y = x / scale the two coefficients sum to 1."""
    return level.alpha + level.sigma


def signal(level: Level) -> float:
    """The scale of arXiv:2206.00364, k-diffusion and diffusers: y = x / alpha = x0 + (sigma / alpha) eps."""
    return level.alpha
