"""Processes: the curves (alpha, sigma) along which data turns into noise.

Everything in this package rests on one equation,

    x_t = alpha(t) * x0 + sigma(t) * eps          t = 0 is data, t = 1 is noise,

and a process is no more than its two coefficients: `process(t) -> Level`, t: [b] in [0, 1], Level of its dtype and device.
Predictions, samplers and grids work with every process. References: DDPM arXiv:2006.11239, cosine 2102.09672,
zero terminal SNR 2305.08891, score SDE 2011.13456, EDM 2206.00364, flow 2209.03003.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyldm.lookup import fit, lookup, type_of


class Level(NamedTuple):
    """One noise level: a point on the curve, and `t`, the time that the network takes: the index 0..999 for tables, 1000 t
    for all other processes. In sampling these are Python floats, so that no step waits for the device. In training t is
    [b], alpha and sigma are [b, 1, 1, 1]."""

    t: float | Tensor
    alpha: float | Tensor
    sigma: float | Tensor


CLEAN = Level(0.0, 1.0, 0.0)

Process = Callable[[Tensor], Level]


def log_snr(level: Level) -> float | Tensor:
    """log(alpha^2 / sigma^2): +inf for clean data, -inf for pure noise."""
    if isinstance(level.alpha, Tensor):
        return 2 * (level.alpha.log() - level.sigma.log())
    inside = level.alpha > 0 and level.sigma > 0
    return 2 * math.log(level.alpha / level.sigma) if inside else math.copysign(math.inf, level.alpha - level.sigma)


def input_scale(level: Level) -> float | Tensor:
    """max(1, sqrt(alpha^2 + sigma^2)): the network's input is x / input_scale, which has unit variance where the data have
    (on VE this is 1 / c_in of arXiv:2206.00364, Table 1, with sigma_data = 1). It is exactly 1 on tables and flow, where a
    square slightly above 1 is rounding."""
    square = level.alpha**2 + level.sigma**2
    above = square > 1 + 1e-6
    return square.where(above, 1.0).sqrt() if isinstance(square, Tensor) else square**0.5 if above else 1.0


@dataclass(frozen=True, eq=False)
class Discrete:
    """A curve given by a table of `len(process)` points: DDPM and its descendants (alpha^2 + sigma^2 = 1).
    A uniform t in [0, 1) picks every index equally often. (i + 0.5) / 1000 is the middle of the interval of index i."""

    alpha: Tensor  # [1000] float64, decreasing
    sigma: Tensor  # [1000] float64, increasing

    @classmethod
    def from_betas(cls, betas: Tensor, zero_snr: bool = False) -> "Discrete":
        """alpha_bar = prod(1 - beta), alpha = sqrt(alpha_bar)  (arXiv:2006.11239, Eq. 4)."""
        alpha_bar = torch.cumprod(1 - betas, 0)
        table = cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        return table.to_zero_snr() if zero_snr else table

    @classmethod
    def from_alpha(cls, alpha: Tensor) -> "Discrete":
        return cls(alpha, (1 - alpha**2).sqrt())

    def to_zero_snr(self) -> "Discrete":
        """The table shifted and scaled so that it ends at pure noise, alpha = 0, and starts where it did before
        (arXiv:2305.08891, Alg. 1). Zero terminal SNR demands two things of sampling. The network must predict v or x0,
        because at alpha = 0 eps does not determine x0. And the grid must begin at the last entry ("trailing", never
        "leading"): at any other the network expects a trace of signal, which the initial noise does not contain."""
        first, last = self.alpha[[0, -1]]
        return Discrete.from_alpha((self.alpha - last) * first / (first - last))

    def __len__(self) -> int:
        return len(self.alpha)

    def __call__(self, t: Tensor) -> Level:
        index = (t * len(self)).long().clamp(0, len(self) - 1)
        alpha, sigma = (table[index].view(-1, 1, 1, 1) for table in tables(self, t.dtype, t.device))
        return Level(index.to(t.dtype), alpha, sigma)


@lru_cache(maxsize=64)
def tables(process: Discrete, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """alpha and sigma of a table in this dtype on this device. The copies are kept: each time, a GPU would be waited for."""
    return process.alpha.to(device, dtype), process.sigma.to(device, dtype)


@dataclass(frozen=True)
class Flow:
    """Rectified flow: the straight line x_t = (1 - t) x0 + t eps  (arXiv:2209.03003, Eq. 1, time reversed). `shift` above 1
    moves times towards noise, as larger images need: t <- s t / (1 + (s - 1) t)  (arXiv:2403.03206, Eq. 23)."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"flow shift {self.shift} is not positive: use 1 for unshifted times, 3 for larger images")

    def __call__(self, t: Tensor) -> Level:
        t = self.shift * t / (1 + (self.shift - 1) * t)
        sigma = t.view(-1, 1, 1, 1)
        return Level(1000 * t, 1 - sigma, sigma)


