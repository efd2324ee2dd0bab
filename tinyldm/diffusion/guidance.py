"""Guidance: from a network to a denoiser, and from a denoiser to a better one.

A denoiser is `denoise(x, level) -> x0`: its best guess of the clean image behind x. Samplers know nothing
else. Guidance takes a denoiser and returns one, so that several can be stacked. `cond` passes through
untouched: what it holds is between the caller and the network.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinyldm.diffusion.prediction import PREDICTIONS, Network, to_x0
from tinyldm.diffusion.process import Level
from tinyldm.lookup import lookup

Denoiser = Callable[[Tensor, Level], Tensor]


def denoiser(net: Network, cond: Any, prediction: str) -> Denoiser:
    """`net(x, t, cond)` as a function of (x, level). The answer is cast to x's dtype (float32, even when the
    network runs in bfloat16): samplers take differences that half precision would lose."""
    lookup(PREDICTIONS, prediction, "prediction")

    def denoise(x: Tensor, level: Level) -> Tensor:
        out = net(x, x.new_full((x.shape[0],), level.t), cond)  # [b, c, h, w]
        return to_x0(prediction, x, out.to(x.dtype), level)

    return denoise


def cfg(denoise_both: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance: (1 + w) conditional - w unconditional, w = scale - 1 (arXiv:2207.12598, Eq. 6).

    `denoise_both` is a denoiser over the doubled batch: its condition holds the b conditional entries first,
    then the b unconditional (or negative) ones, and one call answers both. The formula is the paper's for eps;
    at fixed x, x0 is linear in eps, v and the flow velocity, and the weights sum to 1, so it is the same for all.

    scale = 1 is the conditional model to the last bit, at twice the price: use the plain denoiser there.
    """

    def denoise(x: Tensor, level: Level) -> Tensor:
        conditional, unconditional = denoise_both(torch.cat([x, x]), level).chunk(2)
        return conditional + (scale - 1) * (conditional - unconditional)

    return denoise


def inpaint(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """Draw only where mask is 1: elsewhere x0 is `known` at every level, whatever the network says there.

    known: clean latents [1 or b, c, h, w]; mask: [1 or b, 1, h, w] in [0, 1]. Start from `known` noised to the first
    level. The network sees the known part at the right noise level in every step, as in arXiv:2201.09865, Eq. 8, and
    needs no training for it; the known part of x follows from x0 by the sampler's own step.
    """

    def masked(x: Tensor, level: Level) -> Tensor:
        return torch.lerp(known, denoise(x, level), mask)

    return masked
