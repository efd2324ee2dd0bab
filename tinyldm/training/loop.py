"""What the loops of both stages share: one update, a line of the log, where to go on."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyldm.config import Config
from tinyldm.training import checkpoint
from tinyldm.training.distributed import clip
from tinyldm.training.log import Log, read
from tinyldm.training.meter import Meter
from tinyldm.training.report import write_report
from tinyldm.training.run import Progress, span
from tinyldm.training.schedule import Schedule, moment, seconds


def update(parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], max_norm: float, meter: Meter) -> float | None:
    """One optimizer step on the gradients at hand, clipped to a global norm -> the step's loss. None, and no step, where
    it or the norm is not finite. (The one place where the device is waited for: once per step, not per micro-batch.)"""
    norm = clip(parameters, max_norm)
    loss = float(meter.waiting[0])
    if good := math.isfinite(norm) and math.isfinite(loss):
        for optimizer in optimizers:
            optimizer.step()
        meter.keep(norm)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return loss if good else None


def write_log(log: Log, stage: str, step: int, meter: Meter, bar: Progress, factor: float, lr: float, finish: str = "", **more: Any) -> None:
    """A row of the log, and the same on the bar."""
    row = meter.row()
    log.write(stage=stage, step=step, lr_factor=factor, **row, **more, **bar.report(row["loss"], lr, finish))


class RolledBack(Exception):
    """At `step` the loss has left its course, since about step `since`."""

    def __init__(self, since: int, step: int, window: int):
        super().__init__(f"the loss left its course about step {since}")
        self.since, self.step, self.window = since, step, window

    def retreat(self, run: Path) -> tuple[str, int]:
        """Give up the checkpoints since -> the one to go on from, and how many batches have been passed over by then: those up to
        this step. ValueError where there is none."""
        last = checkpoint.newest_whole(run, self.since)
        if last is None or not last.name.startswith("step"):
            raise ValueError(f"{self}, before the first checkpoint there is: start again with a lower --lr and --muon-lr, or a longer "
                             "--warmup-steps")
        checkpoint.forget(run, self.since)
        return str(last), self.window + self.step - checkpoint.read_state(last)["step"]


def passed_over(run: Path, last: Path | None) -> int:
    """The batches that a rollback to this checkpoint passed over, if there was one before the process was killed."""
    if last is None or not (run / "log.jsonl").exists():
        return 0
    step = checkpoint.read_state(last)["step"]
    return max((row["window"] for row in read(run / "log.jsonl") if row.get("event") == "rollback" and row["step"] == step), default=0)


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says, on a GPU or a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("out of memory", "not enough memory", "can't allocate memory"))


def make_schedule(config: Config, saved: dict[str, Any] | None, running: float, now: float) -> Schedule:
    """The course of stage 2, or the rest of it. saved: the plan in the checkpoint to go on from, which is kept unless
    another end has been asked for since; None for a run that begins, or goes by steps. ValueError where no time is left."""
    asked = Schedule(warmup=config.warmup_steps, decay=config.decay, max_steps=config.max_steps,
                     budget=seconds(config.budget) if config.budget else 0.0, deadline=moment(config.deadline) if config.deadline else 0.0)
    if asked.max_steps:
        return asked
    plan = Schedule.from_state(saved) if saved else None
    if plan and (asked.budget, asked.deadline) == (plan.budget, plan.deadline):
        return plan
    asked.begun, asked.running = (plan.begun, plan.running) if plan else (running, running)
    left = asked.left(running, now)
    if plan and left < asked.decay * (running + left):         # still in the decay: on from where it is
        asked.share = plan.share
    if left <= 0:
        raise ValueError(f"no time is left for training, the run has been running for {span(running)}: nothing is lost, go on with "
                         "--resume auto and a larger --budget or a later --deadline, or with --max-steps")
    return asked


def mean_rate(rate: float, progress: float, place: int, shares: list[float], costs: list[float]) -> float:
    """Seconds per step on average from here to the end: `rate` in stage `place`, in later ones in proportion to the cost of a
    picture. shares: of the time, per stage."""
    ends = list(accumulate(shares))
    times = [ends[i] - max(progress, ends[i] - shares[i]) for i in range(place, len(shares))]
    steps = sum(max(spent, 0.0) / (rate * costs[i] / costs[place]) for i, spent in enumerate(times, place))
    return sum(max(spent, 0.0) for spent in times) / steps if steps else rate


def attempt(what: str, work: Callable[[], Any]) -> None:
    """Do what a run can do without: a failure is told, and training goes on."""
    try:
        work()
    except Exception as error:
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
