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
    """Running time: how long the processes of a run have been alive, all of them added up, in seconds.

    It is kept in RUN/running.json, rewritten at a look at it, every EVERY seconds at most: a kill costs that and the time since
    the last look (a sample grid may take a while). Counted on a clock that nobody sets. Without a file (processes beside the
    main one) only this process counts.
    """

    EVERY = 2.0

    def __init__(self, run: Path | None, begun: float | None = None):
        self.file = run / "running.json" if run else None
        self.begun = time.monotonic() if begun is None else begun
        self.before = self.written = 0.0
        with suppress(OSError, ValueError, TypeError, KeyError):         # torn or gone: see at_least
            self.before = max(0.0, float(json.loads(self.file.read_text())["seconds"])) if self.file else 0.0

    def running(self) -> float:
        seconds = self.before + time.monotonic() - self.begun
        if self.file and seconds - self.written > self.EVERY:
            self.written = seconds
            with suppress(OSError):                                      # a full disk has louder ways to say so
                write_file(self.file, json.dumps({"seconds": round(seconds, 3)}))
        return seconds

    def at_least(self, seconds: float) -> None:
        """What a checkpoint knows of the processes before, where the file is lost or did not come along."""
        self.before = max(self.before, seconds)

    def close(self) -> None:
        self.written = -math.inf
        self.running()


class StepTimer:
    """How long steps take, and what else is done between them."""

    def __init__(self):
        self.times: deque[float] = deque(maxlen=100)                     # seconds of the newest steps
        self.mark, self.steps, self.between = time.perf_counter(), 0, 0.0
        self.costs: dict[str, float] = {}                                # seconds that each of the other things took last time

    def step(self) -> None:
        now = time.perf_counter()
        self.times.append(now - self.mark)
        self.mark, self.steps = now, self.steps + 1

    def restart(self) -> None:
        """Steps of another length begin."""
        self.times.clear()
        self.mark = time.perf_counter()

    @contextmanager
    def outside_steps(self, what: str) -> Iterator[None]:
        """Around work that is not part of a step, such as validation."""
        begun = time.perf_counter()
        yield
        self.costs[what] = took = time.perf_counter() - begun
        self.mark, self.between = self.mark + took, self.between + took

    @property
    def seconds(self) -> float:
        """Of a step: the median of the newest hundred."""
        return median(self.times)

    @property
    def rate(self) -> float:
        """Seconds per step, including what is done between steps."""
        return self.seconds + self.between / self.steps
