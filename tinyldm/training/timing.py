"""What of a run depends on the clock: the learning rate's fall, the end, the change to the next picture size, the plan.

The clock is read once per step (agree), and all processes use what was read then: they must take the same steps.
"""

from __future__ import annotations

import time
from itertools import accumulate

from tinyldm.durations import show_date
from tinyldm.training.clock import StepTimer
from tinyldm.training.context import RunContext
from tinyldm.training.schedule import LearningRateSchedule, Revision


class Timing:
    """A schedule, with the time that all processes agree on.

    fractions   of the training that each phase has, summing to 1
    costs       FLOPs of training on one picture, per phase, in any unit
    """

    def __init__(self, context: RunContext, fractions: list[float], costs: list[float]):
        self.context, self.fractions, self.costs = context, fractions, costs
        self.ends = list(accumulate(fractions))
        self.timer, self.signal = StepTimer(), 0
        self.schedule: LearningRateSchedule | None = None
        self.agree()

    def agree(self, failed: bool = False) -> bool:
        """Read the clock, and signals: the latest that any process has. -> whether `failed` is true on any of them."""
        self.running, self.now, anywhere, signal = self.context.world.all_reduce_max(
            self.context.clock.running(), time.time(), failed, self.context.signals.received)
        self.signal = int(signal)
        return bool(anywhere)

    def factor(self, step: int) -> float:
        """What the learning rate of optimizer step `step` (0-based) is multiplied by."""
        return self.schedule.factor(step, self.running, self.now)

    def done(self, step: int) -> bool:
        return self.schedule.done(step, self.running, self.now)

    def progress(self, step: int) -> float:
        """The fraction of the training that is over."""
        return self.schedule.progress(step, self.running, self.now)

    def phase_over(self, step: int, phase: int) -> bool:
        """Whether a phase has had its fraction of the training; the last one goes on to the end."""
        return phase + 1 < len(self.ends) and self.progress(step) >= self.ends[phase] - 1e-9

    def resume(self, step: int) -> Revision | None:
        """After the schedule of a checkpoint was taken over, when training is about to go on."""
        return self.schedule.resume(step, self.running, self.now)

    def revise(self, step: int, phase: int) -> Revision | None:
        """With a budget: what the measured speed makes of the planned number of steps."""
        rate, reserve = self.context.world.all_reduce_max(self.seconds_per_step(step, phase), sum(self.timer.costs.values()))
        return self.schedule.revise(step, self.running, rate, reserve, self.now)

    def seconds_per_step(self, step: int, phase: int) -> float:
        """On average from here to the end; 0: not known yet."""
        if not self.timer.times:
            return 0.0
        return mean_rate(self.timer.rate, self.progress(step), phase, self.fractions, self.costs)

    def finish(self, step: int, phase: int) -> str:
        """The date of the end, for people."""
        if self.schedule.max_steps:
            return show_date((self.schedule.total - step) * self.seconds_per_step(step, phase))
        return show_date(self.schedule.left(self.running, self.now))


def mean_rate(rate: float, progress: float, phase: int, fractions: list[float], costs: list[float]) -> float:
    """Seconds per step on average from here to the end: `rate` in this phase, in later ones in proportion to the cost of a
    picture. fractions: of the time, per phase."""
    ends = list(accumulate(fractions))
    times = [ends[i] - max(progress, ends[i] - fractions[i]) for i in range(phase, len(fractions))]
    steps = sum(max(spent, 0.0) / (rate * costs[i] / costs[phase]) for i, spent in enumerate(times, phase))
    return sum(max(spent, 0.0) for spent in times) / steps if steps else rate