@dataclass(frozen=True)
class DynamicFlow:
    """A flow whose shift grows with the picture, as FLUX.1's does: mu is linear in the number of tokens that the network makes of
    the latents, from base_shift at base_tokens to max_shift at max_tokens and beyond both, and the shift is exp(mu), or mu itself
    (from the code of FLUX; the reason for it is in arXiv:2403.03206, Sec. 5.3.2). Called without a size, it is the flow of
    base_tokens."""

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    exponential: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.base_tokens < self.max_tokens:
            raise ValueError(f"base_tokens {self.base_tokens} and max_tokens {self.max_tokens} must be positive and rising: 256 and "
                             "4096 are usual")
        if not (abs(self.base_shift) <= 10 and abs(self.max_shift) <= 10):
            raise ValueError(f"base_shift {self.base_shift} and max_shift {self.max_shift} must lie between -10 and 10: 0.5 and 1.15 "
                             "are usual")
        self.for_tokens()

    def for_tokens(self, tokens: int | None = None) -> Flow:
        """The flow for pictures of this many tokens, None: base_tokens. ValueError where mu is the shift itself and not positive."""
        tokens = self.base_tokens if tokens is None else tokens
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        return Flow(math.exp(mu) if self.exponential else mu)

    def __call__(self, t: Tensor) -> Level:
        return self.for_tokens()(t)


def at_size(process: Process, tokens: int | None = None) -> Process:
    """The process for pictures of this many tokens (latent height * width / divisor^2); None: of the size that it takes by itself.
    Only a process with a method `for_tokens` depends on it; the others are returned as they are."""
    return process.for_tokens(tokens) if hasattr(process, "for_tokens") else process


@dataclass(frozen=True, eq=False)
class AsFlow(Flow):
    """Rectified flow for a network that has learned another curve, the process `of` with `options`, and predicts `prediction` on it:
    as_flow.py makes it answer with velocities."""

    of: str = "scaled_linear"
    options: dict | None = None
    prediction: str = "eps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.curve, Flow):
            raise ValueError(f"process as_flow is for networks that have learned another curve than the line: of={self.of} is the line")

    @cached_property
    def curve(self) -> Process:
        return at_size(make_process(self.of, **(self.options or {})))


@dataclass(frozen=True)
class VP:
    """DDPM in continuous time, beta(t) = beta_min + t (beta_max - beta_min)  (arXiv:2011.13456, Eqs. 29 and 33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_max or not self.beta_max:
            raise ValueError(f"beta_min {self.beta_min} and beta_max {self.beta_max} must be positive and rising: "
                             "use 0 <= beta_min <= beta_max")

    def __call__(self, t: Tensor) -> Level:
        log_alpha = (-t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2) / 2).view(-1, 1, 1, 1)
        return Level(1000 * t, log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt())


@dataclass(frozen=True)
class VE:
    """Noise is added to data of constant scale: alpha = 1, and t is linear in log(sigma) (arXiv:2011.13456, Eq. 30). EDM's
    network takes log(sigma) as well (c_noise in arXiv:2206.00364, Table 1), so with another range of sigma this is EDM's
    process. There is no sigma_data: it is 1, because latents are standardised (see prediction.py)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} and sigma_max {self.sigma_max} must be positive and rising: "
                             "use 0 < sigma_min < sigma_max")

    def __call__(self, t: Tensor) -> Level:
        sigma = (self.sigma_min * (self.sigma_max / self.sigma_min) ** t).view(-1, 1, 1, 1)
        return Level(1000 * t, torch.ones_like(sigma), sigma)


