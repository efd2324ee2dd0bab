"""Runs train.py's own main job in this process, and watches its steps.

Nothing of the training is written anew here: train.py runs as it does from the command line, and a Watch is told what happens, by
way of the methods of Learner and LatentStage that each run calls."""

from __future__ import annotations

import gc
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tinyldm.training import checkpoint, learner, second_stage

ROOT = Path(__file__).parent.parent.parent


class Enough(SystemExit):
    """Ends a run, without a checkpoint, as if all were well."""

    def __init__(self):
        super().__init__(0)


class Watch:
    """What happens in a run, in its order; of steps, only those of the training itself, not the rehearsal's before it. The base class
    remembers losses, gradient norms and times."""

    def __init__(self):
        self.losses: list[float | None] = []
        self.norms: list[float] = []
        self.ends: list[float] = []                             # when each step ended, on this process's clock
        self.micro_batches: list[int] = []                      # of each phase, per step, at first

    def started(self, found: learner.Learner) -> None:
        """The networks are on the device, and optimizers and averages exist: of the rehearsal, then of the training."""
        self.learner = found

    def phase(self, found: Any) -> None:
        """Training at one picture size begins. found: its Phase."""
        self.micro_batches.append(found.micro_batches)

    def updating(self) -> None:
        """All gradients are there, and clipped."""

    def updated(self, update: learner.Update, norm: float) -> None:
        """The optimizers have been told to take a step, for which the GPU may still be busy."""
        self.losses.append(update.loss)
        self.norms.append(norm)

    def stepped(self, step: int) -> None:
        """Step `step`, counted from 1, is over."""
        self.ends.append(time.perf_counter())

    def saved(self, seconds: float) -> None:
        """A checkpoint was copied to host memory: how long the training stood still."""

    def written(self, seconds: float) -> None:
        """A checkpoint is on the disk; called in another thread."""

    def drawing(self) -> None:
        """A sample grid begins."""

    def drawn(self, seconds: float) -> None:
        """A sample grid is done."""


def timed(function: Callable, tell: Callable[[float], None], before: Callable[[], None] = lambda: None) -> Callable:
    """The function, which afterwards tells how long it took."""
    def call(*args: Any, **kwargs: Any) -> Any:
        before()
        begun = time.perf_counter()
        result = function(*args, **kwargs)
        tell(time.perf_counter() - begun)
        return result
    return call


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """While this lasts, a run in this process tells the watch what it does."""
    kind, stage = learner.Learner, second_stage.LatentStage
    begin, update, average, phase = kind.__init__, kind.update, kind.average, stage.begin_phase

    def begins(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        watch.started(self)

    def updates(self, turn, norm, *args, **kwargs):
        if not watch.micro_batches:                             # the rehearsal
            return update(self, turn, norm, *args, **kwargs)
        watch.updating()
        result = update(self, turn, norm, *args, **kwargs)
        watch.updated(result, norm)
        return result

    def averages(self, step):
        average(self, step)
        watch.stepped(step)

    def begins_phase(self, index):
        found = phase(self, index)
        watch.phase(found)
        return found

    with (patch.object(kind, "__init__", begins), patch.object(kind, "update", updates), patch.object(kind, "average", averages),
          patch.object(stage, "begin_phase", begins_phase), patch.object(kind, "save", timed(kind.save, watch.saved)),
          patch.object(checkpoint, "write", timed(checkpoint.write, watch.written)),
          patch.object(stage, "draw_samples", timed(stage.draw_samples, watch.drawn, watch.drawing))):
        yield


def run_training(words: list[str], watch: Watch) -> Watch:
    """Run train.py with these flags in this process -> the watch. RuntimeError where it ends with an error."""
    streams, argv = (sys.stdout, sys.stderr), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["train.py", *map(str, words)]
    try:
        with watched(watch):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"train.py ended with code {end.code}; its last lines say why") from None
    finally:
        sys.argv, (sys.stdout, sys.stderr) = argv, streams
        for number, handler in handlers.items():
            signal.signal(number, handler)
        watch.learner = None                                    # which holds all the memory of the run
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return watch


def start(words: list[str], **options: Any) -> subprocess.Popen:
    """A script of this project as a process; words begins with the script's name. What it prints goes to this part's log."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, **options)


def finish(words: list[str], seconds: float = 600) -> None:
    """Run a script to its end. RuntimeError where it ends with an error, TimeoutExpired where it takes longer."""
    if code := start(words).wait(seconds):
        raise RuntimeError(f"{' '.join(map(str, words[:3]))} ... ended with code {code}; its last lines say why")
