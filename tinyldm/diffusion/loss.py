"""The training loss, its weights of noise levels, and how noise and times to train on are drawn.

Noise and times are arguments of the loss. The trainer makes them functions of (seed, step, position in the batch), so that
they do not depend on how a batch is split.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from tinyldm.diffusion.prediction import PREDICTIONS, Network, to_target, to_x0
from tinyldm.diffusion.process import Discrete, Flow, Level, Process, at_size, find_t, input_scale
from tinyldm.lookup import lookup

Weight = Callable[[Level], Tensor]
LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {  # (error, huber_c) -> loss, elementwise
    "mse": lambda error, c: error.square(),
    "l1": lambda error, c: error.abs(),
    # 2c (sqrt(e^2 + c^2) - c), pseudo-Huber (arXiv:2310.14189, Sec. 3.3): e^2 for small errors, 2c |e| for large ones
    "huber": lambda error, c: 2 * c * error.square() / ((error.square() + c**2).sqrt() + c),
}


def uniform_weight(level: Level) -> Tensor:
    """1 everywhere: the simple loss (arXiv:2006.11239, Eq. 14). [b, 1, 1, 1]."""
    return torch.ones_like(level.alpha)


def sample_losses(net: Network, x0: Tensor, eps: Tensor, t: Tensor, cond: Any, process: Process, *, prediction: str,
                  weight: Weight = uniform_weight, loss: str = "mse", huber_c: float = 0.1, mixed: Tensor | None = None) -> Tensor:
    """The weighted loss of every sample: x0, eps: [b, c, h, w]; t: [b] in [0, 1] -> [b] float32.

    `mixed` is the noise in x_t where it differs from eps, the noise of the target (see `make_noise`). A network with 2c
    output channels also learns its variance, by the hybrid loss simple + 0.001 L_vlb (arXiv:2102.09672, Eq. 16). L_vlb is a
    sum of T terms, estimated here from the one at t. It trains the variance alone, is not weighted, and is unbiased for
    uniform times.
    """
    now = process(t)  # alpha, sigma: [b, 1, 1, 1]
    x_t = now.alpha * x0 + now.sigma * (eps if mixed is None else mixed)
    target = to_target(prediction, x0, eps, now)
    out = net(x_t / input_scale(now), now.t, cond).to(target.dtype)  # float32, even when the network runs in bfloat16
    out, variance = out[:, : x0.shape[1]], out[:, x0.shape[1] :]  # [b, c, h, w], [b, 0 or c, h, w]
    losses = lookup(LOSSES, loss, "loss")(out - target, huber_c).flatten(1).mean(1)
    losses = weight(now).flatten() * losses  # flatten, or [b, 1, 1, 1] * [b] broadcasts silently
    if variance.shape[1]:
        x0_guess = to_x0(prediction, x_t, out.detach(), now)
        losses = losses + variational_bound(process, now, x0, x0_guess, variance) * (0.001 * len(process))
    return losses


def diffusion_loss(*batch: Any, **objective: Any) -> Tensor:
    """The mean of `sample_losses` of the same arguments: a scalar to call backward() on."""
    return sample_losses(*batch, **objective).mean()


def variational_bound(process: Process, now: Level, x0: Tensor, x0_guess: Tensor, variance: Tensor) -> Tensor:
    """L_{t-1} = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) of arXiv:2102.09672, Eq. 6, in bits per dimension, [b].

    p has the posterior's mean for x0 = x0_guess and the variance of Eq. 15: -1 in `variance` stands for beta_tilde, 1 for
    beta. At the first index it is -log p(x0 | x_1) (Eq. 5), here an ordinary density, because latents, unlike the paper's
    pixels, are not discrete.
    """
    if not isinstance(process, Discrete):
        raise ValueError("a learned variance lies between beta_tilde and beta, which only a discrete table has: "
                         "use scaled_linear, linear, cosine or betas")
    tables = bound_tables(process, x0.dtype, x0.device)  # [3, 1000]
    log_beta_tilde, log_beta, x0_weight = tables[:, now.t.long()].view(3, -1, 1, 1, 1)
    log_var = log_beta_tilde + (variance + 1) / 2 * (log_beta - log_beta_tilde)  # [b, c, h, w]
    square = (x0_weight * (x0 - x0_guess)).square() * (-log_var).exp()
    kl = log_var - log_beta_tilde + (log_beta_tilde - log_var).exp() - 1 + square
    nll = math.log(2 * math.pi) + log_var + square
    first = now.t.view(-1, 1, 1, 1) == 0
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(4)  # both are twice theirs, in nats


@lru_cache(maxsize=64)
def bound_tables(process: Discrete, dtype: torch.dtype, device: torch.device) -> Tensor:
    """log(beta_tilde), log(beta) and x0's weight in the posterior's mean (Eq. 11) at every index of a table, [3, 1000]. The copies are
    kept, as those of `process.tables` are."""
    last_alpha, last_sigma = (table.roll(1) for table in (process.alpha, process.sigma))  # at index t - 1
    last_alpha[0], last_sigma[0] = 1, 0
    ratio = 1 - (process.alpha * last_sigma / (last_alpha * process.sigma)) ** 2  # beta / sigma^2
    beta_tilde, beta = ratio * last_sigma**2, ratio * process.sigma**2  # Eq. 10
    beta_tilde[0] = beta_tilde[1]  # instead of 0, as in the paper's code
    return torch.stack([beta_tilde.log(), beta.log(), last_alpha * ratio]).to(device, dtype)


# (a = alpha^2, s = sigma^2, g = gamma) -> the weight of a squared error in v. The comments give the weight as the paper
# states it, for an error in x0 or in eps, with SNR = a / s. "edm" is EDM's with sigma_data = 1 (see prediction.py).
WEIGHTS = {
    "none": None,
    "min_snr": lambda a, s, g=5.0: torch.minimum(a, g * s) / (a + s),  # x0: min(SNR, g); arXiv:2303.09556, Sec. 3.4
    "soft_min_snr": lambda a, s, g=5.0: g * a * s / (a + g * s) / (a + s),  # x0: 1 / (1/SNR + 1/g); arXiv:2401.11605
    "p2": lambda a, s, g=1.0: a / (a + s) * (s / (a + s)) ** g,  # eps: 1 / (1 + SNR)^g; arXiv:2204.00227, Eq. 8
    "edm": lambda a, s, g=1.0: torch.ones_like(a),  # x0: (1 + sigma^2) / sigma^2 on VE; arXiv:2206.00364, Table 1
}
# (a, s) -> the weight of a squared error in this prediction that equals a weight of 1 on the same error in v.
ERRORS = {"eps": lambda a, s: (a + s) / a, "x0": lambda a, s: (a + s) / s, "v": lambda a, s: 1.0}


def make_weight(name: str, prediction: str, gamma: float | None = None, process: Process | None = None) -> Weight:
    """A weight by name. An error in x0 has the same weight whichever `prediction` it is measured in. gamma None: the usual
    value. ValueError for names that are not in WEIGHTS, for all but "none" with flow, and where the weight is unbounded on
    `process`.

    Refusing them on flow is a choice, not mathematics: weighing a level twice as much and drawing it twice as often have
    the same expected gradient (docs/diffusion.md). On flow this library leaves the choice to the times, as the literature
    does (arXiv:2403.03206, Section 3.1), so that it is made in one place.
    """
    v_weight = lookup(WEIGHTS, name, "loss weight")
    lookup(PREDICTIONS, prediction, "prediction")
    if v_weight is None:
        return uniform_weight
    if prediction == "flow" or isinstance(at_size(process), Flow):
        raise ValueError(f"{name} weighs the levels of a diffusion by their SNR; rectified flow chooses its levels by how often "
                         "they are drawn: use weight 'none' with times 'logit_normal', or another process with 'eps', 'v' or 'x0'")

    def weight(level: Level) -> Tensor:
        a, s = (value.square().clamp(min=1e-30) for value in (level.alpha, level.sigma))  # gives the limit instead of 0 / 0
        return v_weight(a, s, *([gamma] if gamma else [])) * ERRORS[prediction](a, s)

    if process is not None and (largest := weight(process(torch.tensor([0.0, 1.0]))).max().item()) > 1e6:
        raise ValueError(f"{name} gives an error in {prediction} the weight {largest:.0e} at an end of this process: predict 'v'")
    return weight


class Noise(NamedTuple):
    eps: Tensor  # the noise in the target
    mixed: Tensor  # the noise in x_t


def make_noise(shape: Sequence[int], generator: Generator, offset: float = 0.0, perturbation: float = 0.0) -> Noise:
    """Standard normal noise [b, c, h, w], float32 on the CPU. `offset` scales one more normal number per channel, which is
    added to all its pixels, so that the brightness of pictures is learned (www.crosslabs.org/blog/diffusion-with-offset-noise).
    `perturbation` scales noise that x_t contains and the target does not, to imitate the errors that accumulate in sampling
    (arXiv:2301.11706, Alg. 1)."""
    eps = torch.randn(shape, generator=generator)
    if offset:
        eps = eps + offset * torch.randn(*shape[:2], 1, 1, generator=generator)
    return Noise(eps, eps + perturbation * torch.randn(shape, generator=generator) if perturbation else eps)


def _truncated(u: Tensor, process: Process | None, mean: float = 0.5, scale: float = 0.2) -> Tensor:
    low, high = torch.special.ndtr((torch.tensor([0.0, 1.0], dtype=torch.float64) - mean) / scale)
    return mean + scale * torch.special.ndtri(low + u * (high - low))


T_SAMPLERS: dict[str, Callable[..., Tensor]] = {  # quantile functions: from a uniform u, or from a normal z, to t
    "uniform": lambda u, process, mean=0.0, scale=1.0: u,
    "normal": _truncated,
    "logit_normal": lambda z, process, mean=0.0, scale=1.0: torch.sigmoid(mean + scale * z),
    "mode": lambda u, process, mean=0.0, scale=1.29: u - scale * (torch.sin(torch.pi / 2 * u) ** 2 - u),
    "cosmap": lambda u, process, mean=0.0, scale=1.0: 1 - 1 / (1 + torch.tan(torch.pi / 2 * u)),
    "u_shaped": lambda u, process, mean=0.0, scale=4.0: 0.5 + torch.asinh((2 * u - 1) * math.sinh(scale / 2)) / scale,
    "log_normal": lambda z, process, mean=-1.2, scale=1.2: find_t(process, torch.exp(mean + scale * z)),
    "ladder": lambda u, process, mean=0.0, scale=10.0: (u * int(scale)).floor() / max(int(scale) - 1, 1),
}


def sample_t(kind: str, n: int, generator: Generator | None = None, mean: float | None = None, scale: float | None = None,
             process: Process | None = None, stratified: bool = False) -> Tensor:
    """Training times [n] in [0, 1), float32 on the CPU. mean and scale None: the defaults of this kind.

    normal: a Gaussian around the middle, truncated. logit_normal: Gaussian in logit(t) (arXiv:2403.03206, Eq. 19; a larger
    mean trains more on noise). mode, cosmap: Eqs. 20-21 of that paper, where `scale` is mode's s, -1 to 1.75.
    u_shaped: exp(scale t) + exp(scale (1 - t)), most at both ends (arXiv:2405.20320, Sec. 4.1). log_normal:
    Gaussian in log(sigma / alpha) of `process` (arXiv:2206.00364, Table 1). stratified: one draw from each of n equally
    likely intervals, so that every batch covers all levels. ladder: one of `scale` evenly spaced times, both ends among them, which
    on VE are the geometric ladder of NCSN (arXiv:1907.05600, Sec. 3); with eps-prediction the loss is NCSN's as well.
    """
    quantile, normal = lookup(T_SAMPLERS, kind, "time sampler"), kind in ("logit_normal", "log_normal")
    draw = (torch.randn if normal and not stratified else torch.rand)(n, generator=generator)
    if stratified:
        draw = (torch.special.ndtri if normal else torch.clone)((torch.arange(n) + draw.double()) / n)
    t = quantile(draw, process, **{k: v for k, v in (("mean", mean), ("scale", scale)) if v is not None})
    return t.float().clamp(0, 1 - 2**-24)
