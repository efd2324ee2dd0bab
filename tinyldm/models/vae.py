"""The autoencoder of Stable Diffusion (AutoencoderKL, arXiv:2112.10752, App. D.1 and E.2).

Pixels in [-1, 1] are encoded to a diagonal Gaussian over latents, 2^(levels - 1) times smaller on each
side. Diffusion runs on standardised latents, (z - shift) * scale: that formula lives in to_latents and
from_latents and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.lookup import check_counts
from tinyldm.models.convolutions import Downsample, ResBlock, Upsample
from tinyldm.models.layers import Attention

EPS = 1e-6                                                  # every GroupNorm of the published VAEs


@dataclass(frozen=True)
class VAEConfig:
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)          # channels per level, finest first
    depth: int = 2                                          # ResBlocks per level (one more in the decoder)
    groups: int = 32
    middle_attention: bool = True
    quant_convs: bool = True                                # SD 3 and FLUX.1 have none
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    sample_size: int | tuple[int, int] = 256                # picture height and width in training

    def __post_init__(self):
        check_counts(self, "latent_channels", "widths", "depth", "groups")
        if self.scaling_factor == 0:
            raise ValueError("scaling_factor=0 makes all latents 0: 1 divided by their standard deviation is usual")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"autoencoder width {width} must be a multiple of groups={self.groups}")

    @property
    def downscale(self) -> int:
        """Pixels per latent on each side."""
        return 2 ** (len(self.widths) - 1)


class Posterior(NamedTuple):
    """q(z | image), a diagonal Gaussian: mean and log-variance, each [b, c, h, w]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """z = mean + std * eps (arXiv:1312.6114, Eq. 10); eps: standard normal noise of mean's shape."""
        return self.mean + (0.5 * self.logvar).exp() * eps

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats per picture [b] (arXiv:1312.6114, App. B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class MiddleAttention(nn.Module):
    """Single-head self-attention over all pixels of the coarsest feature map, residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.attention = Attention(channels, heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(self.norm(x).flatten(2).transpose(1, 2))        # [b, h*w, c]
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Middle(nn.Module):
    """ResBlock, optional attention, ResBlock at the coarsest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([MiddleAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class VAELevel(nn.Module):
    """ResBlocks at one resolution, followed by resampling, if given."""

    def __init__(self, channels: int, width: int, depth: int, groups: int, resample: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels if j == 0 else width, width, groups, EPS) for j in range(depth))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nn.Module):
    """Pixels [b, 3, H, W] -> moments [b, 2 * latent_channels, h, w]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            VAELevel(widths[max(i - 1, 0)], width, config.depth, config.groups,
                     Downsample(width, pad_all=False) if i < last else None)
            for i, width in enumerate(widths))
        self.middle = Middle(widths[-1], config.groups, config.middle_attention)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Latents [b, latent_channels, h, w] -> pixels [b, 3, H, W]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.widths[::-1]                                       # coarsest first
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], config.groups, config.middle_attention)
        self.up = nn.ModuleList(
            VAELevel(widths[max(i - 1, 0)], width, config.depth + 1, config.groups,
                     Upsample(width) if i < len(widths) - 1 else None)
            for i, width in enumerate(widths))
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.upsample(self.middle(self.conv_in(z)))

    def upsample(self, x: Tensor) -> Tensor:
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def check_size(pixels: Tensor, downscale: int) -> None:
    """ValueError unless height and width of pixels [b, 3, H, W] are multiples of the autoencoder's downscale."""
    for size in pixels.shape[2:]:
        if size % downscale:
            below, above = size // downscale * downscale, (size // downscale + 1) * downscale
            raise ValueError(f"image size {size} is not a multiple of {downscale}: use {f'{below} or ' if below else ''}{above}")


class AutoencoderKL(nn.Module):
    """encode: pixels [b, 3, H, W] in [-1, 1] -> Posterior [b, c, H/f, W/f]; decode: the inverse. f = config.downscale."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if config.quant_convs else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c, c, 1) if config.quant_convs else nn.Identity()

    def encode(self, pixels: Tensor) -> Posterior:
        check_size(pixels, self.config.downscale)
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents z -> pixels, nominally in [-1, 1], not clamped."""
        return self.decode_fine(self.decode_coarse(z))

    def decode_coarse(self, z: Tensor) -> Tensor:
        """Latents -> features [b, c, h, w] at the latents' size: the layers that need the whole picture at once."""
        return self.decoder.middle(self.decoder.conv_in(self.post_quant_conv(z)))

    def decode_fine(self, x: Tensor) -> Tensor:
        """Features -> pixels: the layers that need nearly all of the memory and, GroupNorm's statistics aside, only the
        neighbourhood of each pixel. So tiling.py can run them in tiles."""
        return self.decoder.upsample(x)

    def to_latents(self, z: Tensor) -> Tensor:
        """The encoder's z -> the latents that diffusion runs on, of about zero mean and unit variance."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def from_latents(self, x: Tensor) -> Tensor:
        """The inverse of to_latents."""
        return x / self.config.scaling_factor + self.config.shift_factor

    @torch.no_grad()
    def centre(self, mean: Tensor) -> None:
        """Fold the latents' per-channel mean [c] into the two 1x1 quant convolutions: encode() then returns z - mean, and
        decode() adds the mean back first. Together with the scaling factor this standardises latents without a
        shift_factor, which Stable Diffusion's own pipelines ignore. (There is one scaling factor for all channels on
        purpose: a channel that the encoder hardly uses would be scaled up to unit variance, and the network would have to
        learn its noise.)"""
        c = self.config.latent_channels
        self.quant_conv.bias[:c] -= mean
        self.post_quant_conv.bias += self.post_quant_conv.weight.view(c, c) @ mean

    @torch.no_grad()
    def fold(self, mean: Tensor, std: Tensor) -> None:
        """Fold the latents' mean and standard deviation per channel [c] into the two 1x1 quant convolutions: encode() then returns
        (z - mean) / std, and decode() undoes that first."""
        self.centre(mean)
        c = self.config.latent_channels
        self.quant_conv.weight[:c] /= std.view(-1, 1, 1, 1)
        self.quant_conv.bias[:c] /= std
        self.quant_conv.bias[c:] -= 2 * std.log()
        self.post_quant_conv.weight *= std.view(-1, 1, 1)

    def standardise(self, z: Tensor) -> None:
        """Make to_latents give zero mean and unit variance. z: what encode() gives for many pictures, [n, c, h, w]."""
        mean, shift = z.mean((0, 2, 3)), 0.0
        if self.config.quant_convs:
            self.centre(mean)
        else:                                   # there is nothing that the means could be folded into without an error at the borders
            mean = mean.mean().expand(len(mean))
            shift = float(mean[0])
        scale = 1 / float((z - mean[:, None, None]).std())
        self.config = replace(self.config, scaling_factor=scale, shift_factor=shift)
