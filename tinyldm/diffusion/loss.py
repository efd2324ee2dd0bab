"""The training loss, how it weighs noise levels, and the noise and times to train on, which come in as arguments: the
trainer makes them functions of (seed, step, position in the batch), so that they do not depend on how a batch is split.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from tinyldm.diffusion.prediction import PREDICTIONS, Network, to_target, to_x0
from tinyldm.diffusion.process import Discrete, Flow, Level, Process, find_t, input_scale
from tinyldm.lookup import lookup

Weight = Callable[[Level], Tensor]
LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {  # (error, huber_c) -> what it costs
    "mse": lambda error, c: error.square(),
    "l1": lambda error, c: error.abs(),
    # 2c (sqrt(e^2 + c^2) - c), pseudo-Huber (arXiv:2310.14189, Sec. 3.3) per element: e^2 near 0, 2c |e| far off
    "huber": lambda error, c: 2 * c * error.square() / ((error.square() + c**2).sqrt() + c),
}


def uniform_weight(level: Level) -> Tensor:
    """1 everywhere: the simple loss (arXiv:2006.11239, Eq. 14). [b, 1, 1, 1]."""
    return torch.ones_like(level.alpha)


def sample_losses(net: Network, x0: Tensor, eps: Tensor, t: Tensor, cond: Any, process: Process, *, prediction: str,
                  weight: Weight = uniform_weight, loss: str = "mse", huber_c: float = 0.1, mixed: Tensor | None = None) -> Tensor:
    """The weighted loss of every sample: x0, eps: [b, c, h, w]; t: [b] in [0, 1] -> [b] float32.

    `mixed` is the noise in x_t where it is not eps, the target's (`make_noise`). A network that answers with 2c channels
    learns its variance by the hybrid loss, simple + 0.001 L_vlb (arXiv:2102.09672, Eq. 16): L_vlb, T terms of which one is
    drawn, teaches the variance alone. It is not weighted, and unbiased for uniform times.
    """
    now = process(t)  # alpha, sigma: [b, 1, 1, 1]
    x_t = now.alpha * x0 + now.sigma * (eps if mixed is None else mixed)
    target = to_target(prediction, x0, eps, now)
    out = net(x_t / input_scale(now), now.t, cond).to(target.dtype)  # float32, even when the network runs in bfloat16
    said, variance = out[:, : x0.shape[1]], out[:, x0.shape[1] :]
    losses = lookup(LOSSES, loss, "loss")(said - target, huber_c).flatten(1).mean(1)
    losses = weight(now).flatten() * losses  # flatten, or [b, 1, 1, 1] * [b] broadcasts silently
    if variance.shape[1]:
        guess = to_x0(prediction, x_t, said.detach(), now)
        losses = losses + variational_bound(process, now, x0, guess, variance) * (0.001 * len(process))
    return losses


def diffusion_loss(*batch: Any, **objective: Any) -> Tensor:
    """The mean of `sample_losses`, which takes the same arguments: a scalar to call backward() on."""
    return sample_losses(*batch, **objective).mean()


def variational_bound(process: Process, now: Level, x0: Tensor, guess: Tensor, variance: Tensor) -> Tensor:
    """L_{t-1} = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) of arXiv:2102.09672, Eq. 6, in bits per dimension, [b].

    p has the posterior's mean for x0 = guess and the variance of Eq. 15, where -1 in `variance` is beta~ and 1 is beta. At
    the first index it is -log p(x0 | x_1) (Eq. 5), a plain density: latents, unlike the paper's pixels, are not discrete.
    """
    if not isinstance(process, Discrete):
        raise ValueError("learned variance lies between the two of a table's step: use scaled_linear, linear, cosine or betas")
    before_alpha, before_sigma = (table.roll(1) for table in (process.alpha, process.sigma))
    before_alpha[0], before_sigma[0] = 1, 0
    fresh = 1 - (process.alpha * before_sigma / (before_alpha * process.sigma)) ** 2  # beta / sigma^2
    small, large = fresh * before_sigma**2, fresh * process.sigma**2  # beta~ (Eq. 10), beta
    small[0] = small[1]  # instead of 0, as in the paper's code
    tables = torch.stack([small.log(), large.log(), before_alpha * fresh]).to(x0)  # the last: of x0 in the mean (Eq. 11)
    log_small, log_large, pull = tables[:, now.t.long()].view(3, -1, 1, 1, 1)
    log_var = log_small + (variance + 1) / 2 * (log_large - log_small)  # [b, c, h, w]
    square = (pull * (x0 - guess)).square() * (-log_var).exp()
    kl, first = log_var - log_small + (log_small - log_var).exp() - 1 + square, now.t.view(-1, 1, 1, 1) == 0
    return torch.where(first, math.log(2 * math.pi) + log_var + square, kl).flatten(1).mean(1) / math.log(4)


WEIGHTS = {  # (a = alpha^2, s = sigma^2, gamma) -> what an error in v weighs; in the papers' terms, with SNR = a / s:
    "none": None,
    "min_snr": lambda a, s, g=5.0: torch.minimum(a, g * s) / (a + s),  # x0: min(SNR, g); arXiv:2303.09556, Sec. 3.4
    "soft_min_snr": lambda a, s, g=5.0: g * a * s / (a + g * s) / (a + s),  # x0: 1 / (1/SNR + 1/g); arXiv:2401.11605
    "p2": lambda a, s, g=1.0: a / (a + s) * (s / (a + s)) ** g,  # eps: 1 / (1 + SNR)^g; arXiv:2204.00227, Eq. 8
    "edm": lambda a, s, g=1.0: torch.ones_like(a),  # x0: (1 + sigma^2) / sigma^2 on VE; arXiv:2206.00364, Table 1
}
ERRORS = {"eps": lambda a, s: (a + s) / a, "x0": lambda a, s: (a + s) / s, "v": lambda a, s: 1.0}  # over one in v


def make_weight(name: str, prediction: str, gamma: float | None = None, process: Process | None = None) -> Weight:
    """A weight by name: the same for the same x0 error, however it is said. gamma None: the usual one. ValueError for names
    that are not in WEIGHTS, for any but "none" with flow, and for one without a bound on `process`."""
    of_v = lookup(WEIGHTS, name, "loss weight")
    lookup(PREDICTIONS, prediction, "prediction")
    if of_v is None:
        return uniform_weight
    if prediction == "flow" or isinstance(process, Flow):
        raise ValueError(f"{name} weighs levels of a diffusion by their SNR; rectified flow chooses its levels by how often it "
                         "draws them: use weight 'none' with times 'logit_normal', or another process with 'eps', 'v' or 'x0'")

    def weight(level: Level) -> Tensor:
        a, s = (value.square().clamp(min=1e-30) for value in (level.alpha, level.sigma))  # at the ends the limit, not 0 / 0
        return of_v(a, s, *([gamma] if gamma else [])) * ERRORS[prediction](a, s)

    if process is not None and (most := weight(process(torch.tensor([0.0, 1.0]))).max().item()) > 1e6:
        raise ValueError(f"{name} gives an error in {prediction} the weight {most:.0e} at an end of this process: predict 'v'")
    return weight


class Noise(NamedTuple):
    eps: Tensor  # what the target is made of
    mixed: Tensor  # what x_t is made of


def make_noise(shape: Sequence[int], generator: Generator, offset: float = 0.0, perturbation: float = 0.0) -> Noise:
    """Standard normal [b, c, h, w], float32 on the CPU. `offset` adds that much of one number per channel, so that the
    brightness of pictures is learned (www.crosslabs.org/blog/diffusion-with-offset-noise); `perturbation` mixes in so much
    more noise than the target tells, like errors while sampling (arXiv:2301.11706, Alg. 1)."""
    eps = torch.randn(shape, generator=generator)
    if offset:
        eps = eps + offset * torch.randn(*shape[:2], 1, 1, generator=generator)
    return Noise(eps, eps + perturbation * torch.randn(shape, generator=generator) if perturbation else eps)


def _truncated(u: Tensor, process: Process | None, mean: float = 0.5, scale: float = 0.2) -> Tensor:
    low, high = torch.special.ndtr((torch.tensor([0.0, 1.0], dtype=torch.float64) - mean) / scale)
    return mean + scale * torch.special.ndtri(low + u * (high - low))


T_SAMPLERS: dict[str, Callable[..., Tensor]] = {  # of a uniform u, or a normal z: quantile functions
    "uniform": lambda u, process, mean=0.0, scale=1.0: u,
    "normal": _truncated,
    "logit_normal": lambda z, process, mean=0.0, scale=1.0: torch.sigmoid(mean + scale * z),
    "mode": lambda u, process, mean=0.0, scale=1.29: u - scale * (torch.sin(torch.pi / 2 * u) ** 2 - u),
    "cosmap": lambda u, process, mean=0.0, scale=1.0: 1 - 1 / (1 + torch.tan(torch.pi / 2 * u)),
    "log_normal": lambda z, process, mean=-1.2, scale=1.2: find_t(process, torch.exp(mean + scale * z)),
}


def sample_t(kind: str, n: int, generator: Generator | None = None, mean: float | None = None, scale: float | None = None,
             process: Process | None = None, stratified: bool = False) -> Tensor:
    """Training times [n] in [0, 1), float32 on the CPU; mean and scale None: the kind's own.

    normal: a Gaussian around the middle, truncated. logit_normal: Gaussian in logit(t) (arXiv:2403.03206, Eq. 19; a larger
    mean trains more on noise). mode, cosmap: Eqs. 20-21 there, `scale` is mode's s, -1 to 1.75. log_normal: Gaussian in
    log(sigma / alpha) of `process` (arXiv:2206.00364, Table 1). stratified: one from each n-th of the distribution.
    """
    quantile, normal = lookup(T_SAMPLERS, kind, "time sampler"), kind in ("logit_normal", "log_normal")
    number = (torch.randn if normal and not stratified else torch.rand)(n, generator=generator)
    if stratified:
        number = (torch.special.ndtri if normal else torch.clone)((torch.arange(n) + number.double()) / n)
    t = quantile(number, process, **{k: v for k, v in (("mean", mean), ("scale", scale)) if v is not None})
    return t.float().clamp(0, 1 - 2**-24)
