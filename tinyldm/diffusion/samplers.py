"""Samplers: how to step from one noise level to the next.

Each is a generator that yields (x, x0) after every step, so that progress bars, previews and early stops belong in the
caller's loop and need no arguments here. All have the signature `sampler(denoise, x, levels, generators=...)`, and none
changes its arguments.

    levels = grid(process, 30)
    generators = make_generators(range(seed, seed + b))
    x = initial_noise((4, 32, 32), generators).to(device)
    x = final(dpmpp_2m(denoise, x, levels))

x may start at alpha = 0 (pure noise) and end at sigma = 0 (clean data), where log(alpha / sigma) is infinite. edm, dpmpp_sde
and adaptive need `Levels` that know their curve, such as those of grid(). Multistep samplers are in multistep.py.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from tinyldm.diffusion.guidance import Denoised, Denoiser
from tinyldm.diffusion.langevin import annealed_langevin, langevin, to_score
from tinyldm.diffusion.multistep import dpmpp_2m, dpmpp_2m_sde, lms, pndm, unipc
from tinyldm.diffusion.noise import Generators, randn_like
from tinyldm.diffusion.prediction import to_eps
from tinyldm.diffusion.process import Level
from tinyldm.diffusion.step import Grid, Scale, Steps, shrink, step, straight
from tinyldm.lookup import lookup


@torch.no_grad()
def ddim(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, eta: float = 0.0) -> Steps:
    """DDIM (arXiv:2010.02502, Eq. 12): reuse the noise that x0 implies. eta > 0 redraws a part of it; 1 is `ddpm`."""
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)  # [b, c, h, w]
        x = step(x, x0, now, nxt, eta, lambda: randn_like(x, generators))
        yield x, x0


@torch.no_grad()
def ddpm(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None) -> Steps:
    """Ancestral sampling: draw from the posterior q(x_nxt | x, x0) (arXiv:2006.11239, Eqs. 6-7), written for any
    (alpha, sigma) as in arXiv:2107.00630, Appendix A.

    The variance is the posterior's, beta_tilde, the smaller of the two that DDPM considers. Pass `denoiser_with_variance`
    for a network that has learned it: -1 for beta_tilde, 1 for beta, log-linear in between (arXiv:2102.09672, Eq. 15 with
    v = (variance + 1) / 2).
    """
    for now, nxt in pairwise(levels):
        guess = denoise(x, now)
        x0, variance = guess if isinstance(guess, Denoised) else (guess, guess[:, :0])  # [b, c, h, w], [b, c or 0, h, w]
        kept = shrink(now, nxt) ** 2  # the fraction of x's variance given x0 that comes from x_nxt
        x = now.alpha / nxt.alpha * (nxt.sigma / now.sigma) ** 2 * x + nxt.alpha * (1 - kept) * x0
        std = nxt.sigma * math.sqrt(max(0.0, 1 - kept))
        if std > 0:
            if variance.shape[1]:
                std = std * (now.sigma / nxt.sigma) ** ((variance + 1) / 2)  # beta is (1 - kept) now.sigma^2
            x = x + std * randn_like(x, generators)
        yield x, x0


def euler_a(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None) -> Steps:
    """Euler ancestral, from k-diffusion: step down to less noise than the next level has, then add fresh noise up to it.

    In y = x / alpha and s = sigma / alpha the step goes to s_nxt^2 / s_now, and s_nxt sqrt(1 - (s_nxt / s_now)^2) is the
    noise that is added. s_nxt / s_now is the `shrink` of step.py, so this is ddim at eta = 1, and `ddpm`, in every term.
    Only the grids on which they are usually run differ.
    """
    return ddim(denoise, x, levels, generators, eta=1.0)


def euler(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None) -> Steps:
    """Euler's method on the probability-flow ODE d(x/alpha) = eps d(sigma/alpha) (arXiv:2206.00364, Eq. 4).

    On any curve and in any coordinate it keeps x0 and eps fixed: the same step as DDIM at eta = 0.
    """
    return ddim(denoise, x, levels)


@torch.no_grad()
def lcm(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None) -> Steps:
    """Multistep consistency sampling (arXiv:2303.01469, Alg. 1; LCMScheduler): take the guess of x0, and add fresh noise up to the next
    level. For networks whose every guess is a picture (consistency, lcm); what others guess at once is a blur."""
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        x = nxt.alpha * x0 + nxt.sigma * randn_like(x, generators) if nxt.sigma > 0 else nxt.alpha * x0
        yield x, x0


@torch.no_grad()
def heun(
    denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, scale: Scale = straight,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Steps:
    """Heun's second-order method: step, call the network again at the end of the step, and step with the mean of both
    slopes (arXiv:2206.00364, Alg. 1, and with s_churn, which adds noise before every step, Alg. 2). Two calls per step, one
    in the last: at sigma = 0 there is no noise left to predict.

    Unlike Euler's, the result depends on the coordinate y = x / scale. The paper's, scale = alpha, fails where alpha
    nears 0: from the noisy end of `cosine` its first step is 2e4 long. `straight` is finite everywhere, is t for flow,
    and on exact denoisers was the better one on Stable Diffusion's curve too, mostly by a factor of 2 to 4.
    """
    for now, nxt in pairwise(levels):
        if s_churn > 0 and now.alpha > 0 and s_tmin <= now.sigma / now.alpha <= s_tmax:
            growth = 1 + min(s_churn / (len(levels) - 1), math.sqrt(2) - 1)
            x, now = _churn(x, now, levels, growth, s_noise, generators)
        x0 = denoise(x, now)
        eps = to_eps(x, x0, now)
        da = nxt.alpha / scale(nxt) - now.alpha / scale(now)
        ds = nxt.sigma / scale(nxt) - now.sigma / scale(now)
        y, dy = x / scale(now), da * x0 + ds * eps  # y = (alpha x0 + sigma eps) / scale
        x = scale(nxt) * (y + dy)
        if nxt.sigma > 0:
            x0_nxt = denoise(x, nxt)
            dy_nxt = da * x0_nxt + ds * (x - nxt.alpha * x0_nxt) / nxt.sigma
            x = scale(nxt) * (y + (dy + dy_nxt) / 2)
        yield x, x0


def edm(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, **options: float) -> Steps:
    """EDM's stochastic sampler: `heun` with the paper's churn for ImageNet (arXiv:2206.00364, Alg. 2 and Table 5)."""
    churn = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    return heun(denoise, x, levels, generators, **churn | options)


def _churn(x: Tensor, now: Level, levels: Grid, growth: float, s_noise: float, generators: Generators):
    """Add noise to x until sigma / alpha is `growth` times as large -> (x, its level). It never exceeds the first level,
    because the network may not be trained beyond it."""
    limit = levels[0].sigma / levels[0].alpha if levels[0].alpha > 0 else math.inf
    noisier = _curve(levels)(min(growth * now.sigma / now.alpha, limit))
    std = math.sqrt(max(0.0, (noisier.sigma / noisier.alpha) ** 2 - (now.sigma / now.alpha) ** 2))
    return noisier.alpha * (x / now.alpha + std * s_noise * randn_like(x, generators)), noisier


def _curve(levels: Grid) -> Callable[[float], Level]:
    """The levels' curve: sigma / alpha -> Level."""
    if not hasattr(levels, "curve"):
        raise ValueError("this sampler needs levels between the given ones: pass Levels(levels, curve(process)), "
                         "such as those of grid()")
    return levels.curve


