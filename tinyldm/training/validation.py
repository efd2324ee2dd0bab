"""The loss on held-out samples, with fixed noise at fixed times, so that it depends on the weights alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyldm.data.loader import Loader
from tinyldm.objectives import Objective, split
from tinyldm.training.ema import EMA, PowerEMA
from tinyldm.training.meter import Meter


class Validation:
    """batch: all held-out samples, on the CPU. micro_batch: how many of them at once, at most. losses: a micro-batch and the progress
    of the training -> weighted losses [b], as in training. to_device: moves a micro-batch to the device (Objective.to_device)."""

    def __init__(self, batch: NamedTuple, micro_batch: int, device: torch.device, losses: Callable[[NamedTuple, float], Tensor],
                 to_device: Callable[[NamedTuple, torch.device], NamedTuple]):
        self.batch, self.micro_batch, self.device, self.losses, self.to_device = batch, micro_batch, device, losses, to_device

    def measure(self, ema: EMA | PowerEMA, progress: float = 0.0) -> dict[str, Any]:
        """Entries of a log row: val_raw, the loss of the raw weights; val_ema, that of the averages; val_bins, the latter by t."""
        raw = self(progress)
        with ema.applied():
            averaged = self(progress)
        return {"val_raw": raw["loss"], "val_ema": averaged["loss"], "val_bins": averaged.get("t_bins")}

    @torch.no_grad()
    def __call__(self, progress: float = 0.0) -> dict[str, Any]:
        """{"loss": mean loss, "t_bins": mean loss by noise level, if the batch has times}, of the current weights."""
        meter, n = Meter(self.device), len(self.batch[0])
        for micro in split(self.batch, equal_parts(n, self.micro_batch)):
            micro = self.to_device(micro, self.device)
            meter.add(self.losses(micro, progress), 1 / n, getattr(micro, "t", None))
        meter.keep(0.0)
        row = meter.row()
        return {name: row[name] for name in ("loss", "t_bins") if name in row}


def equal_parts(count: int, largest: int) -> int:
    """Into how many parts of at most `largest` to cut `count` samples: as few as possible, but up to twice as many where these are of
    one size, because torch.compile makes a graph for every size."""
    fewest = -(-count // largest)
    return next((parts for parts in range(fewest, 2 * fewest) if count % parts == 0), fewest)


def held_out_batch(loader: Loader, objective: Objective, seed: int) -> NamedTuple | None:
    """The held-out samples of a loader as a batch of the objective; None where none are held out or the objective has no
    validation batch."""
    samples = loader.held_out_batch()
    return samples and objective.validation_batch(samples, seed)
