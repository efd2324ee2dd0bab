"""A run's surroundings: its folder, its progress bar, the signals that end it, its source of randomness."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm


class Interrupted(Exception):
    """A signal arrived; the step in progress was finished and saved before this is raised."""


class Signals:
    """SIGINT, SIGTERM and SIGHUP, remembered and obeyed between steps. A second one ends the program at once."""

    def __init__(self):
        self.received = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):           # Windows has no SIGHUP
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.remember)

    def remember(self, number: int, frame) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        print("\nstopping at the next place to go on from (once more: leave at once)", flush=True)

    def check(self) -> None:
        """Interrupted, where there is nothing to finish first."""
        if self.received:
            raise Interrupted


class Progress:
    """A progress bar over optimizer steps: loss, pictures per second, time left."""

    def __init__(self, title: str, start: int, total: int, batch_size: int):
        every = 0.5 if sys.stderr.isatty() else 30             # seconds: a log file needs few of these lines
        self.bar = tqdm(total=total, initial=start, desc=title, unit="step", dynamic_ncols=True, mininterval=every,
                        maxinterval=every)
        self.batch_size = batch_size
        self.begun = self.marked = time.perf_counter()
        self.steps = 0

    def update(self) -> None:
        self.steps += 1
        self.bar.update()

    def report(self, loss: float | None) -> dict[str, float]:
        """Show the loss, and return what a log row has that depends on the clock: seconds since the bar began,
        images per second since the last report."""
        now = time.perf_counter()
        rate = self.steps * self.batch_size / (now - self.marked)
        self.marked, self.steps = now, 0
        told = "no finite step" if loss is None else f"loss {loss:.4f}"
        self.bar.set_postfix_str(f"{told}, {rate:.0f} images/s", refresh=False)
        return {"seconds": now - self.begun, "images_per_second": rate}

    def close(self) -> None:
        self.bar.close()


def generator(*seed: int) -> torch.Generator:
    """CPU randomness as a pure function of a few integers (seed, stage, step)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def write_picture(file: Path, image: np.ndarray) -> None:
    """uint8 [h, w, 3] -> a PNG, written whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torso = file.with_suffix(".tmp")
    Image.fromarray(image).save(torso, format="PNG")
    os.replace(torso, file)
