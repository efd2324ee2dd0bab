"""Where a run takes place: its folder, its device, the processes that share the work, its clock."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from tinyldm.training.clock import Clock
from tinyldm.training.distributed import World
from tinyldm.training.signals import Signals


class RunContext(NamedTuple):
    folder: Path
    device: torch.device
    world: World
    signals: Signals
    clock: Clock

    def check(self) -> None:
        """To be called now and then during long work: keeps the clock, raises Interrupted where a signal has come."""
        self.clock.running()
        self.signals.check()
