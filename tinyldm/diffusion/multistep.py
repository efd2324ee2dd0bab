"""Samplers that remember: more accuracy from one call per step, by drawing on the last answers (see samplers.py)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tinyldm.diffusion.guidance import Denoiser
from tinyldm.diffusion.prediction import to_target, to_x0
from tinyldm.diffusion.process import Level
from tinyldm.diffusion.step import Grid, Scale, Steps, lambda_step, step, straight
from tinyldm.noise import Generators, randn_like


@torch.no_grad()
def lms(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, scale: Scale = straight) -> Steps:
    """Linear multistep, from k-diffusion: Adams-Bashforth over uneven steps (Hairer, Norsett, Wanner: Solving
    Ordinary Differential Equations I, Section III.5). It integrates the cubic through the last four slopes.

    The slopes are those of y = x / scale by s = sigma / scale, on which the result depends as in `heun`; `signal` is the
    published one. `scale` must make (alpha, sigma) / scale run along a straight line, as these two do."""
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
    return [half * sum(math.prod((point - b) / (a - b) for b in nodes if b is not a) for point in points) for a in nodes]


ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))  # by how many


@torch.no_grad()
def pndm(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, along: str = "eps") -> Steps:
    """Pseudo linear multistep, PLMS (arXiv:2202.09778, Eqs. 9 and 12): DDIM's step along a mean of the last four eps,
    weighted as Adams and Bashforth do for even steps. The first step is taken twice, the second time along the mean
    of its two ends, in place of the paper's Runge-Kutta start (so in latent diffusion's code): one call more.

    Of second order, because the steps are even in t only. diffusers takes the mean of what the network said; along="v" is
    that for a v network, of first order: v turns even where x0 and eps stay. From alpha = 0, where no mean eps tells x0,
    the first step is DDIM's.
    """
    count = len(levels) - 1
    past: list[Tensor] = []  # what a network that predicts `along` would have said, the newest first
    for i, (now, nxt) in enumerate(pairwise(levels), start=1):
        x0 = denoise(x, now)
        past = [_said(along, x, x0, now), *past[:3]]
        mean = sum(weight * out for weight, out in zip(ADAMS_BASHFORTH[len(past) - 1], past))
        blind = along == "eps" and now.alpha == 0
        there = step(x, x0 if blind else to_x0(along, x, mean, now), now, nxt)
        if i == 1 < count and not blind:
            mean = (mean + _said(along, there, denoise(there, nxt), nxt)) / 2
            there = step(x, to_x0(along, x, mean, now), now, nxt)
        x = there
        yield x, x0


def _said(kind: str, x: Tensor, x0: Tensor, level: Level) -> Tensor:
    return to_target(kind, x0, (x - level.alpha * x0) / level.sigma, level)


@torch.no_grad()
def dpmpp_2m(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, eta: float = 0.0) -> Steps:
    """DPM-Solver++(2M) (arXiv:2211.01095, Alg. 2): second order from one call per step, by remembering the last.

    First order where the step in lambda = log(alpha / sigma) is infinite, at the first step, and at the last of
    fewer than 15, where extrapolating over a long step hurts. eta renews noise as in `ddim`.
    """
    count = len(levels) - 1
    last_x0, last_h = None, math.inf
    for i, (now, nxt) in enumerate(pairwise(levels), start=1):
        x0 = denoise(x, now)
        h = lambda_step(now, nxt)
        ahead = x0  # the guess that holds in the middle of the step
        if math.isfinite(h) and math.isfinite(last_h) and (i < count or count >= 15):
            ahead = x0 + h / (2 * last_h) * (x0 - last_x0)
        x = step(x, ahead, now, nxt, eta, lambda: randn_like(x, generators))
        last_x0, last_h = x0, h
        yield x, x0


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, eta: float = 1.0) -> Steps:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, Section 5): DPM-Solver++(2M)'s guess in ancestral steps."""
    return dpmpp_2m(denoise, x, levels, generators, eta)


@torch.no_grad()
def unipc(denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None) -> Steps:
    """UniPC-2 with B(h) = e^h - 1 (arXiv:2302.04867, Alg. 5-8, "bh2"): DPM-Solver++(2M) predicts, and once the network
    has answered there, that step is taken again with the answer. One call per step.

    The last step is of first order and remains uncorrected; so is the correction of the first step. What is yielded is
    the prediction, which the network saw.
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
            x = step(behind[0], ahead, behind[1], now)
        h = lambda_step(now, nxt)
        pace = h / last_h if 1 < i < count else 0.0  # 0 too where the last step came from alpha = 0
        bend = pace * (x0 - last_x0) if pace else 0.0
        behind, last_x0, last_h = (x, now), x0, h
        x = step(x, x0 + bend / 2, now, nxt)
        yield x, x0


def _unic_weights(h: float, pace: float) -> tuple[float, float]:
    """The weights of the bend behind and of the change ahead (arXiv:2302.04867, Eq. 5 with r = -1 / pace, for x0)."""
    change = math.expm1(-h)
    first = -change / h - 1
    b1, b2 = first / change, 2 * (-first / h - 1 / 2) / change
    behind = (b1 - b2) * pace / (1 + pace)
    return behind, b1 - behind
