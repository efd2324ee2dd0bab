"""What a metric is given, and what it gives back.

A metric is two functions of an Evaluation: `check` refuses, before any work is done, a model that it cannot measure;
`measure` does the work. A metric of a model draws with `Evaluation.draw`, which keeps the pictures, so that metrics that ask for the same
prompts share them. The table of metrics is in metrics.py, apart from here so that `evaluate.py --help` need not import torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tinyldm.device import autocast
from tinyldm.evaluation.progress import progress
from tinyldm.model import Model
from tinyldm.pipeline import DrawSettings, draw
from tinyldm.training.distributed import World


class Measurement(NamedTuple):
    """The result of a metric."""

    lines: Sequence[str]                # to print
    record: Mapping[str, Any]           # what JSON can hold: written to OUT/METRIC.json
    files: Sequence[Path] = ()          # other files that the metric wrote


class Drawn(NamedTuple):
    images: np.ndarray                  # uint8 [n, h, w, 3]
    seconds: float                      # that drawing them took


class NotFirst(Exception):
    """Raised by a metric in every process but torchrun's first, where its share of the work ends."""


def switches(settings: DrawSettings) -> dict[str, Any]:
    """The ways to draw that are off by default, where they are on."""
    return {**({"guidance": settings.guidance} if settings.guidance != "cfg" else {}),
            **({"guidance_rescale": settings.rescale} if settings.rescale else {}),
            **({"guidance_interval": settings.interval} if settings.interval else {}),
            **({settings.shortcut.name: settings.shortcut.value} if settings.shortcut else {})}


@dataclass
class Evaluation:
    """One model, one autoencoder, or pictures under evaluation: what every metric is given."""

    model: Model | None                 # None where an autoencoder or pictures are measured
    source: Path | str                  # where the model was loaded from
    settings: DrawSettings | None       # how the model draws
    device: torch.device
    out: Path                           # folder for what metrics write; it exists when `measure` is called
    count: int = 500                    # pictures to draw or to read
    seed: int = 0                       # of the first picture; the next has seed + 1
    batch_size: int = 50
    dtype: str = "auto"                 # of autocast
    no_ema: bool = False                # the raw weights were loaded
    options: Mapping[str, Any] = field(default_factory=dict)            # values of the metrics' own flags, by argparse's names
    vae: nn.Module | None = None        # the autoencoder that is measured
    adapters: Mapping[str, Sequence[str]] = field(default_factory=dict)     # flag -> files that were applied to the model
    guidance: Sequence[DrawSettings] = ()       # `settings` at every guidance scale that was typed
    world: World = field(default_factory=World)                         # the processes that torchrun has started
    drawing: bool = False               # whether a process draws pictures into files, which the others wait for
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)      # what metrics share, by a key of their own
    _drawn: dict[tuple[str, ...], Drawn] = field(default_factory=dict, init=False, repr=False)

    def leave_unless_first(self) -> None:
        """NotFirst in every process but the first, which measures and writes what all have made."""
        if not self.world.main:
            raise NotFirst

    def draw(self, prompts: Sequence[str]) -> Drawn:
        """One picture per prompt, picture i from `seed + i`. The same prompts are drawn once; do not write into the images."""
        key = tuple(prompts)
        if key not in self._drawn:
            begun = time.perf_counter()
            images = self._draw_batches(key)
            self._drawn[key] = Drawn(images, time.perf_counter() - begun)
        return self._drawn[key]

    def _draw_batches(self, prompts: Sequence[str]) -> np.ndarray:
        images = []
        with progress(len(prompts)) as bar, autocast(self.device, self.dtype):
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                images.append(draw(self.model, batch, range(self.seed + start, self.seed + start + len(batch)), self.settings))
                bar.update(len(batch))
        return np.concatenate(images)

    def facts(self, seconds: float) -> dict[str, Any]:
        """How the pictures were drawn, for a metric's record. seconds: `Drawn.seconds`."""
        return {"model": str(self.source), "seconds": round(seconds, 1), "step": self.model.defaults.get("step"),
                **{name: getattr(self.settings, name) for name in ("cfg", "steps", "sampler", "schedule")},
                **switches(self.settings), **{name: getattr(self, name) for name in ("seed", "dtype", "no_ema")}, **self.adapters}
