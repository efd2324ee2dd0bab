"""The time that all processes agree on: ends, phases, seconds per step."""

import time
from types import SimpleNamespace

import pytest

from tinyldm.config import OptimisationConfig
from tinyldm.training.context import RunContext
from tinyldm.training.distributed import World
from tinyldm.training.schedule import LearningRateSchedule
from tinyldm.training.timing import Timing, mean_rate


class Other(World):
    """A world in which another process has these values, in the order of all_reduce_max's."""

    def __init__(self, *values):
        self.values = values

    def all_reduce_max(self, *values):
        return [float(max(pair)) for pair in zip(values, self.values)]


def timing(world, running=5.0, fractions=(1.0,), costs=(1.0,), signal=0, budget=0.0) -> Timing:
    """Of 100 steps; with a budget, of a run that began at running time 0."""
    signals = SimpleNamespace(received=signal)
    context = RunContext(None, None, world, signals, SimpleNamespace(running=lambda: running))
    settings = OptimisationConfig(warmup_steps=1, decay=0.5, max_steps=0 if budget else 100, budget=f"{budget:g}s" if budget else "")
    saved = LearningRateSchedule(warmup=1, decay=0.5, budget=budget).state() if budget else None
    return Timing(context, settings, saved, list(fractions), list(costs))


def test_all_processes_use_the_latest_clock_and_hear_of_every_signal_and_failure():
    late = time.time() + 1000
    own = timing(Other(7.0, late, False, 15))
    assert (own.running, own.now, own.signal) == (7.0, late, 15) and own.synchronise(False) is False and own.synchronise(True) is True
    own.context = own.context._replace(world=Other(3.0, 0.0, True, 0))
    assert own.synchronise() is True and own.running == 5.0 and own.signal == 0
    assert timing(World(), signal=2).signal == 2


def test_every_phase_has_its_fraction_and_the_last_one_goes_on_to_the_end():
    own = timing(World(), fractions=(0.2, 0.5, 0.3), costs=(1.0, 1.0, 1.0))
    assert [own.phase_over(step, 0) for step in (0, 19, 20, 50)] == [False, False, True, True]
    assert [own.phase_over(step, 1) for step in (69, 70)] == [False, True] and not own.phase_over(100, 2)
    assert own.progress(25) == 0.25 and own.done(100) and not own.done(99)


def test_phases_of_a_budget_are_fractions_of_its_time():
    own = timing(World(), running=60.0, fractions=(0.5, 0.5), costs=(1.0, 1.0), budget=100.0)
    assert own.phase_over(3, 0) and not own.phase_over(3, 1) and own.progress(3) == 0.6
    own.running = 40.0
    assert not own.phase_over(3, 0)


def test_later_phases_cost_what_their_pictures_cost():
    assert mean_rate(0.5, 0.0, 0, [1.0], [7.0]) == 0.5
    # half of the time at 1 s, half at 4 s a step: 0.5 + 0.125 steps in one unit of time
    assert mean_rate(1.0, 0.0, 0, [0.5, 0.5], [1.0, 4.0]) == pytest.approx(1 / 0.625)
    assert mean_rate(1.0, 0.25, 0, [0.5, 0.5], [1.0, 4.0]) == pytest.approx(0.75 / 0.375)
    assert mean_rate(4.0, 0.75, 1, [0.5, 0.5], [1.0, 4.0]) == pytest.approx(4.0)
    assert mean_rate(4.0, 1.0, 1, [0.5, 0.5], [1.0, 4.0]) == 4.0                # nothing is left
