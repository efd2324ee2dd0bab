"""The terms of an autoencoder's loss, by the names that --vae-loss knows.

Terms that compare pixels are means over a picture's values, and KL is a sum in nats. The weight of KL is in the units of
arXiv:2112.10752 (App. G), where *everything* is summed over the picture: there 1e-6 stands beside a sum of 3 h w absolute errors.
Beside means over these values the same weight is 1e-6 / (3 h w) per nat.

L1 and MSE prefer a blurred edge to a sharp one in a slightly wrong place. What makes reconstructions crisp is
LPIPS (published weights) and a discriminator (time). `edge`, `laplacian`, `fft` and `focal_frequency` cost almost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyldm.models.vae import Posterior

PYRAMID = 3                             # levels of the Laplacian pyramid, and a coarse picture that is left over


class Reconstruction(NamedTuple):
    """What the terms are computed from."""

    pixels: Tensor                      # [b, 3, h, w] in [-1, 1], what is to be reconstructed
    decoded: Tensor                     # the same shape
    posterior: Posterior
    z: Tensor                           # what was decoded, [b, c, h / f, w / f]
    decode: Callable[[Tensor], Tensor]
    compare: Callable[[Tensor, Tensor], Tensor]         # decoded, pixels -> [b]: the weighted sum of the terms that compare pixels


def mean(values: Tensor) -> Tensor:
    """[b, ...] -> [b]"""
    return values.flatten(1).mean(1)


def l1(decoded: Tensor, pixels: Tensor) -> Tensor:
    return mean((decoded - pixels).abs())


def mse(decoded: Tensor, pixels: Tensor) -> Tensor:
    return mean((decoded - pixels).square())


def edge(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Gradient difference loss (arXiv:1511.05440, Eq. 6, with alpha = 1): a step between neighbours should be as high as the original's."""
    return sum(mean((decoded.diff(dim=axis).abs() - pixels.diff(dim=axis).abs()).abs()) for axis in (2, 3))


def laplacian(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 between Laplacian pyramids (arXiv:1707.05776, with averages of 2 x 2 pixels in place of Gaussians). Its weight 4^j of level j,
    which has 4^j times fewer pixels, makes the means of all levels count the same."""
    return sum(mean(band.abs()) for band in bands(decoded - pixels))        # the pyramid is linear


def bands(x: Tensor) -> list[Tensor]:
    """A Laplacian pyramid of x [b, c, h, w], finest first: what halving the size by averages loses, and the coarse rest."""
    result = []
    for _ in range(PYRAMID):
        if min(x.shape[2:]) < 2:
            break
        coarse = F.avg_pool2d(x, 2, ceil_mode=True)
        result.append(x - F.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=False))
        x = coarse
    return [*result, x]


def spectrum_error(decoded: Tensor, pixels: Tensor) -> Tensor:
    """The Fourier coefficients of the error, [b, 3, h, w], complex. Orthonormal: their mean square is that of the error."""
    return torch.fft.fft2(decoded - pixels, norm="ortho")


def fft(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 between spectra, real and imaginary parts each (arXiv:2108.05054, at one scale)."""
    return mean(torch.view_as_real(spectrum_error(decoded, pixels)).abs())


def focal_frequency(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Focal frequency loss (arXiv:2012.12821, Eq. 8 and 9, alpha = 1): the squared error of a frequency, weighted by its size in
    proportion to the largest one of that picture and channel."""
    squared = torch.view_as_real(spectrum_error(decoded, pixels)).square().sum(-1)         # [b, 3, h, w]
    size = squared.detach().sqrt()
    return mean(size / size.amax((2, 3), keepdim=True).clamp(min=1e-12) * squared)


def scale_equivariance(made: Reconstruction) -> Tensor:
    """Latents of half the size should decode to the picture of half the size (arXiv:2502.14831), so that latents have no fine
    structure that is not the picture's, which diffusion finds hard to learn. One more decoding, of a quarter of the pixels."""
    return made.compare(made.decode(F.avg_pool2d(made.z, 2)).float(), F.avg_pool2d(made.pixels, 2))


class Term(NamedTuple):
    """A row of TERMS."""

    function: Callable[..., Tensor] | None      # (decoded, pixels) or, if not `pixels`, (Reconstruction) -> [b]; None: a network's
    default: float = 0.0                # its weight
    pixels: bool = True                 # whether it compares pixels
    summed: bool = False                # a sum over the picture, not a mean: its weight is divided by the number of values in a picture


TERMS: dict[str, Term] = {
    "l1": Term(l1, 1.0),
    "mse": Term(mse, 1.0),
    "lpips": Term(None),                # models/lpips.py
    "edge": Term(edge),
    "laplacian": Term(laplacian),
    "fft": Term(fft),
    "focal_frequency": Term(focal_frequency),
    # That is 1e-6 per nat at 64 px, and far more than the published 1e-6, for autoencoders that are trained in minutes.
    "kl": Term(lambda made: made.posterior.kl(), 0.012288, pixels=False, summed=True),
    "gan": Term(None, pixels=False),    # adversarial.py
    "se": Term(scale_equivariance, pixels=False),
}