def find_t(process: Process, ratio: Tensor) -> Tensor:
    """The t in [0, 1], float64, at which sigma / alpha reaches `ratio` [n] >= 0, or the nearer end where it never does. It
    is found by bisection, so that no process needs an inverse. On a table it is the first t of that index."""
    low, high = torch.zeros_like(ratio, dtype=torch.float64), torch.ones_like(ratio, dtype=torch.float64)
    for _ in range(52):
        now = process(middle := (low + high) / 2)
        below = now.sigma.flatten() < ratio * now.alpha.flatten()
        low, high = low.where(~below, middle), high.where(below, middle)
    return high


def from_list(betas: Sequence[float] | None = None, zero_snr: bool = False) -> Discrete:
    """Any table, from its betas in (0, 1], cleanest level first, like the published `trained_betas`. None: DDPM's."""
    if betas is None:
        return make_process("linear", zero_snr=zero_snr)
    if len(betas) < 2 or not all(0 < beta <= 1 for beta in betas):
        raise ValueError("betas must be two or more numbers above 0 and at most 1, from the cleanest level to the noisiest")
    return Discrete.from_betas(torch.tensor(betas, dtype=torch.float64), zero_snr)


def _check_steps(steps: int) -> None:
    if not 2 <= steps <= 100_000:
        raise ValueError(f"a table of {steps} steps: use 2 to 100000, 1000 is usual")


def _even(power: float, beta_start: float, beta_end: float, steps: int = 1000, zero_snr: bool = False) -> Discrete:
    """Betas with evenly spaced powers. DDPM's are linear (arXiv:2006.11239, Section 4), those of Stable Diffusion are
    linear in their square root (from its code)."""
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError(f"beta_start {beta_start} and beta_end {beta_end} must lie between 0 and 1")
    _check_steps(steps)
    roots = torch.linspace(beta_start**power, beta_end**power, steps, dtype=torch.float64)
    return Discrete.from_betas(roots ** (1 / power), zero_snr)


def cosine(offset: float = 0.008, max_beta: float = 0.999, steps: int = 1000, zero_snr: bool = False) -> Discrete:
    """Improved DDPM: alpha_bar is a squared cosine (arXiv:2102.09672, Eq. 17). The clipped betas end near alpha = 5e-5."""
    if not 0 < max_beta <= 1 or offset < 0:
        raise ValueError(f"max_beta {max_beta} must be above 0 and at most 1, offset {offset} at least 0")
    _check_steps(steps)
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return Discrete.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta), zero_snr)


PROCESSES: dict[str, Callable[..., Process]] = {
    "scaled_linear": partial(_even, 0.5, beta_start=0.00085, beta_end=0.012),
    "linear": partial(_even, 1.0, beta_start=1e-4, beta_end=0.02),
    "cosine": cosine,
    "betas": from_list,
    "vp": VP,
    "ve": VE,
    "edm": partial(VE, sigma_min=0.002, sigma_max=80.0),  # arXiv:2206.00364, Table 1
    "flow": Flow,
    "dynamic_flow": DynamicFlow,
    "as_flow": AsFlow,
}


def make_process(name: str, **options) -> Process:
    """A process by name, for example `make_process("flow", shift=3.0)`. Unknown names: ValueError."""
    make = lookup(PROCESSES, name, "process")
    return make(**check_options(make, options, f"{name} option"))


def check_options(function: Callable, options: Mapping, what: str) -> dict:
    """The options as `function` wants them (lookup.fit). ValueError, with the nearest name, for an option that it does not take, and
    for a value of another type than its annotation, or else its default, says."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    except (NameError, TypeError, AttributeError, SyntaxError):                 # annotations that cannot be found are not checked
        parameters = inspect.signature(function).parameters.values()
    known = {parameter.name: parameter for parameter in parameters if parameter.default is not parameter.empty}
    hint = lambda value, found: (Any if value is found.default else type_of(found.default, whole=float)
                                 if found.annotation is found.empty else found.annotation)
    return {name: fit(value, hint(value, lookup(known, name, what)), f"{what} {name}") for name, value in options.items()}
