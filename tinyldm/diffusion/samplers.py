"""Samplers: how to step from one noise level to the next.

Each is a generator: it yields (x, x0) after every step, x at the new level and the x0 guessed on the way (the
preview), so that progress bars, previews and early stops are the caller's loop and not our arguments. All are
called alike, `sampler(denoise, x, levels, generators=...)`; the deterministic ones draw nothing. None keeps
state or changes its arguments.

    levels = grid(process, 30)
    generators = make_generators(range(seed, seed + b))
    x = initial_noise((4, 32, 32), generators).to(device)
    x = final(dpmpp_2m(denoise, x, levels))

Notation: `now` and `nxt` are neighbouring levels. x may start at alpha = 0 (pure noise) and end at sigma = 0
(clean data), where log(alpha / sigma) is infinite.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor

from tinyldm.diffusion.guidance import Denoiser
from tinyldm.diffusion.process import Level, log_snr
from tinyldm.lookup import lookup

Steps = Iterator[tuple[Tensor, Tensor]]
Generators = Sequence[Generator] | None


@torch.no_grad()
def ddim(
    denoise: Denoiser, x: Tensor, levels: Sequence[Level], generators: Generators = None, eta: float = 0.0
) -> Steps:
    """DDIM (arXiv:2010.02502, Eq. 12): walk along the noise that x0 implies; eta > 0 renews part of it.

    eta = 0 is deterministic, eta = 1 is `ddpm`.
    """
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)  # [b, c, h, w]
        eps = (x - now.alpha * x0) / now.sigma
        std = eta * nxt.sigma * math.sqrt(max(0.0, 1 - _shrink(now, nxt) ** 2))  # Eq. 16, for any (alpha, sigma)
        x = nxt.alpha * x0 + math.sqrt(max(0.0, nxt.sigma**2 - std**2)) * eps
        if std > 0:
            x = x + std * randn_like(x, generators)
        yield x, x0


@torch.no_grad()
def ddpm(denoise: Denoiser, x: Tensor, levels: Sequence[Level], generators: Generators = None) -> Steps:
    """Ancestral sampling: draw from the posterior q(x_nxt | x, x0) (arXiv:2006.11239, Eqs. 6-7).

    Written for any (alpha, sigma) as in arXiv:2107.00630, Appendix A. The variance is the posterior's, the
    smaller of the two that DDPM considers.
    """
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        keep = _shrink(now, nxt) ** 2  # of the variance of x given x0, the part that x_nxt brought along
        x = now.alpha / nxt.alpha * (nxt.sigma / now.sigma) ** 2 * x + nxt.alpha * (1 - keep) * x0
        std = nxt.sigma * math.sqrt(max(0.0, 1 - keep))
        if std > 0:
            x = x + std * randn_like(x, generators)
        yield x, x0


@torch.no_grad()
def euler(denoise: Denoiser, x: Tensor, levels: Sequence[Level], generators: Generators = None) -> Steps:
    """Euler's method on the probability-flow ODE d(x/alpha) = eps d(sigma/alpha) (arXiv:2206.00364, Eq. 4).

    On any curve and in any coordinate that is the line through x0 and eps: the same step as DDIM at eta = 0.
    """
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        x = nxt.alpha * x0 + nxt.sigma * eps
        yield x, x0


def straight(level: Level) -> float:
    """The scale that bends any curve into rectified flow: with y = x / scale the coefficients sum to 1."""
    return level.alpha + level.sigma


@torch.no_grad()
def heun(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[Level],
    generators: Generators = None,
    scale: Callable[[Level], float] = straight,
) -> Steps:
    """Heun's second-order method: step, look again from there, step with the mean (arXiv:2206.00364, Alg. 1).

    Two calls per step, one for the last: at sigma = 0 there is no noise to look at. Unlike Euler's, the result
    depends on the coordinate y = x / scale. The paper's, scale = alpha, is lost where alpha nears 0: from the
    noisy end of `cosine` its first step is 2e4 long. `straight` is finite everywhere, is t for flow, and on
    exact denoisers was the more accurate one on Stable Diffusion's curve too, mostly by a factor of 2 to 4.
    """
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        da = nxt.alpha / scale(nxt) - now.alpha / scale(now)
        ds = nxt.sigma / scale(nxt) - now.sigma / scale(now)
        y, dy = x / scale(now), da * x0 + ds * eps  # y = (alpha x0 + sigma eps) / scale
        x = scale(nxt) * (y + dy)
        if nxt.sigma > 0:
            there = denoise(x, nxt)
            dy_there = da * there + ds * (x - nxt.alpha * there) / nxt.sigma
            x = scale(nxt) * (y + (dy + dy_there) / 2)
        yield x, x0


@torch.no_grad()
def dpmpp_2m(denoise: Denoiser, x: Tensor, levels: Sequence[Level], generators: Generators = None) -> Steps:
    """DPM-Solver++(2M) (arXiv:2211.01095, Alg. 2): second order from one call per step, by remembering the last.

    First order where the step in lambda = log(alpha / sigma) is infinite, at the first step, and at the last of
    fewer than 15, where extrapolating over a long step hurts.
    """
    count = len(levels) - 1
    last_x0, last_h = None, math.inf
    for i, (now, nxt) in enumerate(pairwise(levels), start=1):
        x0 = denoise(x, now)
        h = (log_snr(nxt) - log_snr(now)) / 2
        ahead = x0  # the guess that holds in the middle of the step
        if math.isfinite(h) and math.isfinite(last_h) and (i < count or count >= 15):
            ahead = x0 + h / (2 * last_h) * (x0 - last_x0)
        x = nxt.sigma / now.sigma * x - nxt.alpha * math.expm1(-h) * ahead
        last_x0, last_h = x0, h
        yield x, x0


def _shrink(now: Level, nxt: Level) -> float:
    """exp(-h), h the step in log(alpha / sigma): 0 from pure noise or to clean data, else below 1."""
    return now.alpha * nxt.sigma / (nxt.alpha * now.sigma)


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def find_sampler(name: str) -> Callable[..., Steps]:
    """A sampler by name in any spelling: `dpmpp_2m`, `DPM++ 2M`, `Euler`. Unknown names: ValueError."""
    spelled = name.strip().lower().replace("++", "pp").replace(" ", "_").replace("-", "_")
    aliases = {"dpmpp2m": "dpmpp_2m", "dpm_pp_2m": "dpmpp_2m", "dpm_solverpp": "dpmpp_2m", "ancestral": "ddpm"}
    return lookup(SAMPLERS, aliases.get(spelled, spelled), "sampler")


def final(steps: Steps) -> Tensor:
    """Run a sampler to its end and return the last x."""
    x = None
    for x, _ in steps:
        pass
    if x is None:
        raise ValueError("the sampler took no step: pass at least two levels, as grid(process, steps) gives")
    return x


def make_generators(seeds: Iterable[int]) -> list[Generator]:
    """One CPU generator per image: the same noise on every device, and at every batch size."""
    return [Generator().manual_seed(int(seed)) for seed in seeds]


def initial_noise(shape: Sequence[int], generators: Sequence[Generator]) -> Tensor:
    """Standard normal noise [b, *shape], float32 on the CPU, image i from generators[i] alone.

    Each image is drawn on its own: one draw for the whole batch would give image i a noise that depends on b.
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def randn_like(x: Tensor, generators: Generators) -> Tensor:
    """Noise like x [b, ...], image i from generators[i]; drawn as in `initial_noise`, then moved and cast."""
    if generators is None or len(generators) != len(x):
        count = "none" if generators is None else len(generators)
        raise ValueError(f"{len(x)} images need {len(x)} generators, got {count}: use make_generators(seeds)")
    return initial_noise(x.shape[1:], generators).to(x)
