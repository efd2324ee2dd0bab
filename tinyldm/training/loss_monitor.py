"""Detects loss spikes (single steps far above the trend of the loss) and divergence (a loss that stays far above it).

The loss of a step is noisy (its batch and its times are random), skewed, and falls: fast at first, slowly later. The noise of
log(loss) is nearly symmetric and of nearly constant size, so log(loss) is what the monitor works on. The trend is its exponential
moving average; the size of the noise is estimated from the differences of successive steps, to which the fall adds almost
nothing. A value enters the average only RECENT steps later, clipped to CLIP standard deviations above it: so the trend does not
follow the values that are compared with it, and a spike neither raises it nor widens the noise. The trend lags behind a falling
loss, which then lies below it; losses below the trend are never reported.
"""

from __future__ import annotations

import math
from typing import Any

# Standard deviations are those of the noise of log(loss).
HORIZON = 500               # steps that the trend averages over: long compared with a spike, short compared with a healthy loss's fall
EARLY_DIVISOR = 5           # early in a run the trend averages over 1/5 of its steps at most, so that it forgets the steep beginning
WARMUP = 100                # steps in the trend before anything is reported
CLIP = 3.0                  # standard deviations above the trend that a value may have in the average; 0.3 % of normal noise is beyond
MAX_FALL = 1.0              # log(loss) below the trend that a value may have in the average; more than the trend ever lags
MIN_STD = 0.03              # of the noise. Batches of 64 measured 0.055 (U-Net, flow); larger batches have less, and their loss drifts
SPIKE = 6.0                 # standard deviations above the trend; one step of normal noise in 10^9 is higher
SPIKE_END = 3.0             # standard deviations: a spike is over after RECENT steps in a row below this
RECENT = 20                 # steps whose losses have not entered the trend yet
# Divergence: of the last RECENT steps, this number lies more than max(1 standard deviation, RISE) above the trend. By chance that
# happens once in 10^9 steps. A spike of up to 15 steps is no divergence, nor is a slow rise, which the trend follows.
DIVERGED = 16
RISE = math.log(1.4)


class LossMonitor:
    """Compares the loss of every step with its trend.

    Where losses of another size are to be expected (another resolution or objective), begin with a new monitor.
    """

    def __init__(self):
        self.mean = self.variance = 0.0                        # the trend of log(loss), and the variance of the noise around it
        self.before = 0.0                                      # the log(loss) that entered the trend last
        self.count = 0                                         # number of steps in the trend
        self.recent: list[float] = []                          # log(loss) of the last RECENT steps, oldest first
        self.spike = 0                                         # steps until the spike counts as over; 0: no spike

    def observe(self, step: int, loss: float) -> str:
        """Add the (finite) loss of a step. -> "", or a message at the first step of a spike."""
        value = math.log(max(loss, 1e-12))
        if len(self.recent) == RECENT:
            self._update_trend(self.recent.pop(0))
        self.recent.append(value)
        if self.count < WARMUP:
            return ""
        above, spike_before = (value - self.mean) / self._std(), self.spike
        self.spike = RECENT if above > (SPIKE_END if spike_before else SPIKE) else max(spike_before - 1, 0)
        if spike_before or not self.spike:
            return ""
        return f"loss {loss:.3g} at step {step} is {above:.0f} standard deviations above its trend of {math.exp(self.mean):.3g}"

    @property
    def diverged(self) -> bool:
        """Whether the loss has diverged: at least DIVERGED of the last RECENT steps lie far above the trend."""
        limit = self.mean + max(self._std(), RISE)
        return self.count >= WARMUP and sum(value > limit for value in self.recent) >= DIVERGED

    def state(self) -> dict[str, Any]:
        """All attributes, for JSON."""
        return vars(self) | {"recent": list(self.recent)}

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update(state, recent=list(state["recent"]))

    def _std(self) -> float:
        return max(math.sqrt(self.variance), MIN_STD)

    def _update_trend(self, value: float) -> None:
        self.count += 1
        weight = max(EARLY_DIVISOR / (self.count + EARLY_DIVISOR - 1), 1 / HORIZON)
        jump = value - self.before if self.count > 1 else 0.0
        if self.count >= WARMUP:                               # the noise must be known before outliers can be clipped
            value = min(max(value, self.mean - MAX_FALL), self.mean + CLIP * self._std())
            jump = min(abs(jump), 2**0.5 * CLIP * self._std())
        self.mean += weight * (value - self.mean)
        self.variance += weight * (jump * jump / 2 - self.variance)
        self.before = value
