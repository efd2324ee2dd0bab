"""The progress bar of a run."""

from __future__ import annotations

import sys
import time

import torch
from tqdm import tqdm

from tinyldm.device import memory_gb


class ProgressBar:
    """Optimizer steps as a bar: loss, learning rate, pictures per second, memory, the date of the end, and the MFU (model FLOPs
    utilisation: the FLOPs that training on the pictures needs, over those that the device could compute meanwhile).

    total: 0 where it is not known. flops: of training on one picture, and peak: the device's per second; 0 and None: not known.
    """

    def __init__(self, title: str, start: int, total: int, batch_size: int, device: torch.device, shown: bool = True):
        every = 0.5 if sys.stderr.isatty() else 30             # seconds between updates; few, where they go to a log file
        self.bar = tqdm(total=total or None, initial=start, desc=title, unit="step", dynamic_ncols=True, mininterval=every,
                        maxinterval=every, disable=not shown)
        self.batch_size, self.device = batch_size, device
        self.flops, self.peak = 0.0, None
        self.begun = self.marked = time.perf_counter()
        self.steps = 0

    def update(self) -> None:
        self.steps += 1
        self.bar.update()

    def plan(self, total: int) -> None:
        """Set the planned number of steps, when it becomes known or changes."""
        self.bar.total = total or None

    def report(self, loss: float | None, lr: float, finish: str = "") -> dict[str, float]:
        """Show these figures on the bar. -> those entries of a log row that depend on the clock or the machine: seconds since the
        bar began, images_per_second since the last report, mfu, memory_gb."""
        now = time.perf_counter()
        rate = self.steps * self.batch_size / (now - self.marked)
        self.marked, self.steps = now, 0
        row = {"seconds": now - self.begun, "images_per_second": rate}
        if self.flops and self.peak:
            row["mfu"] = rate * self.flops / self.peak
        if gigabytes := memory_gb(self.device):
            row["memory_gb"] = gigabytes
        shown = ["no finite step" if loss is None else f"loss {loss:.4f}", f"lr {lr:.2g}", f"{rate:.0f} images/s"]
        shown += [f"MFU {row.get('mfu', 0):.0%}"] * ("mfu" in row) + [f"{gigabytes:.1f} GB"] * bool(gigabytes)
        self.bar.set_postfix_str(", ".join(shown + [f"ends {finish}"] * bool(finish)), refresh=False)
        return row

    def close(self) -> None:
        self.bar.close()
