"""Data that are one Gaussian, whose curves of the probability-flow ODE are closed formulas."""

import torch

MEAN, STD = 0.4, 0.5                # of the data


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def along(x, now, nxt):
    """Where the curve of Gaussian data through x at the level `now` is at `nxt`: standard scores stay."""
    std = lambda at: (at.alpha**2 * STD**2 + at.sigma**2) ** 0.5
    return nxt.alpha * MEAN + (x - now.alpha * MEAN) * std(nxt) / std(now)


def exact_x0(x, at):
    """E[x0 | x] of Gaussian data."""
    return MEAN + at.alpha * STD**2 / (at.alpha**2 * STD**2 + at.sigma**2) * (x - at.alpha * MEAN)
