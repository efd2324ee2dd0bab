"""Processes: the curves (alpha, sigma) along which data turns into noise.

Everything in this package rests on one equation,

    x_t = alpha(t) * x0 + sigma(t) * eps          t = 0 is data, t = 1 is noise,

and a process is no more than its two coefficients: `process(t) -> Level`. What a network learns to say
about (x0, eps) is in prediction.py, how a sampler walks down the curve is in samplers.py, and at which
points it stops is in grids.py. None of them asks which process it is given.

References
  DDPM: arXiv:2006.11239.  Improved DDPM (cosine): arXiv:2102.09672.  Latent diffusion: arXiv:2112.10752.
  Zero terminal SNR: arXiv:2305.08891.
  Rectified flow: arXiv:2209.03003.  Its shift, Stable Diffusion 3: arXiv:2403.03206.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tinyldm.lookup import lookup


class Level(NamedTuple):
    """One noise level: a point on the curve, and what the network is told about it.

    Python floats while sampling, so that no step waits for the device. While training, `t` is `[b]` and
    `alpha`, `sigma` are `[b, 1, 1, 1]`. `t` is the network's time: the index 0..999 for discrete tables,
    1000 t for flow.
    """

    t: float | Tensor
    alpha: float | Tensor
    sigma: float | Tensor


CLEAN = Level(0.0, 1.0, 0.0)

Process = Callable[[Tensor], Level]


def log_snr(level: Level) -> float | Tensor:
    """log(alpha^2 / sigma^2): +inf for clean data, -inf for pure noise."""
    if isinstance(level.alpha, Tensor):
        return 2 * (level.alpha.log() - level.sigma.log())
    if level.alpha == 0 or level.sigma == 0:
        return -math.inf if level.alpha == 0 else math.inf
    return 2 * math.log(level.alpha / level.sigma)


@dataclass(frozen=True, eq=False)
class Discrete:
    """A curve known at `len(process)` points: DDPM and its descendants (alpha^2 + sigma^2 = 1).

    A uniform t in [0, 1) picks every index equally often; (i + 0.5) / 1000 is the middle of index i.
    """

    alpha: Tensor  # [1000] float64, falling
    sigma: Tensor  # [1000] float64, rising

    @classmethod
    def from_betas(cls, betas: Tensor) -> "Discrete":
        """alpha_bar = prod(1 - beta), alpha = sqrt(alpha_bar)  (arXiv:2006.11239, Eq. 4)."""
        alpha_bar = torch.cumprod(1 - betas, 0)
        return cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    @classmethod
    def from_alpha(cls, alpha: Tensor) -> "Discrete":
        return cls(alpha, (1 - alpha**2).sqrt())

    def to_zero_snr(self) -> "Discrete":
        """The table moved and stretched so that it ends at pure noise, alpha = 0, and starts where it started
        (arXiv:2305.08891, Alg. 1). There a network must predict v or x0: eps says nothing about x0."""
        first, last = self.alpha[0], self.alpha[-1]
        return Discrete.from_alpha((self.alpha - last) * first / (first - last))

    def __len__(self) -> int:
        return len(self.alpha)

    def __call__(self, t: Tensor) -> Level:
        """t: [b] in [0, 1] -> Level of t's dtype on t's device."""
        index = (t * len(self)).long().clamp(0, len(self) - 1)
        alpha, sigma = (table.to(t)[index].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        return Level(index.to(t.dtype), alpha, sigma)


@dataclass(frozen=True)
class Flow:
    """Rectified flow: the straight line x_t = (1 - t) x0 + t eps  (arXiv:2209.03003, Eq. 1, time reversed).

    `shift` above 1 moves time towards noise, as larger images need: t <- s t / (1 + (s - 1) t)
    (arXiv:2403.03206, Eq. 23).
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"flow shift {self.shift} is not positive: 1 leaves time alone, 3 suits larger images")

    def __call__(self, t: Tensor) -> Level:
        """t: [b] in [0, 1] -> Level of t's dtype on t's device."""
        t = self.shift * t / (1 + (self.shift - 1) * t)
        sigma = t.view(-1, 1, 1, 1)
        return Level(1000 * t, 1 - sigma, sigma)


# zero_snr: see Discrete.to_zero_snr.


def scaled_linear(
    beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000, zero_snr: bool = False
) -> Discrete:
    """Stable Diffusion 1 and 2: linear in sqrt(beta) (no equation in arXiv:2112.10752; from its code)."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return _table(roots**2, zero_snr)


def linear(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000, zero_snr: bool = False) -> Discrete:
    """DDPM: linear in beta (arXiv:2006.11239, Section 4)."""
    return _table(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64), zero_snr)


def cosine(offset: float = 0.008, max_beta: float = 0.999, steps: int = 1000, zero_snr: bool = False) -> Discrete:
    """Improved DDPM: alpha_bar falls as a squared cosine (arXiv:2102.09672, Eq. 17).

    The last beta is clipped, so that alpha ends near 5e-5 rather than at 0.
    """
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return _table((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta), zero_snr)


def _table(betas: Tensor, zero_snr: bool) -> Discrete:
    table = Discrete.from_betas(betas)
    return table.to_zero_snr() if zero_snr else table


PROCESSES: dict[str, Callable[..., Process]] = {
    "scaled_linear": scaled_linear,
    "linear": linear,
    "cosine": cosine,
    "flow": Flow,
}


def make_process(name: str, **options) -> Process:
    """A process by name, for example `make_process("flow", shift=3.0)`. Unknown names: ValueError."""
    make = lookup(PROCESSES, name, "process")
    check_options(make, options, f"{name} option")
    return make(**options)


def check_options(function: Callable, options: Mapping, what: str) -> None:
    """ValueError, with the nearest name, for an option that `function` does not take."""
    parameters = inspect.signature(function).parameters.values()
    known = {parameter.name: parameter for parameter in parameters if parameter.default is not parameter.empty}
    for option in options:
        lookup(known, option, what)
