"""The signals that end a run, obeyed between two steps."""

from __future__ import annotations

import os
import signal


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
        print("\nstopping after this step, with a checkpoint (once more: leave at once)", flush=True)

    def check(self) -> None:
        """Interrupted, where there is nothing to finish first."""
        if self.received:
            raise Interrupted
