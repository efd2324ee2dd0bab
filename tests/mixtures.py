"""Data of which everything is known: for a Gaussian mixture, E[x0 | x] has a closed form at every noise level."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyldm.diffusion.prediction import to_output
from tinyldm.diffusion.process import Flow, Level, at_size, input_scale


@dataclass(frozen=True)
class Mixture:
    """Images drawn from sum_k weight_k N(mean_k, std_k^2 I). At any noise level they are a mixture too, with means
    alpha mean_k and variances alpha^2 std_k^2 + sigma^2."""

    mean: Tensor  # [k, c, h, w] float64
    std: Tensor  # [k]
    weight: Tensor  # [k], sums to 1

    def sample(self, n: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.mean.shape[1:], generator=generator, dtype=torch.float64)
        return self.mean[k] + self.std[k].view(-1, 1, 1, 1) * noise

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """The denoiser: E[x0 | x], by Bayes over the modes."""
        alpha, sigma = level.alpha, level.sigma
        variance = (alpha * self.std) ** 2 + sigma**2  # [k]
        away = x[:, None] - alpha * self.mean  # [b, k, c, h, w]
        square = away.square().sum((2, 3, 4))  # [b, k]
        log_p = self.weight.log() - square / (2 * variance) - self.mean[0].numel() / 2 * variance.log()
        guess = self.mean + (alpha * self.std**2 / variance).view(-1, 1, 1, 1) * away
        return (log_p.softmax(1)[..., None, None, None] * guess).sum(1)

    def network(self, process, kind: str):
        """The denoiser as a network that predicts `kind`, and that knows of the level only its t."""
        if isinstance(at_size(process), Flow):
            process = Flow()  # a shift changes when a time comes, not what it means

        def net(x: Tensor, t: Tensor, cond: None) -> Tensor:
            assert bool((t == t[0]).all())
            t0 = t[:1].double() / 1000 if not hasattr(process, "alpha") else (t[:1].double() + 0.5) / len(process)
            level = Level(*(value.item() for value in process(t0)))
            x = x * input_scale(level)  # undo the scaling of guidance.denoiser
            x0 = self(x, level)
            return to_output(kind, x, x0, level)

        return net

    def line(self) -> Tensor:
        """The direction [c, h, w] of the line through 0 on which the means lie."""
        mean = self.mean[0]
        return torch.nn.functional.normalize(mean, dim=(0, 1, 2)) if mean.numel() > 1 else torch.ones_like(mean)

    def cdf(self, x: Tensor, level: Level) -> Tensor:
        """P(coordinate along the line < x) at this level; for images of a single pixel, P(pixel < x)."""
        std = ((level.alpha * self.std) ** 2 + level.sigma**2).sqrt()
        away = (x.reshape(-1, 1) - level.alpha * (self.mean * self.line()).sum((1, 2, 3))) / std
        return (self.weight * torch.special.ndtr(away)).sum(1).view_as(x)

    def carry(self, x: Tensor, start: Level, end: Level) -> Tensor:
        """The exact solution of the probability-flow ODE. In one dimension it keeps every quantile. In more dimensions it is
        known if the means lie on a line and all stds are equal: the ODE separates into the coordinate along that line and
        the rest, which is Gaussian."""
        along = (x * self.line()).sum((1, 2, 3), keepdim=True)
        wanted = self.cdf(along, start)
        low, high = torch.full_like(along, -20.0), torch.full_like(along, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, end) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        std = [math.hypot(level.alpha * self.std[0].item(), level.sigma) for level in (start, end)]
        return (low + high) / 2 * self.line() + (x - along * self.line()) * std[1] / std[0]