@torch.no_grad()
def adaptive(
    denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, rtol: float = 0.01, atol: float = 0.01
) -> Steps:
    """The probability-flow ODE with as many steps as it needs, by Bogacki and Shampine's pair of orders 3 and 2 (Applied
    Mathematics Letters 2(4), 1989). The difference of the two, a root mean square over each image, is kept below
    atol + rtol |y|.

    Any curve is a flow in y = x / (alpha + sigma) and u = sigma / (alpha + sigma): dy/du = eps - x0, and -x0 where no
    noise is left. Three calls per step, whether it is accepted or not. Of the levels, only the first two and the last are
    used: the ends, and the length of the first step to try. All images of a batch take the steps that the hardest needs.
    """

    def slope(y: Tensor, level: Level) -> tuple[Tensor, Tensor]:  # (x0, dy / ds), s as in `at`
        x0 = denoise(straight(level) * y, level) if level.sigma > 0 else y
        return x0, length * ((y - x0) * straight(level) / level.sigma if level.sigma > 0 else -y)

    def at(s: float) -> Level:  # s in [0, 1]: the fraction of the way from first to last, in u
        return _curve(levels)((u := first + s * length) / (1 - u))

    first, second, last = (level.sigma / straight(level) for level in (levels[0], levels[1], levels[-1]))
    length, s, h = last - first, 0.0, (second - first) / (last - first)
    y = x / straight(levels[0])
    x0, k1 = slope(y, levels[0])
    while s < 1:
        h = min(h, 1 - s) if s + 1.01 * h < 1 else 1 - s
        nxt = at(s + h) if s + h < 1 else levels[-1]
        _, k2 = slope(y + h / 2 * k1, at(s + h / 2))
        _, k3 = slope(y + 3 * h / 4 * k2, at(s + 3 * h / 4))
        y_nxt = y + h / 9 * (2 * k1 + 3 * k2 + 4 * k3)
        x0_nxt, k4 = slope(y_nxt, nxt)
        error = h * (-5 * k1 + 6 * k2 + 8 * k3 - 9 * k4) / 72 / (atol + rtol * torch.maximum(y.abs(), y_nxt.abs()))
        error = error.square().flatten(1).mean(1).max().sqrt().item()  # of the worst image, relative to the tolerance
        if error <= 1:
            yield straight(nxt) * y_nxt, x0
            s, y, x0, k1 = s + h if nxt is not levels[-1] else 1.0, y_nxt, x0_nxt, k4
        h *= min(5.0, max(0.2, 0.9 * max(error, 1e-9) ** (-1 / 3)))
        if not h > 1e-7:
            raise ValueError(f"adaptive: no step is short enough for rtol {rtol}, atol {atol}: raise them")


