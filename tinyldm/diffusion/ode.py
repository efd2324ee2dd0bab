"""The probability-flow ODE, solved from data to noise: inversion, and log p(image). Levels still run from noise to data."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from tinyldm.diffusion.guidance import Denoiser
from tinyldm.diffusion.prediction import to_eps
from tinyldm.diffusion.process import Level
from tinyldm.diffusion.step import Grid, Steps, straight


@torch.no_grad()
def invert(denoise: Denoiser, x: Tensor, levels: Grid, repeats: int = 3) -> Steps:
    """The noise from which `ddim` draws x, [b, c, h, w] at levels[-1] (arXiv:2010.02502, Section 4.3). DDIM's step is
    solved for its start by `repeats` fixed-point iterations, which contract for a true denoiser. They start from the eps of
    the previous step: at clean data that is 0, the limit of E[eps | x] = -sigma grad log p."""
    eps = torch.zeros_like(x)
    for low, high in pairwise(reversed(levels)):
        for _ in range(repeats):
            noisier = high.alpha * (x - low.sigma * eps) / low.alpha + high.sigma * eps
            x0 = denoise(noisier, high)
            eps = to_eps(noisier, x0, high) if high.alpha else to_eps(x, x0, low)  # else the old eps, unchanged
        x = high.alpha * (x - low.sigma * eps) / low.alpha + high.sigma * eps
        yield x, x0


@torch.no_grad()
def log_likelihood(denoise: Denoiser, x: Tensor, levels: Grid, probes: Tensor) -> Tensor:
    """log p(x) [b] in nats, of x [b, c, h, w] at levels[-1] (arXiv:2011.13456, Eq. 39). Heun's method along
    y = x / (alpha + sigma), s = sigma / (alpha + sigma), in which any curve is a flow: dy / ds = (y - x0) / s.
    p at levels[0] is N(0, alpha^2 + sigma^2), as for data of unit variance. probes: [k, b, c, h, w] such that the mean of
    v v^T is 1, either random signs (Eq. 40; unbiased) or sqrt(n) times the n = c h w unit vectors (exact)."""
    scale, n = straight, x[0].numel()

    def slope(y: Tensor, level: Level) -> tuple[Tensor, Tensor | int]:  # dy / ds and its divergence
        if level.sigma == 0:
            return -y, -n  # eps = 0, as in `invert`
        with torch.inference_mode(False), torch.enable_grad():
            noisy = (scale(level) * y).requires_grad_()
            x0 = denoise(noisy, level)
            traces = [(torch.autograd.grad(x0, noisy, v, retain_graph=True)[0] * v).flatten(1).sum(1) for v in probes]
        s = level.sigma / scale(level)
        return (y - x0.detach()) / s, (n - scale(level) * sum(traces) / len(probes)) / s

    y, total = x / scale(levels[-1]), 0.0
    for low, high in pairwise(reversed(levels)):
        ds, (dy, trace) = high.sigma / scale(high) - low.sigma / scale(low), slope(y, low)
        dy_high, trace_high = slope(y + ds * dy, high)
        y, total = y + ds / 2 * (dy + dy_high), total + ds / 2 * (trace + trace_high)
    std = math.hypot(levels[0].alpha, levels[0].sigma) / scale(levels[0])
    return torch.distributions.Normal(0.0, std).log_prob(y).flatten(1).sum(1) + total - n * math.log(scale(levels[-1]))
