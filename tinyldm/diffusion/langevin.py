"""Langevin dynamics at a fixed noise level, and NCSN's sampler, which is nothing else.

    x <- x + a score(x) + sqrt(2 a) noise        score = (alpha x0 - x) / sigma^2: the gradient of log p(x), by Tweedie's formula

Repeated with small a, this draws from the level's own distribution and forgets where x came from. For a Gaussian of variance v,
steps of size a settle at the variance v / (1 - a / (2 v)): the larger the step, the wider. NCSN draws with it alone, on a ladder
of levels; `predictor_corrector` in samplers.py corrects the result of every ordinary step by it.
"""

from itertools import pairwise

import torch
from torch import Tensor

from tinyldm.diffusion.guidance import Denoiser
from tinyldm.diffusion.noise import Generators, randn_like
from tinyldm.diffusion.process import Level
from tinyldm.diffusion.step import Grid, Steps


def to_score(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    """The gradient of log p(x) at a level, which x0 implies (arXiv:2011.13456, Sec. 2.1, with x0 = E[x0 | x]). Needs sigma > 0."""
    return (level.alpha * x0 - x) / level.sigma**2


def langevin(x: Tensor, score: Tensor, noise: Tensor, a: float | Tensor) -> Tensor:
    """One step of size a, a number or [b, 1, 1, 1]; all others are [b, c, h, w]."""
    return x + a * score + (2 * a) ** 0.5 * noise


@torch.no_grad()
def annealed_langevin(
    denoise: Denoiser, x: Tensor, levels: Grid, generators: Generators = None, corrections: int = 10, size: float = 0.2
) -> Steps:
    """NCSN's sampler (arXiv:1907.05600, Alg. 1): at each level but the last, `corrections` Langevin steps of a = size sigma^2.
    As many calls per level.

    The paper takes 100 steps at each of ten levels from sigma = 1 to 0.01, with a = 2e-5 at the last, which is 0.2 sigma^2;
    NCSNv2 (arXiv:2006.09011) takes 5 steps of 0.062 sigma^2 at 232 levels. Between levels x / alpha stays as it is, and so
    does x on the paper's curve. The last level is clean data, where x is what the denoiser says of the last x, as in NCSNv2;
    the first paper leaves the last level's noise in.
    """
    for now, nxt in pairwise(levels):
        for _ in range(corrections):
            x0 = denoise(x, now)  # [b, c, h, w]
            x = langevin(x, to_score(x, x0, now), randn_like(x, generators), size * now.sigma**2)
        if nxt.sigma > 0:
            x = nxt.alpha / now.alpha * x if now.alpha > 0 else x  # pure noise has no signal to keep
        else:
            x0 = denoise(x, now)
            x = nxt.alpha * x0
        yield x, x0
