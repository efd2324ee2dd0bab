"""What is measured of a call: its time, the memory that it needs, the operations that it starts; and how fast the machine multiplies."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}          # rows and columns of the matrices that matmul_flops multiplies
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")      # beginnings of names; there are ...Ex and ...ExC
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of a call. The device is waited for before and after."""
    wait_for(device)
    begun = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - begun


def in_turns(calls: Sequence[Callable[[], T]], rounds: int, warm: int = 1) -> list[list[T]]:
    """For each call, what it returned in `rounds` rounds, in each of which every call has a turn. Their order is reversed from round to
    round, so that none always follows the same other one. The first `warm` rounds, which come before, are not counted."""
    found: list[list[T]] = [[] for _ in calls]
    for i in range(warm + rounds):
        for which in range(len(calls))[::-1 if i % 2 else 1]:
            result = calls[which]()
            if i >= warm:
                found[which].append(result)
    return found


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """FLOP/s of one product of two large square matrices."""
    size = size or PRODUCT_SIZE.get(device.type, 2048)
    one, two = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: one @ two, device)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS, those in main memory now, or VmHWM, the most since that was reset. Linux only."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"), re.MULTILINE)[1]) * 1024


def peak_gb(call: Callable[[], Any], device: torch.device) -> float | None:
    """GB by which a call's highest memory exceeds that before it: of the GPU, else of this process (of tensors, of a file that is mapped,
    of libraries' work space). None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        wait_for(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e9
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)         # memory that was freed and kept would be used again without being counted
        CLEAR.write_text("5", encoding="ascii")         # resets VmHWM
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before) / 1e9


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing reaches stderr, not from libraries in C++ either: the profiler announces its beginning and its end."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved), os.close(nowhere)


def launches(call: Callable[[], Any], device: torch.device) -> int:
    """On CUDA the kernels that a call launches. Elsewhere the operations of torch, without those that they call themselves; the fused
    loops of compiled code are not among them."""
    activity = torch.profiler.ProfilerActivity
    with quiet(), torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * (device.type == "cuda")]) as profiler:
        call()
        wait_for(device)
    if device.type == "cuda":
        return sum(event.name.startswith(LAUNCHES) for event in profiler.events())
    operation = lambda event: event is not None and re.match(r"\w+::", event.name) is not None
    return sum(operation(event) and not operation(event.cpu_parent) for event in profiler.events())
