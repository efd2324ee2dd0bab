"""The settings of the autoencoder's loss: what --vae-loss, --vae-gan, --vae-latents and --vae-freeze mean, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tinyldm.config import AutoencoderConfig, Config
from tinyldm.folders.lpips import open_lpips
from tinyldm.lookup import build_dataclass, fits, lookup
from tinyldm.models.lpips import LPIPS
from tinyldm.models.patch_discriminator import PatchDiscriminator
from tinyldm.objectives.adversarial import GANConfig
from tinyldm.objectives.reconstruction import TERMS

# --vae-freeze: the parts that are trained.
TRAINED = {"": ("vae",), "encoder": ("vae.decoder", "vae.post_quant_conv")}
SCALES = (8, 31)                        # EQ-VAE: latents are shrunk to 8 / 32 to 31 / 32 of their size


@dataclass(frozen=True)
class LatentsConfig:
    """--vae-latents: what is done to latents before they are decoded in training."""

    # Noise: of a standard deviation of |n| * noise of the picture's latents', n standard normal (arXiv:2510.11690 has the same for a
    # frozen encoder), so that the decoder forgives the errors of a diffusion network.
    noise: float = 0.0
    # EQ-VAE (arXiv:2502.09509): with this probability the batch's latents are shrunk and turned by quarters, and decoded to equally
    # transformed pictures. 0.5 is published.
    eq: float = 0.0

    def __post_init__(self):
        if not 0 <= self.noise < 100 or not 0 <= self.eq <= 1:
            raise ValueError(f"noise={self.noise} must be 0 or more, and eq={self.eq} a probability")


def loss_weights(settings: AutoencoderConfig) -> dict[str, float]:
    """The weights of all terms that are not 0, the defaults and what --vae-loss changes in them. ValueError for what cannot work."""
    for name, weight in settings.loss.items():
        lookup(TERMS, name, "term of the autoencoder's loss (--vae-loss)")
        if not fits(weight, float) or not 0 <= weight < math.inf:
            raise ValueError(f"--vae-loss {name}={weight} must be 0 or a positive number")
    found = {name: weight for name, term in TERMS.items() if (weight := settings.loss.get(name, term.default))}
    if settings.freeze == "encoder":
        found.pop("kl", None)           # of the encoder alone
    if not any(TERMS[name].pixels for name in found):
        raise ValueError("--vae-loss compares no pixels: leave l1 or mse in it")
    for name, flag, value in (("lpips", "--vae-lpips", settings.lpips), ("gan", "--vae-gan", settings.gan)):
        if value and name not in settings.loss:         # 0 takes away a term that a preset has
            raise ValueError(f"{flag} is for the term {name}: add --vae-loss {name}=0.5, or leave it out")
    if "lpips" in found and not settings.lpips:
        raise ValueError("--vae-loss lpips needs weights: --vae-lpips timm/vgg16.tv_in1k FILE, where FILE is weights/v0.1/vgg.pth of "
                         "the lpips package")
    return found


def gan_config(settings: AutoencoderConfig) -> GANConfig:
    return build_dataclass(GANConfig, settings.gan, "--vae-gan")


def latents_config(settings: AutoencoderConfig) -> LatentsConfig:
    return build_dataclass(LatentsConfig, settings.latents, "--vae-latents")


def check_sizes(config: Config, downscale: int) -> None:
    """ValueError where pictures are too small for a network, or weights of LPIPS are missing or damaged."""
    settings, weights = config.autoencoder, loss_weights(config.autoencoder)
    side = settings.crop or config.data.resolution
    if "se" in weights and side % (2 * downscale):
        raise ValueError(f"--vae-loss se halves latents, so pictures (or crops, --vae-crop) of {side} px must be a multiple of "
                         f"{2 * downscale} px")
    with torch.device("meta"):
        needed = {"gan": PatchDiscriminator(gan_config(settings).discriminator).smallest} if "gan" in weights else {}
        if "lpips" in weights:
            needed["lpips"] = LPIPS(open_lpips(settings.lpips)[0]).smallest * (2 if "se" in weights else 1)
    for term, least in needed.items():
        if side < least:
            raise ValueError(f"pictures (or crops, --vae-crop) of {side} px are too small for --vae-loss {term}, which takes {least} "
                             "px or more" + ", or fewer --vae-gan layers" * (term == "gan"))
