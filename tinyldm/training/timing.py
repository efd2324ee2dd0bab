"""What depends on the clock in a run: the decay of the learning rate, the end, the change to the next picture size, the plan.

All processes must take the same steps, so each step reads the clock (synchronise), and all of them use the latest
reading.
"""

from __future__ import annotations

import time
from itertools import accumulate
from typing import Any

from tinyldm.config import OptimisationConfig
from tinyldm.durations import show_date
from tinyldm.training.clock import StepTimer
from tinyldm.training.context import RunContext
from tinyldm.training.schedule import Revision, make_schedule


class Timing:
    """A schedule, with the time that all processes have in common.

    saved       the schedule in the checkpoint to continue from; None for a run that begins, or that counts steps
    fractions   of the training that each phase has, summing to 1
    costs       FLOPs of training on one picture, per phase, in any unit
    """

    def __init__(self, context: RunContext, settings: OptimisationConfig, saved: dict[str, Any] | None, fractions: list[float],
                 costs: list[float]):
        self.context, self.fractions, self.costs = context, fractions, costs
        self.ends = list(accumulate(fractions))
        self.timer, self.signal = StepTimer(), 0
        self.over = False                                       # training ends now, before its schedule does
        self.synchronise()
        self.schedule = make_schedule(settings, saved, self.running, self.now)

    def synchronise(self, failed: bool = False) -> bool:
        """Read the clock and the received signal, as the maximum over all processes. -> whether `failed` is true in any of them."""
        self.running, self.now, anywhere, signal = self.context.world.all_reduce_max(
            self.context.clock.running(), time.time(), failed, self.context.signals.received)
        self.signal = int(signal)
        return bool(anywhere)

    def factor(self, step: int) -> float:
        """The factor that multiplies the learning rate in optimizer step `step` (0-based)."""
        return self.schedule.factor(step, self.running, self.now)

    def done(self, step: int) -> bool:
        return self.over or self.schedule.done(step, self.running, self.now)

    def progress(self, step: int) -> float:
        """The fraction of the training that is over."""
        return self.schedule.progress(step, self.running, self.now)

    def phase_over(self, step: int, phase: int) -> bool:
        """Whether a phase has had its fraction of the training; the last one goes on to the end."""
        return phase + 1 < len(self.ends) and self.progress(step) >= self.ends[phase] - 1e-9

    def resume(self, step: int) -> Revision | None:
        """Adapt a checkpoint's schedule to the time that has passed since. -> what has changed in the plan, if anything."""
        return self.schedule.resume(step, self.running, self.now)

    def revise(self, step: int, phase: int) -> Revision | None:
        """With a budget: update the planned number of steps from the measured speed. -> what has changed, if anything."""
        rate, reserve = self.context.world.all_reduce_max(self.seconds_per_step(step, phase), sum(self.timer.costs.values()))
        return self.schedule.revise(step, self.running, rate, reserve, self.now)

    def seconds_per_step(self, step: int, phase: int) -> float:
        """The average from now to the end of training; 0: not known yet."""
        if not self.timer.times:
            return 0.0
        return mean_rate(self.timer.rate, self.progress(step), phase, self.fractions, self.costs)

    def finish(self, step: int, phase: int) -> str:
        """The expected date of the end, as text."""
        if self.schedule.max_steps:
            return show_date((self.schedule.total - step) * self.seconds_per_step(step, phase))
        return show_date(self.schedule.left(self.running, self.now))


def mean_rate(rate: float, progress: float, phase: int, fractions: list[float], costs: list[float]) -> float:
    """Average seconds per step from now to the end: `rate` in this phase, and in later phases in proportion to their costs.
    fractions: of the training time, for each phase. costs: FLOPs of training on one picture, for each phase."""
    ends = list(accumulate(fractions))
    remaining = [max(ends[i] - max(progress, ends[i] - fractions[i]), 0.0) for i in range(phase, len(fractions))]
    steps = sum(time_left / (rate * costs[i] / costs[phase]) for i, time_left in enumerate(remaining, phase))
    return sum(remaining) / steps if steps else rate
