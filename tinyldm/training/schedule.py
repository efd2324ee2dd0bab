"""The learning-rate schedule, over a number of steps or over a budget of running time.

Warm-up, constant, linear decay to 0. With max_steps all of it is counted in steps and nothing depends on the clock.

With a budget the decay is counted in time: it begins when its fraction of the running time is all that is left, and its
factor is the time left over the decay's time. A number of steps, fixed when the decay begins, would be exposed for 20
to 40 % of the run to any change of speed (10 % slower by then: 2 to 4 % late, or cut off before the rate is low);
time left reaches 0 when the time does, whatever the speed, and no rate has to be measured for that. The price: the
factor of a step is only known once it begins, so processes that train together must use the same `running` and `now`
(Timing.synchronise). The number of steps is a plan for people, made from the measured rate until the decay begins.

There are no clocks here: times are passed in, in seconds. `running` is the time the run's processes have been alive,
all of them added up; `now` is time.time(), which only a deadline needs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tinyldm.config import OptimisationConfig
from tinyldm.durations import parse_date, parse_duration, show_duration

SHORTEST = 0.01             # fraction of the running time that a decay takes at least, in overtime if necessary
OLD_NAMES = {"fraction": "share"}       # attribute -> its older name, which state.json of all checkpoints uses
OVERTIME = "out of time: {:.0f} s more, to bring the learning rate down"


class Revision(NamedTuple):
    """A change of the planned number of steps, for the log."""

    old: int                # 0: there was no plan
    new: int
    why: str


class LearningRateSchedule:
    """The factor that multiplies the learning rate, and the end of the run.

    warmup: steps. decay: fraction of the steps (of the running time, with a budget) over which the factor falls to 0.
    Either max_steps, or a budget (seconds of running time; downtime is free) or a deadline (time.time() of the end;
    downtime counts) or both of these, whichever comes first.

    `total` is the planned number of steps. With a budget it is 0 before the first measurement, then information:
    the run ends when done() says so, which a drift of the speed during the decay moves away from the plan.
    """

    def __init__(self, *, warmup: int, decay: float, max_steps: int = 0, budget: float = 0.0, deadline: float = 0.0):
        if bool(max_steps) == bool(budget or deadline):
            raise ValueError("a run ends by --max-steps or by time (--budget, --deadline): give one of the two")
        for name, value in dict(warmup=warmup, max_steps=max_steps, budget=budget, deadline=deadline).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} {value} must be 0 or more")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay {decay} must lie between 0 and 1")
        self.warmup, self.decay, self.max_steps = warmup, decay, max_steps
        self.budget, self.deadline = float(budget), float(deadline)
        self.total = max_steps
        self.planned_decay = 0                  # with a budget: first step of the decay, as planned
        # The next four are values at the last checkpoint:
        self.running = 0.0                      # running time
        self.rate = 0.0                         # seconds per step; 0: not measured
        self.reserve = 0.0                      # seconds of the budget that are not for training
        self.fraction = 1.0                     # the decay's part of the factor; 1: the decay has not begun
        self.overtime = 0.0                     # seconds added to the end, see SHORTEST
        self.anchor: list[float] | None = None  # [fraction, seconds left] at a moment from which the decay continues linearly to 0
        self.begun = 0.0                        # running time before the first step

    def factor(self, step: int, running: float = 0.0, now: float = 0.0) -> float:
        """The learning rate's factor, 0 to 1, for the optimizer step `step` (0-based) that begins at these times."""
        rising = (step + 1) / max(self.warmup, 1)
        if self.max_steps:
            return min(1.0, rising, (self.total - step) / max(self.decay * self.total, 1))
        return min(rising, self._decay_factor(running, now))

    def done(self, step: int, running: float = 0.0, now: float = 0.0) -> bool:
        """After `step` steps: is this the end? With a budget: is less than half a step left?"""
        if self.max_steps:
            return step >= self.total
        return self.left(running, now) <= self.rate / 2

    def progress(self, step: int, running: float = 0.0, now: float = 0.0) -> float:
        """The fraction of the training that is over, 0 to 1: of its steps, or of its time. Encoding and other work before the
        first step does not count."""
        if self.max_steps:
            return step / self.total
        past, left = running - self.begun, max(self.left(running, now), 0.0)
        return past / max(past + left, 1e-9)

    def left(self, running: float, now: float = 0.0) -> float:
        """Seconds left for training (negative: late)."""
        if self.deadline and not now:
            raise ValueError("a deadline cannot be kept without the time: pass now=time.time()")
        ends = [end for given, end in ((self.budget, self.budget - running), (self.deadline, self.deadline - now)) if given]
        return min(ends, default=math.inf) - self.reserve + self.overtime

    @property
    def decay_from(self) -> int:
        """First step of the decay. With a budget this is the planned step, or 0 while there is no plan."""
        if self.max_steps:
            return self.total - math.ceil(max(self.decay * self.total, 1)) + 1
        return self.planned_decay

    def revise(self, step: int, running: float, rate: float, reserve: float = 0.0, now: float = 0.0) -> Revision | None:
        """At a checkpoint, after `step` steps, before its state() is taken. -> what has changed in the plan, if anything.

        rate: seconds per step, a median of recent ones without evaluations and checkpoints (0: not measured).
        reserve: seconds of the budget that training cannot have: evaluations, checkpoints, encoding still to come.
        The plan of steps stands once the decay has begun, except that a first one is made even then. A change of
        the reserve never makes the learning rate jump: the decay goes on from where it is, faster or slower.
        """
        self.running = max(self.running, running)
        if self.max_steps:
            return None
        fraction = self._decay_factor(running, now)
        late = 0.0
        if reserve != self.reserve:
            self.reserve = reserve
            late = self._continue_decay(fraction, running, now)
        self.fraction = fraction
        before, self.rate = self.rate, rate if 0 < rate < math.inf else self.rate
        if self.total and fraction < 1:
            return None
        speed = f"{self.rate:.3g} s per step"
        return self._plan(step, running, now, OVERTIME.format(late) if late else f"{speed}, measured" if not self.total else
                          f"{speed}, was {before:.3g}" if before != self.rate else "time spent otherwise than planned")

    def resume(self, step: int, running: float, now: float = 0.0) -> Revision | None:
        """Once after from_state, when training is about to go on at `step`: time may have passed since the checkpoint.

        running: the checkpoint's running time, plus the time that the killed process ran after it (where that is known) and that
        this process took to start. Where no time was lost the plan of the checkpoint stands.
        The learning rate continues from its value at the checkpoint, not from the value that the clock would give. Where too
        little time is left for the decay (SHORTEST), the run takes that much overtime.
        """
        lost, self.running = running - self.running, max(self.running, running)
        if self.max_steps or lost <= 0 and not self.deadline:                  # a deadline comes nearer meanwhile
            return None
        late = self._continue_decay(self.fraction, running, now)
        why = OVERTIME.format(late) if late else "time lost since the checkpoint"
        return self._plan(step, running, now, why) if self.total else None

    def state(self) -> dict[str, Any]:
        """All attributes, for JSON. With max_steps only `running` depends on the clock."""
        return {OLD_NAMES.get(name, name): value for name, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LearningRateSchedule:
        """The schedule of a checkpoint: its plan, not that of today's flags."""
        schedule = cls(**{name: state[name] for name in ("warmup", "decay", "max_steps", "budget", "deadline")})
        names = {old: name for name, old in OLD_NAMES.items()}
        vars(schedule).update({names.get(name, name): value for name, value in state.items()})
        return schedule

    def _decay_factor(self, running: float, now: float) -> float:
        """The decay's part of the factor: 1 before it begins, then in proportion to the time left."""
        left = self.left(running, now)
        fraction, seconds = self.anchor or (1.0, self._decay_seconds(running, left))
        return fraction * min(1.0, max(left, 0.0) / max(seconds, 1e-9))

    def _decay_seconds(self, running: float, left: float) -> float:
        return self.decay * (running + left)

    def _continue_decay(self, fraction: float, running: float, now: float) -> float:
        """If the decay has begun or should have: let it continue linearly from this fraction of the learning rate to 0 in the time
        left. -> the seconds that this takes if there had to be overtime for it, else 0."""
        left = self.left(running, now)
        if fraction == 1 and left >= self._decay_seconds(running, left):
            return 0.0
        needed = fraction * min(SHORTEST, self.decay) * running
        self.overtime += max(needed - left, 0.0)
        self.anchor = [fraction, max(needed, left)]
        return needed if needed > left else 0.0

    def _plan(self, step: int, running: float, now: float, why: str) -> Revision | None:
        if not self.rate:
            return None
        old, left = self.total, max(self.left(running, now), 0.0)
        self.total = step + round(left / self.rate)
        if self.fraction == 1 or not old:
            self.planned_decay = step + max(round((left - self._decay_seconds(running, left)) / self.rate), 0)
        return Revision(old, self.total, why) if self.total != old else None


def make_schedule(settings: OptimisationConfig, saved: dict[str, Any] | None, running: float, now: float) -> LearningRateSchedule:
    """The schedule of a new or a resumed run. saved: the schedule in the checkpoint, which is kept unless the flags now name
    another end; None for a new run, and for one that ends after --max-steps. ValueError where no time is left."""
    asked = LearningRateSchedule(
        warmup=settings.warmup_steps, decay=settings.decay, max_steps=settings.max_steps,
        budget=parse_duration(settings.budget) if settings.budget else 0.0,
        deadline=parse_date(settings.deadline) if settings.deadline else 0.0)
    if asked.max_steps:
        return asked
    plan = LearningRateSchedule.from_state(saved) if saved else None
    if plan and (asked.budget, asked.deadline) == (plan.budget, plan.deadline):
        return plan
    asked.begun, asked.running = (plan.begun, plan.running) if plan else (running, running)
    left = asked.left(running, now)
    if plan and left < asked.decay * (running + left):         # by the new end the decay has begun: continue from its old value
        asked.fraction = plan.fraction
    if left <= 0:
        raise ValueError(f"no time is left for training, the run has been running for {show_duration(running)}: nothing is lost, "
                         "continue with --resume yes and a larger --budget or a later --deadline, or with --max-steps")
    return asked
