"""Multistep samplers: more accuracy from one call per step, by reusing the guesses of past steps (see samplers.py)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tinyldm.diffusion.guidance import Denoiser
from tinyldm.diffusion.noise import Generators, randn_like
from tinyldm.diffusion.prediction import to_eps, to_output, to_x0
from tinyldm.diffusion.process import Level
from tinyldm.diffusion.step import Grid, Scale, Steps, lambda_step, step, straight


@torch.no_grad()
def lms(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, scale: Scale = straight) -> Steps:
    """Linear multistep, from k-diffusion: Adams-Bashforth over uneven steps (Hairer, Norsett, Wanner: Solving
    Ordinary Differential Equations I, Section III.5). It integrates the cubic through the last four slopes.

    A slope is that of y = x / scale with respect to s = sigma / scale. The result depends on the scale, as in `heun`;
    `signal` is the published one. (alpha, sigma) / scale must run along a straight line, as with `straight` and `signal`.
    """
    past: list[tuple[float, Tensor]] = []  # (s, dy / ds), newest first
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now)
        eps = to_eps(x, x0, now)
        s, s_nxt = now.sigma / scale(now), nxt.sigma / scale(nxt)
        slope = (nxt.alpha / scale(nxt) - now.alpha / scale(now)) / (s_nxt - s) * x0 + eps
        past = [(s, slope), *past[:3]]
        weights = _lagrange_integrals([node for node, _ in past], s, s_nxt)
        y = x / scale(now) + sum(weight * slope for weight, (_, slope) in zip(weights, past))
        x = scale(nxt) * y
        yield x, x0


def _lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The integral from start to end of each Lagrange polynomial over up to four nodes. Gauss-Legendre quadrature with
    two points is exact for them, because it is so up to the third degree."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return [half * sum(math.prod((point - b) / (a - b) for b in nodes if b is not a) for point in points) for a in nodes]


# Weights of the slopes, newest first, indexed by the number of past slopes, minus one.
ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@torch.no_grad()
def pndm(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, along: str = "eps") -> Steps:
    """Pseudo linear multistep, PLMS (arXiv:2202.09778, Eqs. 9 and 12): DDIM's step along a mean of the last four eps,
    with the weights of Adams and Bashforth for even steps. The first step is taken twice, the second time along the mean
    of the outputs at its two ends: one call more, in place of the paper's Runge-Kutta start, as in latent diffusion's code.

    It is of second order, because the steps are even in t only. diffusers averages the network's outputs. `along="v"` does
    the same for a v network, and is of first order: v turns even where x0 and eps stay. A mean eps determines no x0 at
    alpha = 0, so from there the first step is DDIM's.
    """
    count = len(levels) - 1
    past: list[Tensor] = []  # outputs of a network that predicts `along`, newest first
    for i, (now, nxt) in enumerate(pairwise(levels), start=1):
        x0 = denoise(x, now)
        past = [to_output(along, x, x0, now), *past[:3]]
        mean = sum(weight * out for weight, out in zip(ADAMS_BASHFORTH[len(past) - 1], past))
        undetermined = along == "eps" and now.alpha == 0
        x_nxt = step(x, x0 if undetermined else to_x0(along, x, mean, now), now, nxt)
        if i == 1 < count and not undetermined:
            mean = (mean + to_output(along, x_nxt, denoise(x_nxt, nxt), nxt)) / 2
            x_nxt = step(x, to_x0(along, x, mean, now), now, nxt)
        x = x_nxt
        yield x, x0


@torch.no_grad()
def dpmpp_2m(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, eta: float = 0.0, *,
             lower_order_final: bool | None = None, solver_type: str = "midpoint") -> Steps:
    """DPM-Solver++(2M) (arXiv:2211.01095, Alg. 2): second order from one call per step, by reusing the previous x0.

    The first step is of first order, and so is any whose step in lambda = log(alpha / sigma) is infinite.

    eta                replaces part of the noise, as in `ddim`
    lower_order_final  whether the last step is of first order too, because extrapolating over a long step hurts; None: if
                       there are fewer than 15 steps
    solver_type        "midpoint": the step is taken with x0 extrapolated to its middle in lambda. "heun": with the exact
                       integral of x0 as a straight line in lambda. The two differ in the third order of the step
    """
    count = len(levels) - 1
    ends_lower = count < 15 if lower_order_final is None else lower_order_final
    reach = {"midpoint": lambda h: 1 / 2, "heun": lambda h: -1 / math.expm1(-h) - 1 / h}[solver_type]
    last_x0, last_h = None, math.inf
    for i, (now, nxt) in enumerate(pairwise(levels), start=1):
        x0 = denoise(x, now)
        h = lambda_step(now, nxt)
        x0_mid = x0  # the guess of x0 at the middle of the step
        if h and math.isfinite(h) and math.isfinite(last_h) and (i < count or not ends_lower):
            x0_mid = x0 + reach(h * (1 + eta**2)) * h / last_h * (x0 - last_x0)  # an ancestral step is one of 2 h
        x = step(x, x0_mid, now, nxt, eta, lambda: randn_like(x, generators))
        last_x0, last_h = x0, h
        yield x, x0


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, eta: float = 1.0, **options) -> Steps:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, Section 5): DPM-Solver++(2M)'s guess of x0 in ancestral steps."""
    return dpmpp_2m(denoise, x, levels, generators, eta, **options)