@torch.no_grad()
def dpmpp_sde(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, eta=1.0, s_noise=1.0) -> Steps:
    """DPM-Solver++ SDE, from k-diffusion: DPM-Solver++(2S) (arXiv:2211.01095, Alg. 1, r = 1/2) in ancestral steps. Step to
    the middle in lambda, call the network there, and take the whole step with that guess of x0. Two calls per step, one
    from pure noise or to clean data, where there is no middle. The noise of the half step is part of that of the whole
    step, as on k-diffusion's Brownian path in sigma / alpha, but drawn from `generators` instead of its Brownian tree. (With
    independent noise the error doubles.)
    """
    for now, nxt in pairwise(levels):
        x0 = x0_mid = denoise(x, now)
        draw = lambda: s_noise * randn_like(x, generators) if eta > 0 and nxt.sigma > 0 else 0.0
        noise = draw()
        if now.alpha > 0 and nxt.sigma > 0:
            middle = _curve(levels)(math.sqrt(now.sigma / now.alpha * nxt.sigma / nxt.alpha))
            x0_mid = denoise(step(x, x0, now, middle, eta, lambda: noise), middle)
            fraction = 1 / (1 + math.sqrt(shrink(now, nxt)))  # of the way from now to nxt in sigma / alpha, at the middle
            noise = math.sqrt(fraction) * noise + math.sqrt(1 - fraction) * draw()
        x = step(x, x0_mid, now, nxt, eta, lambda: noise)
        yield x, x0


@torch.no_grad()
def predictor_corrector(
    denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, predictor: Callable[..., Steps] = ddpm,
    corrections: int = 1, snr: float = 0.16,
) -> Steps:
    """Langevin steps at each level, of a = 2 (snr |noise| / |score|)^2, then the predictor's step to the next level
    (arXiv:2011.13456, Algs. 1 and 5). corrections + 1 calls per step where the predictor takes one.

    predictor: any sampler; `ddpm` is the paper's reverse diffusion up to the order of a step. It begins anew at each level, so
    multistep samplers have no past and are of first order. The published code takes the norms as means over the batch, so
    there a picture depends on those drawn with it; here each has its own.
    """
    norm = lambda y: torch.linalg.vector_norm(y, dim=(1, 2, 3), keepdim=True)  # [b, 1, 1, 1]
    for i, now in enumerate(levels[:-1]):
        for _ in range(corrections):
            score, noise = to_score(x, denoise(x, now), now), randn_like(x, generators)
            x = langevin(x, score, noise, 2 * (snr * norm(noise) / norm(score).clamp(min=1e-12)) ** 2)
        for x, x0 in predictor(denoise, x, levels[i : i + 2], generators=generators):
            yield x, x0


SAMPLERS = {
    sampler.__name__: sampler
    for sampler in (ddim, ddpm, euler, euler_a, lcm, heun, edm, adaptive, lms, pndm, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, unipc,
                    annealed_langevin, predictor_corrector)
}

ALIASES = {"ancestral": "ddpm", "dpmpp2m": "dpmpp_2m", "dpm_pp_2m": "dpmpp_2m", "dpm_pp_2m_sde": "dpmpp_2m_sde",
           "dpm_pp_sde": "dpmpp_sde", "euler_ancestral": "euler_a", "pc": "predictor_corrector", "plms": "pndm", "uni_pc": "unipc"}


def sampler_name(name: str) -> str:
    """A name in any spelling (`DPM++ 2M`, `Euler a`, `PLMS`) -> its key in SAMPLERS. Unknown names: ValueError."""
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
        raise ValueError("the sampler took no step: pass at least two levels, such as grid(process, steps)")
    return x
