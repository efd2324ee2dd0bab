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
from tinyldm.diffusion.prediction import to_target, to_x0
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


def euler_a(denoise: Denoiser, x: Tensor, levels: Sequence[Level], generators: Generators = None) -> Steps:
    """Euler ancestral, from k-diffusion: step down to less noise than wanted, then add the difference afresh.

    In y = x / alpha and s = sigma / alpha it steps to s_nxt^2 / s_now and adds s_nxt sqrt(1 - (s_nxt / s_now)^2) of
    noise. s_nxt / s_now is the shrink of `ddim`, so that this is ddim at eta = 1, and `ddpm`, to the last term: the
    three differ by where they are wont to stop and what they start from, which is the grid's matter.
    """
    return ddim(denoise, x, levels, generators, eta=1.0)


@torch.no_grad()
def euler(denoise: Denoiser, x: Tensor, levels: Sequence[Level], generators: Generators = None) -> Steps:
    """Euler's method on the probability-flow ODE d(x/alpha) = eps d(sigma/alpha) (arXiv:2206.00364, Eq. 4).

    On any curve and in any coordinate that is the line through x0 and eps: the same step as DDIM at eta = 0.
    """
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        x = _along_the_line(x, x0, now, nxt)
        yield x, x0


def straight(level: Level) -> float:
    """The scale that bends any curve into rectified flow: with y = x / scale the coefficients sum to 1."""
    return level.alpha + level.sigma


def signal(level: Level) -> float:
    """The scale of arXiv:2206.00364, k-diffusion and diffusers: y = x / alpha = x0 + (sigma / alpha) eps."""
    return level.alpha


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
def lms(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[Level],
    generators: Generators = None,
    scale: Callable[[Level], float] = straight,
) -> Steps:
    """Linear multistep, from k-diffusion: Adams-Bashforth over uneven steps (Hairer, Norsett, Wanner: Solving
    Ordinary Differential Equations I, Section III.5). It integrates the cubic through the last four slopes.

    The slopes are those of y = x / scale by s = sigma / scale. As in `heun` the result depends on the scale, and
    `signal` is the published one. `scale` must make (alpha, sigma) / scale run along a straight line, as these two do.
    """
    past: list[tuple[float, Tensor]] = []  # (s, dy / ds), the newest first
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        s, s_nxt = now.sigma / scale(now), nxt.sigma / scale(nxt)
        slope = (nxt.alpha / scale(nxt) - now.alpha / scale(now)) / (s_nxt - s) * x0 + eps
        past = [(s, slope), *past[:3]]
        weights = _lagrange_integrals([at for at, _ in past], s, s_nxt)
        y = x / scale(now) + sum(weight * slope for weight, (_, slope) in zip(weights, past))
        x = scale(nxt) * y
        yield x, x0


def _lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The integral from start to end of every Lagrange polynomial over up to four nodes: two Gauss-Legendre points
    are exact up to the third degree."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return [
        half * sum(math.prod((point - b) / (a - b) for b in nodes if b is not a) for point in points) for a in nodes
    ]


