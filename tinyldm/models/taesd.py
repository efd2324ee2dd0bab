"""TAESD, the tiny autoencoders of Ollin Boer Bohan (github.com/madebyollin/taesd, MIT; there is no paper).

Each is distilled from the autoencoder of a large model and has the same *standardised* latents, so it decodes
that model's latents at a fraction of the cost, for previews or for the final picture. Encoder and decoder have
1.2 million parameters each: plain 3x3 convolutions with ReLU, no attention and, taef2 aside, no normalisation.

    taesd, taesdxl   4 latent channels    Stable Diffusion 1 and 2, SDXL
    taesd3, taef1    16                   Stable Diffusion 3, FLUX.1
    taef2            32                   FLUX.2 (before its 2x2 patches); the coarsest blocks have a normalised branch

Both networks are flat nn.Sequentials whose indices are those of the published files, so the code reads as a table of
layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tinyldm.lookup import check_counts
from tinyldm.models.vae import AutoencoderKL, Posterior, check_size

LOGVAR = -30.0                  # the lower bound of AutoencoderKL's posterior: a standard deviation of 3e-7


@dataclass(frozen=True)
class TAESDConfig:
    latent_channels: int = 4
    width: int = 64
    blocks: tuple[int, ...] = (1, 3, 3, 3)      # per level, finest first, in encoder and decoder alike
    normed_middle: bool = False                 # taef2: a GroupNorm branch in the blocks of the coarsest level
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    sample_size: int | tuple[int, int] = 512    # default picture height and width to draw; any other works too

    def __post_init__(self):
        check_counts(self, "latent_channels", "width")
        check_counts(self, "blocks", least=0)

    @property
    def downscale(self) -> int:
        """Pixels per latent on each side."""
        return 2 ** (len(self.blocks) - 1)


def conv3x3(channels: int, out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=bias)


class SoftClamp(nn.Module):
    """Latents -> (-3, 3), nearly unchanged within (-1, 1), so that latents outside the training range do no harm."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


class TAESDBlock(nn.Module):
    """Three convolutions around a shortcut: [b, width, h, w] -> the same shape, >= 0.

    normed: a 1x1 branch precedes them whose GroupNorm takes its statistics over the whole picture. Through it a block
    depends on the picture's overall tone, as FLUX.2's latents require. It is called `pool` in the published files.
    """

    def __init__(self, width: int, normed: bool):
        super().__init__()
        self.conv = nn.Sequential(conv3x3(width, width), nn.ReLU(), conv3x3(width, width), nn.ReLU(), conv3x3(width, width))
        self.pool = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.GroupNorm(4, 4 * width), nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False)) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


def encoder(config: TAESDConfig) -> nn.Sequential:
    """Pixels [b, 3, H, W] in [0, 1] -> latents [b, latent_channels, h, w]."""
    width, last = config.width, len(config.blocks) - 1
    layers = [conv3x3(3, width)]
    for level, depth in enumerate(config.blocks):
        if level > 0:
            layers += [conv3x3(width, width, stride=2, bias=False)]
        layers += [TAESDBlock(width, config.normed_middle and level == last) for _ in range(depth)]
    return nn.Sequential(*layers, conv3x3(width, config.latent_channels))


def decoder(config: TAESDConfig) -> nn.Sequential:
    """Latents [b, latent_channels, h, w] -> pixels [b, 3, H, W], nominally in [0, 1]."""
    width = config.width
    layers = [SoftClamp(), conv3x3(config.latent_channels, width), nn.ReLU()]
    for level, depth in enumerate(reversed(config.blocks)):                    # coarsest first
        if level > 0:
            layers += [nn.Upsample(scale_factor=2), conv3x3(width, width, bias=False)]
        layers += [TAESDBlock(width, config.normed_middle and level == 0) for _ in range(depth)]
    return nn.Sequential(*layers, conv3x3(width, 3))


class TAESD(nn.Module):
    """A replacement for AutoencoderKL. encode: pixels [b, 3, H, W] in [-1, 1] -> Posterior [b, c, H/f, W/f]; decode: the
    inverse. f = config.downscale.

    The published networks use pixels in [0, 1], the rest of the library uses [-1, 1]. encode and decode_fine convert.
    """

    def __init__(self, config: TAESDConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = encoder(config), decoder(config)
        self.split = 3 + config.blocks[-1]                  # decoder layers that work at the latents' size

    def encode(self, pixels: Tensor) -> Posterior:
        """A posterior of almost no variance: sample() adds noise of 3e-7, below float32's rounding of most latents."""
        check_size(pixels, self.config.downscale)
        mean = self.encoder((pixels + 1) / 2)
        return Posterior(mean, torch.full_like(mean, LOGVAR))

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pixels, nominally in [-1, 1], not clamped."""
        return self.decode_fine(self.decode_coarse(z))

    def decode_coarse(self, z: Tensor) -> Tensor:
        """Latents -> features [b, width, h, w], the layers at the latents' own size. All layers that depend on the whole
        picture are among them, and they are cheap, so only decode_fine needs tiles, and its result is (almost) exact."""
        return self.decoder[:self.split](z)

    def decode_fine(self, features: Tensor) -> Tensor:
        """Features -> pixels, downscale times larger."""
        return 2 * self.decoder[self.split:](features) - 1

    def standardise(self, z: Tensor) -> None:
        """Make to_latents give unit variance. z: what encode() gives for many pictures, [n, c, h, w].

        The means of the channels stay: the decoder's soft clamp depends on where latents lie, and diffusers' pipelines for
        AutoencoderTiny take no shift."""
        self.config = replace(self.config, scaling_factor=1 / float((z - z.mean((0, 2, 3), keepdim=True)).std()), shift_factor=0.0)

    # Both are the identity for the published configs (scaling_factor 1, shift_factor 0), because TAESD was trained on
    # latents already standardised by the large autoencoder's factors. The two fields serve models that were trained on
    # latents standardised once more (those of taef2 have a standard deviation of about 0.85).
    to_latents, from_latents = AutoencoderKL.to_latents, AutoencoderKL.from_latents
