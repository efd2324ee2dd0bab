"""Reads a profile of torch: which kernels a step spends its time in, how many are launched, and how long the GPU has nothing to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch.autograd import DeviceType

from benchmarks.bench.measure import LAUNCHES
from gpu_parts.page import table

ANNOTATIONS = ("Optimizer.", "ProfilerStep", "## ", "Torch-Compiled", "nccl:")


class Work(NamedTuple):
    """A kernel or a copy on the GPU; on a CPU, an operation without those that it calls."""

    name: str
    start: float        # microseconds
    end: float


class Profile(NamedTuple):
    work: list[Work]
    launches: int
    waits: int          # of the host for the GPU

    @property
    def idle(self) -> float:
        """The fraction of the time between the first kernel's start and the last one's end in which none runs."""
        if not self.work:
            return 1.0
        begin, end = min(item.start for item in self.work), max(item.end for item in self.work)
        return 1 - busy(self.work) / max(end - begin, 1e-9)


def busy(work: Iterable[Work]) -> float:
    """Microseconds in which at least one runs."""
    total, until = 0.0, float("-inf")
    for item in sorted(work, key=lambda item: item.start):
        total += max(0.0, item.end - max(item.start, until))
        until = max(until, item.end)
    return total


def read_profile(profiler: Any, on_gpu: bool) -> Profile:
    """From a torch.profiler.profile that has ended."""
    events = [event for event in profiler.events() if not getattr(event, "is_user_annotation", False)]
    named = lambda words: sum(event.name.startswith(words) for event in events if event.device_type == DeviceType.CPU)
    if on_gpu:
        work = [Work(event.name, event.time_range.start, event.time_range.end) for event in events
                if event.device_type == DeviceType.CUDA and not event.name.startswith(ANNOTATIONS)]
    else:
        work = [Work(event.name, event.time_range.start, event.time_range.start + event.self_cpu_time_total) for event in events]
    return Profile(work, named(LAUNCHES), named(("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")))


def top(profile: Profile, count: int = 15) -> str:
    """A table of the names that take longest."""
    sums: dict[str, list[float]] = {}
    for item in profile.work:
        sums.setdefault(item.name, []).append(item.end - item.start)
    whole = sum(map(sum, sums.values())) or 1.0
    longest = sorted(sums.items(), key=lambda each: -sum(each[1]))[:count]
    rows = [(f"`{name[:90]}`", len(times), f"{sum(times) / 1e3:.2f}", f"{sum(times) / whole:.1%}") for name, times in longest]
    return table(["kernel", "times", "ms", "share"], rows, right=(1, 2, 3))
