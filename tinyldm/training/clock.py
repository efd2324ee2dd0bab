"""How long a run has been running, and how long its steps take."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

from tinyldm.files import write_file


class Clock:
    """Running time: for how many seconds the processes of a run have been alive, added up over its interruptions.

    running() writes it to RUN/running.json, at most once in EVERY seconds. A kill loses the time since the last write, which is
    long where nothing called running() (during a sample grid, for example). Measured with time.monotonic(), which nobody sets.
    Without a file (in all processes but the main one) only this process's time counts.
    """

    EVERY = 2.0

    def __init__(self, run: Path | None, begun: float | None = None):
        self.file = run / "running.json" if run else None
        self.begun = time.monotonic() if begun is None else begun
        self.before = self.written = 0.0
        with suppress(OSError, ValueError, TypeError, KeyError):         # a damaged or missing file counts as 0: see at_least
            self.before = max(0.0, float(json.loads(self.file.read_text(encoding="utf-8"))["seconds"])) if self.file else 0.0

    def running(self) -> float:
        seconds = self.before + time.monotonic() - self.begun
        if self.file and seconds - self.written > self.EVERY:
            self.written = seconds
            with suppress(OSError):                                      # a full disk is reported by the next checkpoint
                write_file(self.file, json.dumps({"seconds": round(seconds, 3)}))
        return seconds

    def at_least(self, seconds: float) -> None:
        """Take over the running time that a checkpoint noted, in case running.json was lost or not copied with the run."""
        self.before = max(self.before, seconds)

    def close(self) -> None:
        self.written = -math.inf
        self.running()


class StepTimer:
    """How long steps take, and how much time passes between them."""

    def __init__(self):
        self.times: deque[float] = deque(maxlen=100)                     # seconds of the newest steps
        self.mark, self.steps, self.between = time.perf_counter(), 0, 0.0        # start of the step; steps so far; seconds between
        self.costs: dict[str, float] = {}                                # seconds by kind of work between steps, when last done

    def step(self) -> None:
        now = time.perf_counter()
        self.times.append(now - self.mark)
        self.mark, self.steps = now, self.steps + 1

    def restart(self) -> None:
        """Forget the measured times: steps of another length begin (another picture size)."""
        self.times.clear()
        self.mark = time.perf_counter()

    @contextmanager
    def outside_steps(self, what: str) -> Iterator[None]:
        """Time the work inside, such as validation, and do not count it as part of a step."""
        begun = time.perf_counter()
        yield
        self.costs[what] = took = time.perf_counter() - begun
        self.mark, self.between = self.mark + took, self.between + took

    @property
    def seconds(self) -> float:
        """Seconds per step: the median of the newest hundred."""
        return median(self.times)

    @property
    def rate(self) -> float:
        """Seconds per step, including what is done between steps."""
        return self.seconds + self.between / self.steps
