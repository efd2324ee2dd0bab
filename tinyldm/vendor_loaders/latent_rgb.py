"""Pictures from latents without a decoder, for previews: a linear map from the channels of a latent pixel to its colour.

For the published families the maps are the numbers of ComfyUI (comfy/latent_formats.py, fitted there to many pictures), so that no
decoder is needed at all, which may lie in the memory of the host or take seconds. For any other VAE, such as one that was trained
here, the map is fitted to what the VAE itself makes of random latents. That explains nearly as much as a fit to encoded pictures:
between the map's colours and those of photographs the correlation is 0.82 with TAEF2 (0.85 with a fit to other photographs), and
0.82 with the VAE of the preset `tiny` on its scenes (0.84).

All maps take standardised latents, those that diffusion runs on, and give pixels in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Family(NamedTuple):
    """Published models with the same latents."""

    scaling: tuple[int, float, float]           # latent channels, scaling and shift factor of the VAE, by which it is recognised
    taesd: str                                  # the hub id of the tiny autoencoder with these latents
    colours: tuple[tuple[float, float, float], ...]     # red, green and blue per latent channel
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)


FAMILIES = {
    "Stable Diffusion 1 and 2": Family((4, 0.18215, 0.0), "madebyollin/taesd", (
        (0.3512, 0.2297, 0.3227), (0.3250, 0.4974, 0.2350), (-0.2829, 0.1762, 0.2721), (-0.2120, -0.2616, -0.7177))),
    "Stable Diffusion XL": Family((4, 0.13025, 0.0), "madebyollin/taesdxl", (
        (0.3651, 0.4232, 0.4341), (-0.2533, -0.0042, 0.1068), (0.1076, 0.1111, -0.0362), (-0.3165, -0.2492, -0.2188)),
        (0.1084, -0.0175, -0.0011)),
    "Stable Diffusion 3": Family((16, 1.5305, 0.0609), "madebyollin/taesd3", (
        (-0.0922, -0.0175, 0.0749), (0.0311, 0.0633, 0.0954), (0.1994, 0.0927, 0.0458), (0.0856, 0.0339, 0.0902),
        (0.0587, 0.0272, -0.0496), (-0.0006, 0.1104, 0.0309), (0.0978, 0.0306, 0.0427), (-0.0042, 0.1038, 0.1358),
        (-0.0194, 0.0020, 0.0669), (-0.0488, 0.0130, -0.0268), (0.0922, 0.0988, 0.0951), (-0.0278, 0.0524, -0.0542),
        (0.0332, 0.0456, 0.0895), (-0.0069, -0.0030, -0.0810), (-0.0596, -0.0465, -0.0293), (-0.1448, -0.1463, -0.1189)),
        (0.2394, 0.2135, 0.1925)),
    "FLUX.1": Family((16, 0.3611, 0.1159), "madebyollin/taef1", (
        (-0.0346, 0.0244, 0.0681), (0.0034, 0.0210, 0.0687), (0.0275, -0.0668, -0.0433), (-0.0174, 0.0160, 0.0617),
        (0.0859, 0.0721, 0.0329), (0.0004, 0.0383, 0.0115), (0.0405, 0.0861, 0.0915), (-0.0236, -0.0185, -0.0259),
        (-0.0245, 0.0250, 0.1180), (0.1008, 0.0755, -0.0421), (-0.0515, 0.0201, 0.0011), (0.0428, -0.0012, -0.0036),
        (0.0817, 0.0765, 0.0749), (-0.1264, -0.0522, -0.1103), (-0.0280, -0.0881, -0.0499), (-0.1262, -0.0982, -0.0778)),
        (-0.0329, -0.0718, -0.0851)),
}


def family(config: Any) -> Family | None:
    """The published family whose latents a VAE with this config has; None for any other."""
    found = (config.latent_channels, config.scaling_factor, config.shift_factor)
    return next((row for row in FAMILIES.values() if row.scaling == found), None)


def preview(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from standardised latents [b, c, h, w], in any dtype, to approximate pixels in [-1, 1] (not clamped), float32
    [b, 3, h * f, w * f]. Only for a VAE of no published family it is run here, once."""
    row, f = family(vae.config), vae.config.downscale
    colours = fit(vae) if row is None else torch.tensor((*row.colours, row.bias))

    def pixels(x0: Tensor) -> Tensor:
        weight = colours.to(x0.device)
        small = F.conv2d(x0.float(), weight[:-1].T[:, :, None, None], weight[-1])
        return F.interpolate(small, scale_factor=f, mode="bilinear")

    return pixels


@torch.no_grad()
def fit(vae: nn.Module, count: int = 16, side: int = 16) -> Tensor:
    """Least squares: the linear map from latents to the mean colours of the f x f pixels that the VAE decodes each of them to.
    -> [c + 1, 3] on the CPU, the last row for a constant 1.

    The random latents are noise of two scales, because a decoder also looks at a latent's neighbours, which are alike in pictures.
    Decoding them takes as long as decoding one picture of 64 x 64 latents."""
    c, p = vae.config.latent_channels, next(vae.parameters())
    rand = lambda side: torch.randn(count, c, side, side, generator=generator)
    generator = torch.Generator().manual_seed(0)
    x = (F.interpolate(rand(side // 4), size=side, mode="bilinear") + rand(side)) / 2**0.5
    decoded = vae.decode(vae.from_latents(x).to(p.device, p.dtype)).float().clamp(-1, 1).cpu()
    wanted = F.avg_pool2d(decoded, vae.config.downscale)
    rows = lambda y: y.movedim(1, -1).flatten(0, 2).double()                            # [count * side * side, channels]
    given = torch.cat([rows(x), torch.ones(count * side * side, 1, dtype=torch.float64)], dim=1)
    return torch.linalg.lstsq(given, rows(wanted)).solution.float()
