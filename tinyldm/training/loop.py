"""What the loops of both stages share: one update, the loss as a number, a line of the log, where to go on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tinyldm.config import Config
from tinyldm.training import checkpoint
from tinyldm.training.log import Log
from tinyldm.training.run import Progress


def update(parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], clip: float, losses: Tensor) -> None:
    """One optimizer step on the gradients at hand, clipped to a global norm."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
    losses += 0 * norm                                        # a gradient that is not finite shows in the loss, unasked
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def finite(losses: Tensor, step: int) -> float:
    """The summed loss as a number; an error before a broken network is logged or saved."""
    if not (value := losses.item()) < float("inf"):
        raise ValueError(f"loss or gradient is not finite near step {step}: go on with --resume auto and lower --lr, --muon-lr")
    return value


def write_log(log: Log, stage: str, step: int, losses: Tensor, lr_factor: float, bar: Progress, config: Config) -> None:
    mean = finite(losses, step) / config.log_every
    log.write(stage=stage, step=step, loss=mean, lr_factor=lr_factor, **bar.report(mean))
    losses.zero_()


def restore_counters(saved: Path, losses: Tensor) -> int:
    """The step to go on from; `losses` gets back what was summed before it."""
    state = checkpoint.read_state(saved)
    losses.fill_(state["losses"])
    return state["step"]


def latest(config: Config, run: Path, stage: str) -> Path | None:
    """The checkpoint to go on from, if it is of this stage."""
    found = checkpoint.names(run) if config.resume == "auto" else []
    return found[-1] if found and found[-1].name.startswith(stage) else None
