"""Guidance: from a network to a denoiser, and from a denoiser to a better one.

A denoiser is `denoise(x, level) -> x0`: its best guess of the clean image behind x. Samplers know nothing
else. Guidance takes a denoiser and returns one, so that several can be stacked. `cond` passes through
untouched: what it holds is between the caller and the network.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinyldm.diffusion.prediction import PREDICTIONS, Network, to_target, to_x0
from tinyldm.diffusion.process import Level, input_scale
from tinyldm.lookup import lookup

Denoiser = Callable[[Tensor, Level], Tensor]


def denoiser(net: Network, cond: Any, prediction: str, spread: list[Tensor] | None = None) -> Denoiser:
    """`net(x, t, cond)` as a function of (x, level). The answer is cast to x's dtype (float32, even when the
    network runs in bfloat16): samplers take differences that half precision would lose.

    A network that learned its variance answers with twice x's channels. `spread` is a list that holds the second half
    of the last answer: for `ddpm(..., spread=lambda: spread[0])`, where cfg doubles the batch `spread[0][:b]`.
    """
    lookup(PREDICTIONS, prediction, "prediction")

    def denoise(x: Tensor, level: Level) -> Tensor:
        out = net(x / input_scale(level), x.new_full((x.shape[0],), level.t), cond).to(x.dtype)  # [b, c or 2c, h, w]
        if spread is not None:
            spread[:] = [out[:, x.shape[1] :]]
        return to_x0(prediction, x, out, level)

    return denoise


def cfg(denoise_both: Denoiser, scale: float, rescale: float = 0.0, prediction: str = "x0") -> Denoiser:
    """Classifier-free guidance: (1 + w) conditional - w unconditional, w = scale - 1 (arXiv:2207.12598, Eq. 6).

    `denoise_both` is a denoiser over the doubled batch: its condition holds the b conditional entries first,
    then the b unconditional (or negative) ones, and one call answers both. The formula is the paper's for eps;
    at fixed x, x0 is linear in eps, v and the flow velocity, and the weights sum to 1, so it is the same for all.

    rescale in [0, 1] gives the guided answer back that share of the standard deviation of the conditional one, over
    each sample (arXiv:2305.08891, Eqs. 15-16). Unlike guidance it depends on what is scaled: published code scales what
    the network said, so pass its `prediction`. Only where alpha = 0 do x0 and v give the same.

    scale = 1 is the conditional model to the last bit, at twice the price: use the plain denoiser there.
    """
    lookup(PREDICTIONS, prediction, "prediction")

    def denoise(x: Tensor, level: Level) -> Tensor:
        conditional, unconditional = denoise_both(torch.cat([x, x]), level).chunk(2)
        guided = conditional + (scale - 1) * (conditional - unconditional)
        if not rescale:
            return guided
        said = lambda x0: to_target(prediction, x0, (x - level.alpha * x0) / level.sigma, level)
        out, std = said(guided), said(conditional).std((1, 2, 3), keepdim=True)
        ratio = std / out.std((1, 2, 3), keepdim=True)
        return to_x0(prediction, x, out * (1 + rescale * (ratio - 1)), level)

    return denoise


def interval(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """Guidance where low < sigma / alpha <= high (arXiv:2404.07724, Eq. 5); elsewhere `plain`, the conditional
    denoiser, answers alone, at half the cost. On any curve these are the paper's sigmas; pure noise is at infinity."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        noise = level.sigma / level.alpha if level.alpha else math.inf
        return (guided if low < noise <= high else plain)(x, level)

    return denoise


def dynamic_threshold(denoise: Denoiser, share: float = 0.995, bound: float = 1.0) -> Denoiser:
    """Of each x0, the size s that `share` of its values stay below; where s > bound, clip to s and shrink to bound
    (arXiv:2205.11487, Section 2.3). For pixels in [-1, 1]; latents have no range, and only the caller knows a bound."""

    def clipped(x: Tensor, level: Level) -> Tensor:
        x0 = denoise(x, level)
        s = x0.abs().flatten(1).quantile(share, 1).clamp(min=bound).view(-1, 1, 1, 1)
        return x0.clamp(-s, s) * (bound / s)

    return clipped


def classifier_guidance(denoise: Denoiser, log_p: Denoiser, scale: float = 1.0) -> Denoiser:
    """Steer by log_p(x, level) = log p(y | x_t), [b], of a classifier that knows noisy images: Eq. 14 of
    arXiv:2105.05233, eps - scale sigma grad log p, as x0 + scale sigma^2 / alpha grad log p. scale = 1 is Bayes' rule.
    Pure noise (alpha = 0) says nothing about y, and is left alone."""

    def steered(x: Tensor, level: Level) -> Tensor:
        if level.alpha == 0:
            return denoise(x, level)
        with torch.inference_mode(False), torch.enable_grad():
            noisy = x.clone().requires_grad_()
            gradient = torch.autograd.grad(log_p(noisy, level).sum(), noisy)[0]
        return denoise(x, level) + scale * level.sigma**2 / level.alpha * gradient

    return steered


def inpaint(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """Draw only where mask is 1: elsewhere x0 is `known` at every level, whatever the network says there.

    known: clean latents [1 or b, c, h, w]; mask: [1 or b, 1, h, w] in [0, 1]. Start from `known` noised to the first
    level. The network sees the known part at the right noise level in every step, as in arXiv:2201.09865, Eq. 8, and
    needs no training for it; the known part of x follows from x0 by the sampler's own step.
    """

    def masked(x: Tensor, level: Level) -> Tensor:
        return torch.lerp(known, denoise(x, level), mask)

    return masked
