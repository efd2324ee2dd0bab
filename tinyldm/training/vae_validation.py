"""What an autoencoder makes of pictures that it is not trained on: loss, PSNR, a grid to look at, and statistics of its latents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinyldm.data.encoding import posterior
from tinyldm.device import autocast, in_parts
from tinyldm.pictures.pixels import difference, psnr, to_bytes, to_pixels, write_picture
from tinyldm.pictures.sheet import tile
from tinyldm.training.ema import EMA, PowerEMA
from tinyldm.training.latent_statistics import latent_statistics
from tinyldm.training.validation import Validation

SHOWN = 8                               # pictures in the grid


class VAEValidation(Validation):
    """pictures: those of the batch, uint8 [n, h, w, 3]. grid: the file of the grid; None: this process draws none. Other arguments as for
    Validation."""

    def __init__(self, batch: NamedTuple, micro_batch: int, device: torch.device, losses: Callable[[NamedTuple, float], Tensor],
                 to_device: Callable[[NamedTuple, torch.device], NamedTuple], vae: nn.Module, pictures: np.ndarray, dtype: str,
                 grid: Path | None):
        super().__init__(batch, micro_batch, device, losses, to_device)
        self.vae, self.pictures, self.dtype, self.grid = vae, pictures, dtype, grid

    def measure(self, ema: EMA | PowerEMA | None, progress: float = 0.0) -> dict[str, Any]:
        """Entries of a log row: val_raw, the loss of the raw weights, and val_ema, that of averages, where there are some. Of the
        averages, else of the raw weights: val_psnr, the mean over pictures in dB, and latents, their statistics."""
        raw = {"val_raw": self(progress)["loss"]}
        with ema.applied() if ema else nullcontext():
            averaged = {"val_ema": self(progress)["loss"]} if ema else {}
            decoded, z = reconstruct(self.vae, self.pictures, self.device, self.dtype, self.micro_batch)
        if self.grid:
            write_grid(self.grid, self.pictures[:SHOWN], decoded[:SHOWN])
        return {**raw, **averaged, "val_psnr": float(psnr(decoded, self.pictures).mean()),
                "latents": latent_statistics(z, to_pixels(self.pictures))}


@torch.no_grad()
def reconstruct(vae: nn.Module, images: np.ndarray, device: torch.device, dtype: str, at_once: int = SHOWN) -> tuple[np.ndarray, Tensor]:
    """uint8 [n, h, w, 3] -> what the autoencoder makes of them, of the same shape, and their latents, the means of the posteriors, float32
    [n, c, h / f, w / f] on the CPU."""
    def work(part: np.ndarray) -> tuple[np.ndarray, Tensor]:
        z = posterior(vae, part, device, dtype).mean
        with autocast(device, dtype):
            return to_bytes(vae.decode(z)), z.cpu()

    decoded, latents = zip(*in_parts(work, images, at_once))
    return np.concatenate(decoded), torch.cat(latents)


def write_grid(file: Path, images: np.ndarray, decoded: np.ndarray) -> None:
    """Write a picture of three rows: originals, reconstructions, and how far apart they are, times 4. Both uint8 [n, h, w, 3]."""
    write_picture(file, tile(np.concatenate([images, decoded, difference(decoded, images)]), columns=len(images)))
