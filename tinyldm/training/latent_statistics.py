"""What latents look like to a network that is to be trained on them: scale, correlation of channels, spectrum.

Diffusion learns coarse structure first and fine structure last, as pictures have it: their spectra fall steeply. Latents of an
autoencoder may have a flat spectrum, with fine structure that no picture needs and that is hard to learn (arXiv:2502.14831, Fig. 2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

BINS = 16                           # of a spectrum, at most: more than half of the side leave some empty


def latent_statistics(z: Tensor, pixels: Tensor) -> dict[str, Any]:
    """Of raw latents [n, c, h, w], and the pictures [n, 3, H, W] that they belong to, for a row of the log:

    mean, std                   of each channel
    correlation                 of the channels, c rows of c numbers
    largest_correlation         the largest absolute value beside the diagonal; 0 where there is one channel
    spectrum, picture_spectrum  see `spectrum`"""
    z = z.float().cpu()
    values = z.transpose(0, 1).flatten(1).double()                                                  # [c, n*h*w]
    matrix = torch.corrcoef(values).nan_to_num().view(len(values), len(values))                     # nan: a channel without variance
    beside = (matrix - matrix.diagonal().diag()).abs()
    return {"mean": values.mean(1).tolist(), "std": values.std(1, correction=0).tolist(), "correlation": matrix.tolist(),
            "largest_correlation": float(beside.max()), "spectrum": spectrum(z), "picture_spectrum": spectrum(pixels.float().cpu())}


def spectrum(x: Tensor) -> list[float]:
    """The mean power of [n, c, h, w] by frequency: the squares of DCT-II coefficients in rings. Ring i of k has frequencies from
    i / k to (i + 1) / k of the highest one along an axis; the mean of a picture is in none. Channels are brought to variance 1 before, so
    white noise has power 1 everywhere, and latents and pictures can be compared."""
    h, w = x.shape[2:]
    x = x - x.mean((0, 2, 3), keepdim=True)
    x = x / x.std((0, 2, 3), correction=0, keepdim=True).clamp(min=1e-12)
    power = (dct_matrix(h).to(x) @ x @ dct_matrix(w).to(x).T).square().mean((0, 1))                 # [h, w]
    radius = ((torch.arange(h)[:, None] / h).square() + (torch.arange(w) / w).square()).sqrt()
    bins = min(BINS, h // 2, w // 2)
    ring = (radius * bins).long().flatten()                                                         # beyond `bins`: only diagonal ones
    ring[0] = 2 * bins                                                                              # the mean
    sums, counts = (torch.zeros(2 * bins + 1).index_add_(0, ring, each) for each in (power.flatten(), torch.ones(h * w)))
    return (sums / counts.clamp(min=1))[:bins].tolist()


def dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II as a matrix [n, n]: row k is the cosine of frequency k."""
    k, i = np.arange(n)[:, None], np.arange(n)
    matrix = np.sqrt(2 / n) * np.cos(np.pi * (i + 0.5) * k / n)
    matrix[0] /= np.sqrt(2)
    return torch.from_numpy(matrix)
