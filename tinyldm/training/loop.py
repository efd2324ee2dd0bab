"""What the loops of both stages share: one update, a line of the log, where to go on."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from tinyldm.config import Config
from tinyldm.training import checkpoint
from tinyldm.training.log import Log
from tinyldm.training.meter import Meter
from tinyldm.training.run import Progress


def update(parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], clip: float, meter: Meter) -> bool:
    """One optimizer step on the gradients at hand, clipped to a global norm. False, and no step, where the norm or the
    loss is not finite. (The one place where the device is waited for: once per step, not per micro-batch.)"""
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip, foreach=True))
    if good := math.isfinite(norm) and math.isfinite(float(meter.waiting[0])):
        for optimizer in optimizers:
            optimizer.step()
        meter.keep(norm)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return good


def write_log(log: Log, stage: str, step: int, meter: Meter, lr_factor: float, bar: Progress) -> None:
    row = meter.row()
    log.write(stage=stage, step=step, lr_factor=lr_factor, **row, **bar.report(row["loss"]))


def latest(config: Config, run: Path, stage: str) -> Path | None:
    """The checkpoint to go on from, if it is of this stage."""
    found = checkpoint.names(run) if config.resume == "auto" else []
    return found[-1] if found and found[-1].name.startswith(stage) else None
