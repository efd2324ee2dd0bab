"""What the loops of both stages share: one update, a line of the log, where to go on."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyldm.config import Config
from tinyldm.training import checkpoint
from tinyldm.training.log import Log
from tinyldm.training.meter import Meter
from tinyldm.training.report import write_report
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


def attempt(what: str, work: Callable[[], Any]) -> None:
    """Do what a run can do without: a failure is told, and training goes on."""
    try:
        work()
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{what} failed, training goes on: {' '.join(str(error).split())[:200]}", flush=True)


def refresh_report(run: Path) -> None:
    """RUN/report.html, with where it was made."""
    attempt("report.html", lambda: write_report(run, {"Python": platform.python_version(), "torch": torch.__version__,
                                                      "machine": platform.platform()}))


def resumed_from(config: Config, run: Path) -> Path | None:
    """The newest checkpoint that is whole; None for a run that begins. ValueError where all are damaged."""
    if config.resume != "auto":
        return None
    last = checkpoint.newest_whole(run)
    if last is None and checkpoint.names(run):
        raise ValueError(f"every checkpoint in {run} is damaged: start another run with --out (its latents can be used again with --cache)")
    return last
