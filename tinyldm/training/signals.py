"""The signals that end a run: they take effect between two steps."""

from __future__ import annotations

import os
import signal


class Interrupted(Exception):
    """A signal arrived; the step in progress was finished and saved before this is raised."""


class Signals:
    """Handles SIGINT, SIGTERM and SIGHUP: the first is remembered for the end of the step, a second ends the program at once."""

    def __init__(self):
        self.received = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):           # Windows has no SIGHUP; under nohup it stays ignored
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
                signal.signal(getattr(signal, name), self.remember)

    def remember(self, number: int, frame) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        print("\nstopping after this step, with a checkpoint (a second signal stops at once)", flush=True)

    def check(self) -> None:
        """Raise Interrupted after a signal. For work outside training steps, where there is no step to finish first."""
        if self.received:
            raise Interrupted