ADAMS_BASHFORTH = {  # by how many are remembered
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@torch.no_grad()
def pndm(
    denoise: Denoiser, x: Tensor, levels: Sequence[Level], generators: Generators = None, along: str = "eps"
) -> Steps:
    """Pseudo linear multistep, PLMS (arXiv:2202.09778, Eqs. 9 and 12): DDIM's step along a mean of the last four eps,
    weighted as Adams and Bashforth do for even steps. The first step is taken twice, the second time along the mean
    of its two ends, in place of the paper's Runge-Kutta start (so in latent diffusion's code): one call more.

    Of second order, because the steps are even in t only. diffusers takes the mean of what the network said;
    along="v" is that for a v network. It is of first order: v turns even where x0 and eps stay. From alpha = 0, where
    no mean eps tells x0, the first step is DDIM's.
    """
    count = len(levels) - 1
    past: list[Tensor] = []  # what a network that predicts `along` would have said, the newest first
    for i, (now, nxt) in enumerate(pairwise(levels), start=1):
        x0 = denoise(x, now)
        past = [_said(along, x, x0, now), *past[:3]]
        mean = sum(weight * out for weight, out in zip(ADAMS_BASHFORTH[len(past)], past))
        blind = along == "eps" and now.alpha == 0
        there = _along_the_line(x, x0 if blind else to_x0(along, x, mean, now), now, nxt)
        if i == 1 < count and not blind:
            mean = (mean + _said(along, there, denoise(there, nxt), nxt)) / 2
            there = _along_the_line(x, to_x0(along, x, mean, now), now, nxt)
        x = there
        yield x, x0


def _said(kind: str, x: Tensor, x0: Tensor, level: Level) -> Tensor:
    return to_target(kind, x0, (x - level.alpha * x0) / level.sigma, level)


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
        h = _lambda_step(now, nxt)
        ahead = x0  # the guess that holds in the middle of the step
        if math.isfinite(h) and math.isfinite(last_h) and (i < count or count >= 15):
            ahead = x0 + h / (2 * last_h) * (x0 - last_x0)
        x = _exponential(x, ahead, now, nxt)
        last_x0, last_h = x0, h
        yield x, x0


@torch.no_grad()
def unipc(denoise: Denoiser, x: Tensor, levels: Sequence[Level], generators: Generators = None) -> Steps:
    """UniPC-2 with B(h) = e^h - 1 (arXiv:2302.04867, Alg. 5-8, "bh2"): DPM-Solver++(2M) predicts, and once the network
    has answered there, that step is taken again with the answer. One call per step.

    The last step is of first order and remains uncorrected; so is the correction of the first step of first order.
    What is yielded is the prediction, which the network saw.
    """
    count = len(levels) - 1
    behind: tuple[Tensor, Level] | None = None  # where the last step began
    last_x0, last_h = None, math.inf
    pace, bend = 0.0, 0.0  # this step over the last, and x0 - last_x0 drawn on over this step
    for i, (now, nxt) in enumerate(pairwise(levels), start=1):
        x0 = denoise(x, now)
        if behind is not None:
            weights = _unic_weights(last_h, pace) if i > 2 else (0.0, 0.5)
            ahead = last_x0 + weights[0] * bend + weights[1] * (x0 - last_x0)
            x = _exponential(behind[0], ahead, behind[1], now)
        h = _lambda_step(now, nxt)
        pace = h / last_h if 1 < i < count else 0.0  # 0 too where the last step came from alpha = 0
        bend = pace * (x0 - last_x0) if pace else 0.0
        behind, last_x0, last_h = (x, now), x0, h
        x = _exponential(x, x0 + bend / 2, now, nxt)
        yield x, x0


def _unic_weights(h: float, pace: float) -> tuple[float, float]:
    """The weights of the bend behind and of the change ahead (arXiv:2302.04867, Eq. 5 with r = -1 / pace, for x0)."""
    change = math.expm1(-h)
    first = -change / h - 1
    b1, b2 = first / change, 2 * (-first / h - 1 / 2) / change
    behind = (b1 - b2) * pace / (1 + pace)
    return behind, b1 - behind


def _along_the_line(x: Tensor, x0: Tensor, now: Level, nxt: Level) -> Tensor:
    """To nxt with x0 and the noise that it implies held fixed."""
    return nxt.alpha * x0 + nxt.sigma * ((x - now.alpha * x0) / now.sigma)


def _exponential(x: Tensor, x0: Tensor, now: Level, nxt: Level) -> Tensor:
    """The same step, written with h, as exponential integrators are (arXiv:2211.01095, Eq. 9)."""
    return nxt.sigma / now.sigma * x - nxt.alpha * math.expm1(-_lambda_step(now, nxt)) * x0


def _lambda_step(now: Level, nxt: Level) -> float:
    """h, the step in lambda = log(alpha / sigma): infinite from pure noise and to clean data."""
    return (log_snr(nxt) - log_snr(now)) / 2


def _shrink(now: Level, nxt: Level) -> float:
    """exp(-h): 0 from pure noise or to clean data, else below 1."""
    return now.alpha * nxt.sigma / (nxt.alpha * now.sigma)


SAMPLERS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "lms": lms,
    "pndm": pndm,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
}

ALIASES = {
    "ancestral": "ddpm",
    "dpmpp2m": "dpmpp_2m",
    "dpm_pp_2m": "dpmpp_2m",
    "dpm_solverpp": "dpmpp_2m",
    "euler_ancestral": "euler_a",
    "plms": "pndm",
    "uni_pc": "unipc",
}


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
