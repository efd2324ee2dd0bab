"""The loss of the first stage: an autoencoder learns to reconstruct pictures from small latents."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinyldm.config import AutoencoderConfig
from tinyldm.objectives.base import Networks, Objective, Turn
from tinyldm.pictures.pixels import to_pixels


class AutoencoderBatch(NamedTuple):
    pixels: Tensor      # [b, 3, h, w] in [-1, 1]
    noise: Tensor       # [b, c, h / f, w / f], standard normal, for sampling from the posterior


class AutoencoderObjective(Objective):
    """L1 + MSE + a small KL term (arXiv:2112.10752, Eq. 25 without the adversarial loss)."""

    def __init__(self, settings: AutoencoderConfig, vae: nn.Module):
        self.settings, self.channels, self.downscale = settings, vae.config.latent_channels, vae.config.downscale
        self.turns = (Turn("autoencoder", ("vae",)),)

    def draw(self, samples: np.ndarray, generator: torch.Generator, batch_size: int, part: slice) -> AutoencoderBatch:
        """samples: uint8 [b, h, w, 3]."""
        pixels = to_pixels(samples)
        sides = (side // self.downscale for side in pixels.shape[2:])
        noise = torch.randn(batch_size, self.channels, *sides, generator=generator)[part]
        return AutoencoderBatch(pixels, noise)

    def losses(self, turn: Turn, networks: Networks, batch: AutoencoderBatch, progress: float) -> Tensor:
        vae = networks["vae"]
        posterior = vae.encode(batch.pixels)
        decoded = vae.decode(posterior.sample(batch.noise))
        error = (decoded.float() - batch.pixels).flatten(1)
        return error.abs().mean(1) + error.square().mean(1) + self.settings.kl * posterior.kl()