@torch.no_grad()
def unipc(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, *, lower_order_final: bool = True,
          solver_type: str = "bh2", disable_corrector: Sequence[int] = ()) -> Steps:
    """UniPC-2 (arXiv:2302.04867, Alg. 5-8). DPM-Solver++(2M) predicts x at the next level. Once the network has been called
    on that x, the step is taken again with its output, the correction. One call per step.

    The last step is not corrected. The correction of the first step is of first order. What is yielded is the prediction, on
    which the network was called.

    lower_order_final  whether the last step is of first order; one to clean data always is
    solver_type        B(h), by which terms of the second order are weighted: e^h - 1 for "bh2", h for "bh1"
    disable_corrector  the steps, counted from 0, that are not corrected
    """
    count = len(levels) - 1
    before: tuple[Tensor, Level] | None = None  # x and level at the start of the previous step
    last_x0, last_h = None, math.inf
    ratio, change = 0.0, 0.0  # h / last_h, and the change of x0 over this step, extrapolated from the previous step
    # B(h) relative to e^h - 1, for x0; an infinite step has no term of the second order
    relative = {"bh1": lambda h: -h / math.expm1(-h) if math.isfinite(h) else 1.0, "bh2": lambda h: 1.0}[solver_type]
    for i, (now, nxt) in enumerate(pairwise(levels), start=1):
        x0 = denoise(x, now)
        if before is not None and i - 2 not in disable_corrector:
            weights = _unic_weights(last_h, ratio) if i > 2 else (0.0, relative(last_h) / 2)
            x0_mid = last_x0 + weights[0] * change + weights[1] * (x0 - last_x0)
            x = step(before[0], x0_mid, before[1], now)
        h = lambda_step(now, nxt)
        second = 1 < i and (i < count or not lower_order_final) and math.isfinite(h)
        ratio = h / last_h if second else 0.0  # also 0 after a step from alpha = 0, where last_h is infinite
        change = ratio * (x0 - last_x0) if ratio else 0.0
        before, last_x0, last_h = (x, now), x0, h
        x = step(x, x0 + relative(h) / 2 * change if ratio else x0, now, nxt)
        yield x, x0


def _unic_weights(h: float, ratio: float) -> tuple[float, float]:
    """Weights of the extrapolated and of the observed change of x0 (arXiv:2302.04867, Eq. 5 with r = -1 / ratio, for x0)."""
    growth = math.expm1(-h)
    first = -growth / h - 1
    b1, b2 = first / growth, 2 * (-first / h - 1 / 2) / growth
    extrapolated = (b1 - b2) * ratio / (1 + ratio)
    return extrapolated, b1 - extrapolated
