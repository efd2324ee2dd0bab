"""The loss of the first stage: an autoencoder learns to reconstruct pictures from small latents.

A weighted sum of terms (reconstruction.py), an adversarial one (adversarial.py) among them. What makes latents easier for a diffusion
network to learn is off by default: the term `se`, and what --vae-latents does to latents before they are decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyldm.config import AutoencoderConfig, Config, OptimisationConfig
from tinyldm.folders.lpips import load_lpips
from tinyldm.lookup import lookup
from tinyldm.model import architecture
from tinyldm.objectives.adversarial import Adversary
from tinyldm.objectives.autoencoder_settings import SCALES, TRAINED, check_sizes, gan_config, latents_config, loss_weights
from tinyldm.objectives.base import Networks, Objective, Turn
from tinyldm.objectives.reconstruction import TERMS, Reconstruction
from tinyldm.pictures.pixels import to_pixels

class AutoencoderBatch(NamedTuple):
    pixels: Tensor      # [b, 3, h, w] in [-1, 1]
    noise: Tensor       # [b, c, h / f, w / f], standard normal, for sampling from the posterior
    jitter: Tensor | None = None        # of noise's shape, for the decoder, as a multiple of the latents' standard deviation
    view: Tensor | None = None          # [b, 2], the same for all samples and always on the CPU: factor of the size, quarter turns


class AutoencoderObjective(Objective):
    """arXiv:2112.10752, Eq. 25, of the terms that --vae-loss names."""

    def __init__(self, settings: AutoencoderConfig, vae: nn.Module):
        self.channels, self.downscale, self.freeze = vae.config.latent_channels, vae.config.downscale, settings.freeze
        self.weights, self.latents = loss_weights(settings), latents_config(settings)
        self.memory_format = architecture(vae).memory_format
        self.turns, self.networks, self.saved = (Turn("autoencoder", TRAINED[settings.freeze]),), {}, ()
        self.mean: Callable[[Tensor], Tensor] = lambda tensor: tensor       # over processes; the stage sets it where there are several
        self.decoded: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}     # this step's originals and reconstructions, by micro-batch
        self.adversary, self.smallest = None, 1
        if "gan" in self.weights:
            gan = gan_config(settings)
            self.adversary = Adversary(gan)
            self.networks["discriminator"], self.saved = self.adversary, ("discriminator",)
            self.smallest, self.settled = self.adversary.net.smallest, min(gan.start + gan.warmup, 1.0)
            own = OptimisationConfig(optimizer="adamw", lr=gan.lr, weight_decay=0.0)
            self.turns += (Turn("discriminator", ("discriminator",), optimisation=own, start=gan.start, betas=gan.betas),)
        if "lpips" in self.weights:
            self.networks["lpips"] = lpips = load_lpips(*settings.lpips)
            self.smallest = max(self.smallest, lpips.smallest * (2 if "se" in self.weights else 1))

    @classmethod
    def check(cls, config: Config) -> None:
        settings = config.autoencoder
        loss_weights(settings), gan_config(settings), latents_config(settings)
        lookup(TRAINED, settings.freeze, "part to freeze (--vae-freeze)")

    @classmethod
    def check_sources(cls, config: Config, downscale: int) -> None:
        check_sizes(config, downscale)

    # ---------------------------------------------------------------- the batch

    def draw(self, samples: np.ndarray, generator: torch.Generator, batch_size: int, part: slice) -> AutoencoderBatch:
        """samples: uint8 [b, h, w, 3]."""
        pixels = to_pixels(samples)
        shape = (batch_size, self.channels, *(side // self.downscale for side in pixels.shape[2:]))
        noise, jitter, view = torch.randn(shape, generator=generator)[part], None, None
        if self.latents.noise:
            size = self.latents.noise * torch.randn(batch_size, 1, 1, 1, generator=generator).abs()
            jitter = (size * torch.randn(shape, generator=generator))[part]
        if self.latents.eq:
            chosen = torch.rand((), generator=generator) < self.latents.eq
            scale = torch.randint(SCALES[0], SCALES[1] + 1, (), generator=generator) / 32
            scale = scale.clamp(min=min(1.0, self.smallest / min(pixels.shape[2:])))
            view = torch.stack([scale, torch.randint(4, (), generator=generator)])
            view = torch.where(chosen, view, torch.tensor([1.0, 0.0])).expand(len(pixels), 2)
        return AutoencoderBatch(pixels, noise, jitter, view)

    def validation_batch(self, samples: np.ndarray, seed: int) -> AutoencoderBatch:
        """Without noise: pictures are reconstructed from the means of their posteriors, as the autoencoder is used."""
        pixels = to_pixels(samples)
        return AutoencoderBatch(pixels, torch.zeros(len(pixels), self.channels, *(side // self.downscale for side in pixels.shape[2:])))

    def to_device(self, batch: AutoencoderBatch, device: torch.device) -> AutoencoderBatch:
        if device.type == "cpu":
            batch = batch._replace(pixels=batch.pixels.contiguous(memory_format=self.memory_format))
        return super().to_device(batch._replace(view=None), device)._replace(view=batch.view)

    # ---------------------------------------------------------------- the losses

    def losses(self, turn: Turn, networks: Networks, batch: AutoencoderBatch, progress: float) -> Tensor:
        """Without gradients, as in validation, there is no adversarial term: it says nothing about progress."""
        key = batch.pixels.data_ptr(), len(batch.pixels)
        if turn.name == "discriminator":
            return self.adversary.discriminator_losses(*self.decoded.pop(key, None) or self.decode_again(networks["vae"], batch))
        made, adversary = self.reconstruct(networks["vae"], batch), self.adversary
        if adversary is None or progress < adversary.settings.start or not torch.is_grad_enabled():
            total = made.compare(made.decoded, made.pixels)
        else:
            factor = self.weights["gan"] * adversary.settings.ramp(progress)
            total = adversary.losses(made.decoded, last_layer(networks["vae"]), lambda decoded: made.compare(decoded, made.pixels), factor)
            self.decoded[key] = made.pixels, made.decoded.detach()          # the discriminator's turn comes next
        for name, weight in self.weights.items():
            if name != "gan" and not TERMS[name].pixels:
                total = total + (weight / made.pixels[0].numel() if TERMS[name].summed else weight) * TERMS[name].function(made)
        return total

    def reconstruct(self, vae: nn.Module, batch: AutoencoderBatch) -> Reconstruction:
        pixels = batch.pixels
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.freeze != "encoder"):
            posterior = vae.encode(pixels)
            z = posterior.sample(batch.noise)
        if batch.jitter is not None:
            z = z + z.detach().std((1, 2, 3), correction=0, keepdim=True) * batch.jitter
        if batch.view is not None:
            scale, turns = batch.view[0].tolist()
            unit = 2 if "se" in self.weights else 1                             # it halves them again
            sides = [unit * max(1, round(side * scale / unit)) for side in z.shape[2:]]
            z, pixels = transform(z, sides, int(turns)), transform(pixels, [side * self.downscale for side in sides], int(turns))
        return Reconstruction(pixels, vae.decode(z).to(pixels.dtype), posterior, z, vae.decode, self.compare)

    def compare(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        """The weighted sum of all terms that compare pixels, [b]."""
        functions = {name: TERMS[name].function or self.networks[name] for name in self.weights if TERMS[name].pixels}
        first, *others = (self.weights[name] * function(decoded, pixels) for name, function in functions.items())
        return sum(others, first)

    @torch.no_grad()
    def decode_again(self, vae: nn.Module, batch: AutoencoderBatch) -> tuple[Tensor, Tensor]:
        """Originals and reconstructions, where the autoencoder's turn was cut into other micro-batches."""
        made = self.reconstruct(vae, batch)
        return made.pixels, made.decoded

    # ---------------------------------------------------------------- from step to step

    def start_over(self) -> None:
        self.decoded.clear()
        if self.adversary:
            self.adversary.start_over()

    def after_step(self, step: int) -> None:
        self.decoded.clear()
        if self.adversary:
            self.adversary.after_step(self.mean)

    def log_row(self) -> dict[str, Any]:
        return self.adversary.log_row() if self.adversary else {}

    def notes(self) -> list[str]:
        return self.adversary.notes() if self.adversary else []


def last_layer(vae: nn.Module) -> Tensor:
    """The weights of the decoder's last convolution."""
    return [layer for layer in vae.decoder.modules() if isinstance(layer, nn.Conv2d)][-1].weight


def transform(x: Tensor, sides: list[int], turns: int) -> Tensor:
    """x [b, c, h, w], resized to these sides and turned by quarters."""
    x = x if list(x.shape[2:]) == sides else F.interpolate(x, size=sides, mode="bilinear", align_corners=False)
    return x.rot90(turns, (2, 3))
