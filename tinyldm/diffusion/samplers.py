"""Samplers: how to step from one noise level to the next.

Each is a generator: it yields (x, x0) after every step, so that progress bars, previews and early stops are the caller's
loop and not our arguments. All are called alike, `sampler(denoise, x, levels, generators=...)`, and change no argument.

    levels = grid(process, 30)
    generators = make_generators(range(seed, seed + b))
    x = initial_noise((4, 32, 32), generators).to(device)
    x = final(dpmpp_2m(denoise, x, levels))

x may start at alpha = 0 (pure noise) and end at sigma = 0 (clean data), where log(alpha / sigma) is infinite. edm, dpmpp_sde
and adaptive need `Levels` that know their curve, as grid() gives. Those that remember are in multistep.py.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from tinyldm.diffusion.guidance import Denoiser
from tinyldm.diffusion.multistep import dpmpp_2m, dpmpp_2m_sde, lms, pndm, unipc
from tinyldm.diffusion.process import Level
from tinyldm.diffusion.step import Draw, Grid, Scale, Steps, shrink, step, straight
from tinyldm.lookup import lookup
from tinyldm.noise import Generators, randn_like


@torch.no_grad()
def ddim(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, eta: float = 0.0) -> Steps:
    """DDIM (arXiv:2010.02502, Eq. 12): walk along the noise that x0 implies. eta > 0 renews part of it; 1 is `ddpm`."""
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)  # [b, c, h, w]
        x = step(x, x0, now, nxt, eta, lambda: randn_like(x, generators))
        yield x, x0


@torch.no_grad()
def ddpm(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, spread: Draw = None) -> Steps:
    """Ancestral sampling: draw from the posterior q(x_nxt | x, x0) (arXiv:2006.11239, Eqs. 6-7), written for any
    (alpha, sigma) as in arXiv:2107.00630, Appendix A.

    The variance is the posterior's, beta_tilde, the smaller of the two that DDPM considers. Where it was learned, `spread()`
    is what the network's extra channels said at the last call: -1 for beta_tilde, 1 for beta, log-linear in between
    (arXiv:2102.09672, Eq. 15 with v = (spread + 1) / 2).
    """
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        keep = shrink(now, nxt) ** 2  # of the variance of x given x0, the part that x_nxt brought along
        x = now.alpha / nxt.alpha * (nxt.sigma / now.sigma) ** 2 * x + nxt.alpha * (1 - keep) * x0
        std = nxt.sigma * math.sqrt(max(0.0, 1 - keep))
        if std > 0:
            std = std * (now.sigma / nxt.sigma) ** ((spread() + 1) / 2) if spread else std  # beta is (1 - keep) sigma_now^2
            x = x + std * randn_like(x, generators)
        yield x, x0


def euler_a(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None) -> Steps:
    """Euler ancestral, from k-diffusion: step down to less noise than wanted, then add the difference afresh.

    In y = x / alpha and s = sigma / alpha to s_nxt^2 / s_now, plus s_nxt sqrt(1 - (s_nxt / s_now)^2) of noise. s_nxt / s_now
    is the shrink of `ddim`: this is ddim at eta = 1, and `ddpm`, to the last term. They differ in the grids they are used on.
    """
    return ddim(denoise, x, levels, generators, eta=1.0)


def euler(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None) -> Steps:
    """Euler's method on the probability-flow ODE d(x/alpha) = eps d(sigma/alpha) (arXiv:2206.00364, Eq. 4).

    On any curve and in any coordinate that is the line through x0 and eps: the same step as DDIM at eta = 0.
    """
    return ddim(denoise, x, levels)


@torch.no_grad()
def heun(
    denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, scale: Scale = straight,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Steps:
    """Heun's second-order method: step, look again from there, step with the mean (arXiv:2206.00364, Alg. 1, and
    with s_churn, which adds noise before every step, Alg. 2). Two calls per step, one for the last: at sigma = 0 there is
    no noise to look at.

    Unlike Euler's, the result depends on the coordinate y = x / scale. The paper's, scale = alpha, is lost where alpha
    nears 0: from the noisy end of `cosine` its first step is 2e4 long. `straight` is finite everywhere, is t for flow,
    and on exact denoisers was the better one on Stable Diffusion's curve too, mostly by a factor of 2 to 4.
    """
    for now, nxt in pairwise(levels):
        if s_churn > 0 and now.alpha > 0 and s_tmin <= now.sigma / now.alpha <= s_tmax:
            growth = 1 + min(s_churn / (len(levels) - 1), math.sqrt(2) - 1)
            x, now = _churn(x, now, levels, growth, s_noise, generators)
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


def edm(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, **options: float) -> Steps:
    """EDM's stochastic sampler: `heun` with the paper's churn for ImageNet (arXiv:2206.00364, Alg. 2 and Table 5)."""
    churn = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    return heun(denoise, x, levels, generators, **churn | options)


def _churn(x: Tensor, now: Level, levels: Grid, growth: float, s_noise: float, generators: Generators):
    """x at sigma / alpha grown by so much, but not beyond the first level, for the network may not know what lies there."""
    most = levels[0].sigma / levels[0].alpha if levels[0].alpha > 0 else math.inf
    hat = _curve(levels)(min(growth * now.sigma / now.alpha, most))
    std = math.sqrt(max(0.0, (hat.sigma / hat.alpha) ** 2 - (now.sigma / now.alpha) ** 2))
    return hat.alpha * (x / now.alpha + std * s_noise * randn_like(x, generators)), hat


def _curve(levels: Grid) -> Callable[[float], Level]:
    """sigma / alpha -> the level there."""
    if not hasattr(levels, "curve"):
        raise ValueError("this sampler looks between the levels: pass Levels(levels, curve(process)), as grid() gives")
    return levels.curve


@torch.no_grad()
def adaptive(
    denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, rtol: float = 0.01, atol: float = 0.01
) -> Steps:
    """The probability-flow ODE with as many steps as it needs: Bogacki and Shampine's pair of orders 3 and 2 (Applied
    Mathematics Letters 2(4), 1989), whose difference is kept below atol + rtol |y|, root mean square of every image.

    Any curve is a flow in y = x / (alpha + sigma) and u = sigma / (alpha + sigma): dy/du = eps - x0, and -x0 where no
    noise is left. Three calls per step, taken or not. Of the levels only the ends count, and the first step, which is
    the first to be tried. All images of a batch take the steps that the hardest one needs.
    """

    def look(y: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        x0 = denoise(straight(level) * y, level) if level.sigma > 0 else y
        return x0, length * ((y - x0) * straight(level) / level.sigma if level.sigma > 0 else -y)

    def at(s: float) -> Level:  # s: the part of the way from first to last, in u
        return _curve(levels)((u := first + s * length) / (1 - u))

    first, second, last = (level.sigma / straight(level) for level in (levels[0], levels[1], levels[-1]))
    length, s, h = last - first, 0.0, (second - first) / (last - first)
    y = x / straight(levels[0])
    x0, k1 = look(y, levels[0])
    while s < 1:
        h = min(h, 1 - s) if s + 1.01 * h < 1 else 1 - s
        nxt = at(s + h) if s + h < 1 else levels[-1]
        _, k2 = look(y + h / 2 * k1, at(s + h / 2))
        _, k3 = look(y + 3 * h / 4 * k2, at(s + 3 * h / 4))
        there = y + h / 9 * (2 * k1 + 3 * k2 + 4 * k3)
        x0_there, k4 = look(there, nxt)
        error = h * (-5 * k1 + 6 * k2 + 8 * k3 - 9 * k4) / 72 / (atol + rtol * torch.maximum(y.abs(), there.abs()))
        size = error.square().flatten(1).mean(1).max().sqrt().item()
        if size <= 1:
            yield straight(nxt) * there, x0
            s, y, x0, k1 = s + h if nxt is not levels[-1] else 1.0, there, x0_there, k4
        h *= min(5.0, max(0.2, 0.9 * max(size, 1e-9) ** (-1 / 3)))
        if not h > 1e-7:
            raise ValueError(f"adaptive: no step is short enough for rtol {rtol}, atol {atol}: raise them")


@torch.no_grad()
def dpmpp_sde(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, eta=1.0, s_noise=1.0) -> Steps:
    """DPM-Solver++ SDE, from k-diffusion: DPM-Solver++(2S) (arXiv:2211.01095, Alg. 1, r = 1/2) in ancestral steps. Look
    half-way in lambda, then take the whole step with what was seen there: two calls per step, one from pure noise or to
    clean data, where there is no middle. The noise of the look is part of that of the step, as on k-diffusion's Brownian
    path in sigma / alpha, but drawn from our generators instead of its tree. (Independent, it doubles the error.)
    """
    for now, nxt in pairwise(levels):
        x0 = ahead = denoise(x, now)
        draw = lambda: s_noise * randn_like(x, generators) if eta > 0 and nxt.sigma > 0 else 0.0
        noise = draw()
        if now.alpha > 0 and nxt.sigma > 0:
            middle = _curve(levels)(math.sqrt(now.sigma / now.alpha * nxt.sigma / nxt.alpha))
            ahead = denoise(step(x, x0, now, middle, eta, lambda: noise), middle)
            share = 1 / (1 + math.sqrt(shrink(now, nxt)))  # of the path from now to nxt, in sigma / alpha
            noise = math.sqrt(share) * noise + math.sqrt(1 - share) * draw()
        x = step(x, ahead, now, nxt, eta, lambda: noise)
        yield x, x0


SAMPLERS = {
    sampler.__name__: sampler
    for sampler in (ddim, ddpm, euler, euler_a, heun, edm, adaptive, lms, pndm, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, unipc)
}

ALIASES = {"ancestral": "ddpm", "dpmpp2m": "dpmpp_2m", "dpm_pp_2m": "dpmpp_2m", "dpm_pp_2m_sde": "dpmpp_2m_sde",
           "dpm_pp_sde": "dpmpp_sde", "euler_ancestral": "euler_a", "plms": "pndm", "uni_pc": "unipc"}


def sampler_name(name: str) -> str:
    """The key in SAMPLERS of a name in any spelling: `DPM++ 2M`, `Euler a`, `PLMS`. Unknown names: ValueError."""
    spelled = name.strip().lower().replace("++", "pp").replace(" ", "_").replace("-", "_")
    spelled = ALIASES.get(spelled, spelled)
    lookup(SAMPLERS, spelled, "sampler")
    return spelled


def find_sampler(name: str) -> Callable[..., Steps]:
    """A sampler by name in any spelling. Unknown names: ValueError."""
    return SAMPLERS[sampler_name(name)]


def final(steps: Steps) -> Tensor:
    """Run a sampler to its end and return the last x."""
    x = None
    for x, _ in steps:
        pass
    if x is None:
        raise ValueError("the sampler took no step: pass at least two levels, as grid(process, steps) gives")
    return x
