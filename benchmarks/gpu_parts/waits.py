"""Where the host waits for the GPU during training steps, by torch.cuda.set_sync_debug_mode, against a list of what is allowed."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gpu_parts.stepping import ROOT

# "file function" -> why the host waits there.
ALLOWED = {
    "tinyldm/training/distributed.py clip": "the gradient norm, before it is decided whether the step is taken",
    "tinyldm/training/learner.py update": "the loss, likewise; in a step whose row goes to the log, the size of the update too",
    "tinyldm/training/meter.py row": "the sums for a row of the log",
}
EACH_STEP, LOGGED = 2, 2    # waits in every step, and more of them for a row of the log


def caller() -> str:
    """"file function" of the library or of a script from which the current line was called."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT / "tinyldm") or file.parent == ROOT:
            return f"{file.relative_to(ROOT).as_posix()} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the project"


@contextmanager
def counted(found: Counter) -> Iterator[None]:
    """While this lasts, every wait for the GPU is counted by its place."""
    def shown(message, *_, **__):
        if "called a synchronizing" in str(message):            # c10/cuda/CUDAFunctions.cpp
            found[caller()] += 1

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = shown
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def unexpected(found: Counter) -> list[str]:
    return [f"{name} ({count}x)" for name, count in found.most_common() if name not in ALLOWED]
