"""Loss spikes: single steps far above where the loss has been going, and a loss that has left for good.

The loss of a step is noisy (its batch, its times), skewed, and falls: fast at first, slowly later. In its logarithm the
noise is near enough symmetric and of one size all along, so that is what is watched. The course is its exponentially
weighted mean; the size of the noise is taken from the differences of successive steps, to which the fall adds nothing.
A loss joins the course only when it is RECENT steps old, and moved to within CLIP standard deviations of it: the course
does not follow what is to be judged by it, and no spike lifts or widens it. It lags behind a loss that falls, which
then lies below it; nothing is said of losses below.
"""

from __future__ import annotations

import math
from typing import Any

HORIZON = 500               # steps the course remembers: long against a spike, short against the fall of a healthy loss
YOUNG_SHARE = 5                   # and of a young run at most a fifth of its steps: the steep beginning is soon forgotten
WARMUP = 100                # steps in the course before anything is said
CLIP = 3.0                  # standard deviations; 0.3 % of normal noise lies beyond
FALL = 1.0                  # in log(loss): a loss further below joins the course as if no further. More than the course ever lags
SMALLEST = 0.03             # of the noise; batches of 64 measured 0.055 (U-Net, flow), larger ones have less and wander besides
SPIKE = 6.0                 # standard deviations: beyond it one step of normal noise in 10^9
OVER = 3.0                  # a spike is over when the loss has stayed below so many for RECENT steps
RECENT = 20                 # steps
DIVERGED = 16                   # so many of the recent ones above max(1 standard deviation, RISE): by chance once in 10^9 steps; a
RISE = math.log(1.4)        # spike that is over within 15 steps is not a divergence, nor is a slow rise that the course follows


class LossMonitor:
    """Holds the loss of every step against its recent course.

    For losses that should differ (another resolution, another objective) begin a new one.
    """

    def __init__(self):
        self.mean = self.variance = 0.0                        # of log(loss); of its noise
        self.before = 0.0                                      # the log(loss) that joined last
        self.count = 0                                         # steps in them
        self.recent: list[float] = []                          # log(loss) of the last steps, oldest first
        self.spike = 0                                         # steps until it is over; 0: there is none

    def observe(self, step: int, loss: float) -> str:
        """Take note of a step's (finite) loss -> "", or at the first step of a spike a line about it."""
        value = math.log(max(loss, 1e-12))
        if len(self.recent) == RECENT:
            self._join(self.recent.pop(0))
        self.recent.append(value)
        if self.count < WARMUP:
            return ""
        above, was = (value - self.mean) / self._std(), self.spike
        self.spike = RECENT if above > (OVER if was else SPIKE) else max(was - 1, 0)
        if was or not self.spike:
            return ""
        return f"loss {loss:.3g} at step {step} is {above:.0f} standard deviations above its course of {math.exp(self.mean):.3g}"

    @property
    def diverged(self) -> bool:
        """Whether the loss has left its course for good: DIVERGED of the last RECENT steps are far above it."""
        line = self.mean + max(self._std(), RISE)
        return self.count >= WARMUP and sum(value > line for value in self.recent) >= DIVERGED

    def state(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return vars(self) | {"recent": list(self.recent)}

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update(state, recent=list(state["recent"]))

    def _std(self) -> float:
        return max(math.sqrt(self.variance), SMALLEST)

    def _join(self, value: float) -> None:
        self.count += 1
        weight = max(YOUNG_SHARE / (self.count + YOUNG_SHARE - 1), 1 / HORIZON)
        jump = value - self.before if self.count > 1 else 0.0
        if self.count >= WARMUP:                               # before, there is nothing to judge an outlier by
            value = min(max(value, self.mean - FALL), self.mean + CLIP * self._std())
            jump = min(abs(jump), 2**0.5 * CLIP * self._std())
        self.mean += weight * (value - self.mean)
        self.variance += weight * (jump * jump / 2 - self.variance)
        self.before = value
