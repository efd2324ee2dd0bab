"""The surroundings of a run: its folder, its device, the processes that train together, signals and the clock."""

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
        """Call this now and then during long work: it writes the running time, and raises Interrupted after a signal."""
        self.clock.running()
        self.signals.check()
