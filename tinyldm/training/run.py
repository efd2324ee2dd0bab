"""A run's surroundings: its folder, its progress bar, the signals that end it, its source of randomness."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tinyldm.files import flush, write_file


class Interrupted(Exception):
    """A signal arrived; the step in progress was finished and saved before this is raised."""


class Signals:
    """SIGINT, SIGTERM and SIGHUP, remembered and obeyed between steps. A second one ends the program at once."""

    def __init__(self):
        self.received = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):           # Windows has no SIGHUP; nohup wants it ignored
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
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


class Lasting:
    """A stream to people, who may go away (a closed terminal, a dead pipe): what cannot be written then is left out."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


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


class Pace:
    """How long steps take, and what is done between them."""

    def __init__(self):
        self.times: deque[float] = deque(maxlen=100)
        self.mark, self.steps, self.aside_total = time.perf_counter(), 0, 0.0
        self.costs: dict[str, float] = {}                                # seconds that each thing took, the last time

    def step(self) -> None:
        now = time.perf_counter()
        self.times.append(now - self.mark)
        self.mark, self.steps = now, self.steps + 1

    def restart(self) -> None:
        """Another kind of steps begins."""
        self.times.clear()
        self.mark = time.perf_counter()

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Around what is no part of a step."""
        begun = time.perf_counter()
        yield
        self.costs[what] = took = time.perf_counter() - begun
        self.mark, self.aside_total = self.mark + took, self.aside_total + took

    @property
    def seconds(self) -> float:
        """Of a step, the median of the newest hundred."""
        return median(self.times)

    @property
    def rate(self) -> float:
        """Seconds per step, with what is done between."""
        return self.seconds + self.aside_total / self.steps


class Progress:
    """A progress bar over optimizer steps: loss, learning rate, pictures per second, MFU, memory, the end.

    total: 0 where it is not known. flops: useful ones per picture, and peak: the device's per second, for the MFU.
    """

    def __init__(self, title: str, start: int, total: int, batch_size: int, device: torch.device, shown: bool = True):
        every = 0.5 if sys.stderr.isatty() else 30             # seconds: a log file needs few of these lines
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
        """The number of steps has become known, or another."""
        self.bar.total = total or None

    def report(self, loss: float | None, lr: float, finish: str = "") -> dict[str, float]:
        """Show it, and return what a log row has that depends on the clock or the machine: seconds since the bar began,
        images per second since the last report, mfu, memory_gb."""
        now = time.perf_counter()
        rate = self.steps * self.batch_size / (now - self.marked)
        self.marked, self.steps = now, 0
        row = {"seconds": now - self.begun, "images_per_second": rate}
        if self.flops and self.peak:
            row["mfu"] = rate * self.flops / self.peak
        if gigabytes := memory_gb(self.device):
            row["memory_gb"] = gigabytes
        told = ["no finite step" if loss is None else f"loss {loss:.4f}", f"lr {lr:.2g}", f"{rate:.0f} images/s"]
        told += [f"MFU {row.get('mfu', 0):.0%}"] * ("mfu" in row) + [f"{gigabytes:.1f} GB"] * bool(gigabytes)
        self.bar.set_postfix_str(", ".join(told + [f"ends {finish}"] * bool(finish)), refresh=False)
        return row

    def close(self) -> None:
        self.bar.close()


def memory_gb(device: torch.device) -> float:
    """The most that was in use at once, in GB: on the GPU, or by this process. 0: not known here."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource                                        # Windows has none
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def span(seconds: float) -> str:
    """3 d 4 h, 1 h 5 m, 20 m 3 s, 7 s."""
    left, parts = round(seconds), []
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def date(seconds: float) -> str:
    """So many seconds from now, in local time: Fri 27 Nov 14:05."""
    return time.strftime("%a %d %b %H:%M", time.localtime(time.time() + min(seconds, 1e9)))


def generator(*seed: int) -> torch.Generator:
    """CPU randomness as a pure function of a few integers (seed, stage, step)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def write_picture(file: Path, image: np.ndarray) -> None:
    """uint8 [h, w, 3] -> a PNG, written whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torso = file.with_suffix(".tmp")
    Image.fromarray(image).save(torso, format="PNG")
    flush(torso)
    os.replace(torso, file)
    flush(file.parent)
