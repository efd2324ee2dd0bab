"""REPA-E (arXiv:2504.10483): the autoencoder is trained along, so that its latents are easy to align, through the alignment alone.

    network       diffusion loss + weight * distance, on latents without gradients: the diffusion loss would make them simpler than they are
    autoencoder   vae_weight * distance, through the network, which stays as it is, + its own losses (--vae-loss)
    discriminator the adversarial loss, with --vae-loss gan=0.1

Each line is a turn, all on the same pictures, times and noise. Latents come from the pictures in the cache: its own latents are those of
the autoencoder with which the run begins, and are not read.

The paper normalises latents by a batch norm, whose running statistics replace the scaling factor. Here these are folded into the
autoencoder itself after each step (AutoencoderKL.fold): the same function as that batch norm in evaluation mode, but there is nothing
to export besides an AutoencoderKL, and a picture's loss does not depend on its micro-batch. The published code takes the turns in the
order autoencoder, discriminator, network, and normalises by the batch's own statistics in the network's turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinyldm.config import Config, OptimisationConfig, change
from tinyldm.model import Model, autoencoder_config
from tinyldm.objectives.autoencoder import AutoencoderBatch, AutoencoderObjective
from tinyldm.objectives.autoencoder_settings import check_sizes
from tinyldm.objectives.base import Networks, Turn
from tinyldm.objectives.denoising import Denoising, DenoisingBatch
from tinyldm.objectives.repa import REPA
from tinyldm.pictures.pixels import to_pixels

MOMENTUM = 0.1              # of the running statistics, as in the published code


class REPAE(REPA):
    """REPA, and the turns of an AutoencoderObjective on the same pictures."""

    trains_too = ("vae",)
    options: Mapping[str, Any] = {**REPA.options, "vae_weight": 1.5, "vae_lr": 1e-4}        # vae_lr: AdamW's

    def __init__(self, config: Config, model: Model, trained: tuple[str, ...]):
        check_foldable(model.vae.config)
        super().__init__(config, model, tuple(part for part in trained if part not in self.trains_too))
        self.first = AutoencoderObjective(config.autoencoder, model.vae.requires_grad_(True).train())
        turn, *others = self.first.turns
        own = OptimisationConfig(optimizer="adamw", lr=self.own["vae_lr"], weight_decay=0.0)
        self.turns += (turn._replace(optimisation=own), *others)
        self.networks, self.saved = self.networks | self.first.networks, (*self.saved, *self.first.saved)
        self.sums: list[Tensor] = []            # of this step's micro-batches [3, c]: numbers per channel, their sum, sum of squares

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        AutoencoderObjective.check(config)
        if config.finetune.kind or config.run.fsdp:
            raise ValueError("--objective repa_e trains an autoencoder beside a new network: leave out --finetune and --fsdp")

    @classmethod
    def check_parts(cls, config: Config, vae: nn.Module | None) -> None:
        super().check_parts(config, vae)
        own = vae.config if vae else autoencoder_config(config.autoencoder.name, config.autoencoder.fields)
        check_foldable(own)
        check_sizes(change(config, vae_crop=0), own.downscale)             # whole pictures, not crops
        if config.data.keep_pictures != own.downscale:
            raise ValueError(f"--objective repa_e encodes the pictures as they are: use --keep-pictures {own.downscale}, this "
                             "autoencoder's pixels per latent")

    def wants_pictures(self) -> bool:
        return True

    def draw(self, samples: Any, generator: torch.Generator, batch_size: int, part: slice) -> DenoisingBatch:
        batch = super().draw(samples, generator, batch_size, part)
        if (side := batch.pictures.shape[2]) != (wanted := batch.x0.shape[2] * self.first.downscale):
            raise ValueError(f"the cache has pictures of {side} px behind latents of {wanted} px, and this objective encodes them as they "
                             f"are: make it again with --keep-pictures {self.first.downscale}")
        drawn = self.first.draw(batch.pictures.movedim(1, 3), generator, batch_size, part)._asdict()
        return batch._replace(autoencoder={name: field for name, field in drawn.items() if field is not None and name != "pixels"})

    def validation_batch(self, samples: Any, seed: int) -> DenoisingBatch:
        return super().validation_batch(samples, seed)._replace(pictures=samples.pictures())

    def to_device(self, batch: DenoisingBatch, device: torch.device) -> DenoisingBatch:
        moved = super().to_device(batch, device)
        if "view" in (batch.autoencoder or {}):                 # which is asked for on the CPU
            moved = moved._replace(autoencoder={**moved.autoencoder, "view": batch.autoencoder["view"]})
        return moved

    def collect(self, turn: Turn, networks: Networks, micro_batches: Sequence[DenoisingBatch]) -> None:
        if turn is self.turns[0]:
            self.sums.clear()                                   # of an attempt that ran out of memory

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        vae, pixels = networks["vae"], to_pixels(batch.pictures.movedim(1, 3))
        if batch.autoencoder is None:                           # validation
            x0 = vae.to_latents(vae.encode(pixels).mean.float())
            return Denoising.losses(self, turn, networks, batch._replace(x0=x0), progress)
        if turn is self.turns[0]:
            with torch.no_grad():
                x0 = self.encode_pictures(vae, pixels, batch)
            self.sums.append(torch.stack([torch.ones_like(x0), x0, x0.square()]).sum((1, 3, 4)))
            return super().losses(turn, networks, batch._replace(x0=x0), progress)
        losses = self.first.losses(turn, networks, AutoencoderBatch(pixels, **batch.autoencoder), progress)
        if turn is self.turns[1] and progress < self.own["stop"]:
            aligned = batch._replace(x0=self.encode_pictures(vae, pixels, batch))
            losses = losses + self.own["vae_weight"] * self.both(turn, networks, aligned, progress)[1]
        return losses

    def encode_pictures(self, vae: Any, pixels: Tensor, batch: DenoisingBatch) -> Tensor:
        """Latents [b, c, h, w], float32."""
        return vae.to_latents(vae.encode(pixels).sample(batch.autoencoder["noise"]).float())

    def start_over(self) -> None:
        self.first.start_over()

    def after_step(self, step: int) -> None:
        """Take this step's latents over into the running statistics."""
        self.first.mean = self.mean
        self.first.after_step(step)
        numbers, total, squares = self.mean(torch.stack(self.sums).sum(0))
        self.sums.clear()
        mean = total / numbers                                  # of standardised latents: 0 and 1 would change nothing
        variance = (1 - MOMENTUM) + MOMENTUM * (squares / numbers - mean.square())
        finite = (mean.isfinite() & variance.isfinite()).all()
        scale = self.model.vae.config.scaling_factor
        self.model.vae.fold(torch.where(finite, MOMENTUM * mean, 0.0) / scale, torch.where(finite, variance, 1.0).sqrt())

    def log_row(self) -> dict[str, Any]:
        return {**super().log_row(), **self.first.log_row()}

    def notes(self) -> Sequence[str]:
        return self.first.notes()


def check_foldable(config: Any) -> None:
    """ValueError for an autoencoder that the statistics of latents cannot be folded into."""
    if not getattr(config, "quant_convs", False) or config.shift_factor:
        raise ValueError("--objective repa_e folds the statistics of latents into the two 1 x 1 convolutions around them: use "
                         "--autoencoder kl, or --vae-weights of Stable Diffusion 1, 2 or XL")
