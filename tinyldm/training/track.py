"""Copies the log to TensorBoard or Weights & Biases (--track).

log.jsonl stays the record. Neither package is needed or imported unless --track names it, and once a run has begun no error
here may end it: the first one is printed, and tracking stops.
"""

from __future__ import annotations

import importlib
import json
import math
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyldm.files import write_file
from tinyldm.lookup import lookup
from tinyldm.training.portable import portable_settings
from tinyldm.unicode import shown

PATIENCE = 20               # seconds to wait for the last uploads; an interrupted run must end soon


def find_backend(kind: str) -> type[TensorBoard] | type[WandB]:
    """The class for --track. ValueError, with advice, for an unknown kind or a missing package; called before training begins."""
    package, backend = lookup({"tensorboard": ("torch.utils.tensorboard", TensorBoard), "wandb": ("wandb", WandB)}, kind, "--track")
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f'--track {kind} needs a package that is missing ({error}): pip install {kind}') from None
    return backend


class Tracker:
    """Sends rows of log.jsonl to a tracking service; does nothing for kind "".

    kind    tensorboard (files in RUN/tensorboard: tensorboard --logdir RUN/tensorboard) or wandb (files in RUN/wandb,
            project tinyldm, a run named after the folder; WANDB_MODE, WANDB_PROJECT and the like work as usual)
    config  the run's settings, of which a service gets paths and URLs without what is private (portable.py)
    step    the step from which training continues: TensorBoard drops the points of later steps. W&B keeps points that were
            sent, and draws those of a repeated step on top of them

    ValueError for an unknown kind and for a package that is not installed. After a rollback to an earlier step in the same
    process, close the tracker and make another.
    """

    def __init__(self, kind: str, run: Path, config: dict, step: int):
        self.kind, self.backend = kind, None
        if not kind:
            return
        backend = find_backend(kind)
        try:
            self.backend = backend(run, {name: legible(value) for name, value in portable_settings(config).items()}, step)
        except Exception as error:                             # no network or a full disk must not end the run
            self._stop(error)

    def row(self, row: dict) -> None:
        """Send a row of log.jsonl: numbers as curves STAGE/NAME, lists as one curve for each index, events as text."""
        self._attempt(lambda backend: send(backend, row))

    def picture(self, name: str, file: Path | None, step: int) -> None:
        """Send a picture file, drawn after `step` steps; None where there is none."""
        if file is not None:
            self._attempt(lambda backend: backend.picture(name, file, step))

    def close(self) -> None:
        """Send what is left, and stop tracking."""
        self._attempt(lambda backend: backend.close())
        self.backend = None

    def _attempt(self, work: Callable[[Any], None]) -> None:
        try:
            if self.backend is not None:
                work(self.backend)
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self.backend = None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"--track {self.kind} failed and is off from here on, training goes on: {reason}", flush=True)


def legible(value: Any) -> Any:
    """A setting as a service can take it: text that is Unicode, which a path may not be."""
    return shown(value) if isinstance(value, str) else [legible(part) for part in value] if isinstance(value, list) else value


def send(backend: TensorBoard | WandB, row: dict) -> None:
    stage, step = row["stage"], row["step"]
    if "event" in row:
        rest = {key: value for key, value in row.items() if key not in ("stage", "step", "event", "text")}
        message = shown(" ".join([str(row.get("text", "")), json.dumps(rest) if rest else ""]).strip())
        backend.text(stage, f"{stage}/{row['event']}", message, step)
    elif numbers := {f"{stage}/{name}": value for name, value in flat(row).items()}:
        backend.numbers(stage, numbers, step)


def flat(row: dict) -> dict[str, float]:
    """The finite numbers of a row; those in lists under NAME/INDEX."""
    found = {}
    for name, value in row.items():
        parts = {f"{name}/{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
        found |= {key: part for key, part in parts.items()
                  if name not in ("stage", "step") and type(part) in (int, float) and math.isfinite(part)}
    return found


class TensorBoard:
    """Each stage has a folder of its own, because dropping a stage's later steps (purge_step) must not touch the other's."""

    def __init__(self, run: Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.new: Callable[[str], Any] = lambda part: SummaryWriter(str(run / "tensorboard" / part), purge_step=step + 1)
        self.writers: dict[str, Any] = {}
        self._writer("settings").add_text("settings", "".join(f"    {name}: {value}\n" for name, value in config.items()), step)

    def _writer(self, part: str) -> Any:
        if part not in self.writers:
            self.writers[part] = self.new(part)
        return self.writers[part]

    def numbers(self, stage: str, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer(stage).add_scalar(name, value, step)

    def text(self, stage: str, name: str, message: str, step: int) -> None:
        self._writer(stage).add_text(name, message, step)

    def picture(self, name: str, file: Path, step: int) -> None:
        with Image.open(file) as image:
            self._writer("pictures").add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class WandB:
    """One W&B run for a run folder, kept over interruptions: its id is in RUN/wandb-id.txt. Each stage logs its own step as a
    metric, because W&B's own step must never decrease."""

    def __init__(self, run: Path, config: dict, step: int):
        import wandb

        name = run / "wandb-id.txt"
        if not name.exists():
            write_file(name, secrets.token_hex(8).encode())
        self.wandb = wandb
        self.run = wandb.init(dir=str(run), project="tinyldm", name=run.resolve().name, id=name.read_text(encoding="utf-8").strip(),
                              resume="allow", config=config, allow_val_change=True)
        self.stages: set[str] = set()

    def numbers(self, stage: str, values: dict[str, Any], step: int) -> None:
        if stage not in self.stages:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
        self.run.log(values | {f"{stage}/step": step})

    def text(self, stage: str, name: str, message: str, step: int) -> None:
        self.numbers(stage, {name: message}, step)

    def picture(self, name: str, file: Path, step: int) -> None:
        self.numbers("pictures", {f"pictures/{name}": self.wandb.Image(str(file))}, step)

    def close(self) -> None:
        """Finish in a daemon thread, so that a broken network delays the run by PATIENCE seconds at most."""
        finishing = threading.Thread(target=self.run.finish, daemon=True)
        finishing.start()
        finishing.join(PATIENCE)
        if finishing.is_alive():
            raise TimeoutError(f"W&B has not taken everything in {PATIENCE} seconds: wandb sync sends the rest from the run's folder")
