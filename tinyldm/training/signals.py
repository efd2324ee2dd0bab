"""The signals that end a run: they take effect between two steps."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

AGAIN = 1.0                             # seconds after which Ctrl-C counts as pressed once more


class Interrupted(Exception):
    """A signal arrived; the step in progress was finished and saved before this is raised."""


class Signals:
    """Handles SIGINT, SIGTERM and SIGHUP: the first is remembered for the end of the step.

    One request to stop often arrives as several signals within milliseconds: a closing terminal sends SIGHUP from the shell and from the
    kernel, systemd and `scancel` signal torchrun and its processes, to which torchrun passes the signal on. None of these may cost the
    checkpoint. Only a person ends the program at once: by SIGINT (Ctrl-C), and SIGINT again at least a second later."""

    def __init__(self):
        self.received, self.first_interrupt = 0, None
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):           # Windows has no SIGHUP; under nohup it stays ignored
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
                signal.signal(getattr(signal, name), self.remember)

    def remember(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.first_interrupt is not None and now - self.first_interrupt >= AGAIN:
                os._exit(128 + number)
            self.first_interrupt = now if self.first_interrupt is None else self.first_interrupt
        if self.received:
            return
        self.received = number
        # The terminal may be gone, and a handler that interrupts a print cannot print itself (RuntimeError: reentrant call).
        with suppress(OSError, ValueError, RuntimeError):
            print("\nstopping after this step, with a checkpoint (Ctrl-C again, a second later, stops at once)", flush=True)

    def check(self) -> None:
        """Raise Interrupted after a signal. For work outside training steps, where there is no step to finish first."""
        if self.received:
            raise Interrupted
