"""The learning rate's schedule: over steps a formula; over a budget it reaches its end when the time does, come what may."""

import json
import math
import random

import pytest

from tinyldm.config import parse
from tinyldm.durations import parse_date
from tinyldm.training.schedule import SHORTEST, LearningRateSchedule, make_schedule


def through_json(schedule: LearningRateSchedule) -> LearningRateSchedule:
    return LearningRateSchedule.from_state(json.loads(json.dumps(schedule.state())))


BEGUN = 1e9               # time.time() when a simulated run begins


class Run:
    """A simulated run: step times from pace(running), checkpoints, pauses, kills; `path` is what the surviving
    weights saw, (factor, running) per step."""

    def __init__(self, schedule, pace, *, every=100, pause=0.0, tail=0.0, start=0.0, kills=(), downtime=0.0, noise=0.0):
        self.path, self.revisions = [], []
        rng, kills, downtimes = random.Random(3), sorted(kills), BEGUN
        running, step, steps_taken = start, 0, 0
        saved = through_json(schedule)
        while not schedule.done(step, running, running + downtimes):
            if kills and running > kills[0]:                       # kill -9: back to the checkpoint; the clock is not
                kills.pop(0)
                downtimes += downtime
                running += start
                schedule = through_json(saved)
                step = len(self.path) // every * every
                del self.path[step:]
                schedule.resume(step, running, running + downtimes)
                continue
            self.path.append((schedule.factor(step, running, running + downtimes), running))
            took = pace(running) * (1 + noise * rng.uniform(-1, 1))
            running, step, steps_taken = running + took, step + 1, steps_taken + 1
            assert steps_taken < 100_000
            if step % every == 0:
                rate = pace(running - took)
                remaining = max(schedule.left(running, running + downtimes) + schedule.reserve - tail, 0) if pause else 0
                reserve = tail + pause * remaining / (every * rate + pause)   # the evaluations still to come, and the last
                running += pause
                if revision := schedule.revise(step, running, rate, reserve, running + downtimes):
                    self.revisions.append((step, *revision))
                saved = through_json(schedule)
        self.schedule, self.steps, self.end = schedule, step, running + tail
        self.wall = self.end + downtimes - BEGUN

    def check(self, budget, end=None, tolerance=0.02):
        assert abs((self.end if end is None else end) - budget) < tolerance * budget
        factors = [factor for factor, _ in self.path]
        peak = factors.index(max(factors))
        assert factors[peak] == 1.0 and 0 <= factors[-1] < 0.02
        assert all(a >= b - 1e-12 for a, b in zip(factors[peak:], factors[peak + 1:]))


def budgeted(**changes) -> LearningRateSchedule:
    return LearningRateSchedule(**dict(warmup=20, decay=0.4, budget=1200.0) | changes)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("warmup, decay, total", [(50, 0.4, 850), (1500, 0.2, 20_000), (0, 0.0, 7), (3, 1.0, 10),
                                                  (9, 0.9, 10), (1, 0.1, 3), (5, 0.3, 1), (2, 0.7, 1001)])
def test_over_steps_the_factor_is_that_of_the_formula_to_the_bit(warmup, decay, total):
    schedule = LearningRateSchedule(warmup=warmup, decay=decay, max_steps=total)
    factors = [schedule.factor(step) for step in range(total)]
    assert factors == [min(1.0, (step + 1) / max(warmup, 1), (total - step) / max(decay * total, 1)) for step in range(total)]
    falling = [(total - step) / max(decay * total, 1) < 1 for step in range(total)] + [True]
    assert schedule.decay_from == falling.index(True)
    assert [schedule.done(step) for step in (0, total - 1, total)] == [False, False, True]


def test_over_steps_nothing_depends_on_the_clock():
    one, other = (LearningRateSchedule(warmup=5, decay=0.3, max_steps=100) for _ in range(2))
    for step in range(0, 100, 10):
        assert one.revise(step, running=1e6 * step, rate=50.0, reserve=1e4, now=1e9) is None
        assert one.resume(step, running=2e6 * step, now=2e9) is None
        one = through_json(one)
        assert [one.factor(s, 1e7, 1e9) for s in range(100)] == [other.factor(s) for s in range(100)]
    assert one.running == 2e6 * 90
    assert one.state() | {"running": 0.0} == other.state()


def test_steps_and_time_together_or_neither_are_refused():
    for ends in ({}, dict(max_steps=10, budget=5.0), dict(max_steps=10, deadline=5.0)):
        with pytest.raises(ValueError, match="one of the two"):
            LearningRateSchedule(warmup=1, decay=0.5, **ends)
    for wrong in (dict(decay=1.5), dict(decay=math.nan), dict(warmup=-1), dict(budget=-1.0), dict(budget=math.inf)):
        with pytest.raises(ValueError, match="must"):
            budgeted(**wrong)


# ---------------------------------------------------------------- a budget


@pytest.mark.parametrize("decay", [0.2, 0.4])
def test_at_constant_speed_time_and_steps_agree(decay):
    run = Run(budgeted(decay=decay), lambda running: 0.5)
    run.check(1200, tolerance=0.001)
    steps = LearningRateSchedule(warmup=20, decay=decay, max_steps=2400)
    assert run.steps == 2400 == run.schedule.total and run.schedule.decay_from == steps.decay_from - 1
    assert max(abs(factor - steps.factor(step)) for step, (factor, _) in enumerate(run.path)) < 1e-9
    assert run.revisions == [(100, 0, 2400, "0.5 s per step, measured")]


@pytest.mark.parametrize("decay", [0.2, 0.4])
@pytest.mark.parametrize("name, pace", [
    ("slower", lambda t: 0.5 * (1 + 0.3 * t / 1200)), ("faster", lambda t: 0.5 * (1 - 0.3 * t / 1200)),
    ("slower at the decay", lambda t: 0.65 if t > 700 else 0.5), ("faster at the decay", lambda t: 0.35 if t > 700 else 0.5),
    ("waves", lambda t: 0.5 * (1 + 0.3 * math.sin(t / 80)))])
def test_drifting_speed_ends_on_time_at_a_low_rate(name, pace, decay):
    Run(budgeted(decay=decay), pace, noise=0.3).check(1200, tolerance=0.002)


def test_thirty_kills_with_lost_steps_end_on_time():
    for seed in range(5):
        rng = random.Random(seed)
        run = Run(budgeted(), lambda t: 0.25 * (1 + 0.2 * math.sin(t / 50)), every=40, start=4.0, noise=0.2,
                  kills=[rng.uniform(10, 1190) for _ in range(30)])
        run.check(1200, tolerance=0.005)


def test_a_kill_never_raises_or_drops_the_rate_of_the_surviving_weights():
    run = Run(budgeted(), lambda t: 0.25, every=100, kills=[900.1, 1000.2, 1100.3], start=20.0)
    run.check(1200)
    factors = [factor for factor, _ in run.path]
    assert max(a - b for a, b in zip(factors[20:], factors[21:])) < 0.005              # a step's share, somewhat steeper


def test_a_slow_start_costs_steps_but_no_time():
    run = Run(budgeted(), lambda t: 0.5, start=200.0)
    run.check(1200, tolerance=0.001)
    assert run.steps == 2000


@pytest.mark.parametrize("pause, tail", [(0.0, 60.0), (6.0, 30.0), (20.0, 0.0)])
def test_evaluations_are_paid_from_the_budget(pause, tail):
    run = Run(budgeted(), lambda t: 0.25, every=100, pause=pause, tail=tail)
    run.check(1200)
    assert run.steps == pytest.approx((1200 - tail) / (25 + pause) * 100, rel=0.03)


def test_all_of_it_at_once():
    rng = random.Random(9)
    run = Run(budgeted(warmup=50), lambda t: 0.2 * (1 + 0.3 * math.sin(t / 200)), every=50, pause=3.0, tail=25.0,
              start=8.0, noise=0.3, kills=[rng.uniform(10, 1150) for _ in range(12)])
    run.check(1200)


def test_a_changed_reserve_does_not_make_the_rate_jump():
    schedule = budgeted()
    schedule.revise(1000, 500.0, 0.5)
    before = schedule.factor(1800, 900.0)
    assert before == pytest.approx(300 / 480)
    assert schedule.revise(1800, 900.0, 0.5, reserve=100.0) is None
    assert schedule.factor(1800, 900.0) == before and schedule.factor(2000, 1000.0) == pytest.approx(before / 2)
    assert schedule.factor(2200, 1100.0) == 0 and schedule.done(2200, 1100.0)
    schedule.revise(2000, 1000.0, 0.5, reserve=0.0)                                     # given back: slower
    assert schedule.factor(2000, 1000.0) == pytest.approx(before / 2)
    assert schedule.factor(2200, 1100.0) == pytest.approx(before / 4) and not schedule.done(2200, 1100.0)


def test_time_given_back_just_after_the_decay_began_does_not_undo_it():
    schedule = budgeted()
    schedule.revise(1000, 500.0, 0.5, reserve=200.0)
    before = schedule.factor(1300, 650.0)
    assert before == pytest.approx(350 / 400)
    schedule.revise(1300, 650.0, 0.5, reserve=0.0)
    assert schedule.factor(1300, 650.0) == before and schedule.factor(1850, 925.0) == pytest.approx(before / 2)


def test_a_reserve_larger_than_what_is_left_still_brings_the_rate_down():
    schedule = budgeted()
    schedule.revise(1000, 500.0, 0.5)
    revision = schedule.revise(1200, 600.0, 0.5, reserve=900.0)
    assert revision == (2400, 1212, "out of time: 6 s more, to bring the learning rate down")
    assert schedule.factor(1200, 600.0) == 1.0 and schedule.left(600.0) == pytest.approx(SHORTEST * 600)
    assert schedule.factor(1206, 603.0) == pytest.approx(0.5) and schedule.done(1212, 606.0)


# ---------------------------------------------------------------- the plan


def test_the_plan_follows_the_measured_rate_and_stands_once_the_decay_has_begun():
    schedule = budgeted(decay=0.25)
    assert schedule.total == 0 == schedule.decay_from and schedule.factor(10_000, 100.0) == 1.0
    assert schedule.revise(0, 5.0, 0.0) is None and schedule.total == 0                  # nothing measured
    assert schedule.revise(100, 100.0, 1.0) == (0, 1200, "1 s per step, measured")
    assert schedule.decay_from == 900
    assert schedule.revise(200, 200.0, 1.0) is None
    assert schedule.revise(300, 300.0, 2.0) == (1200, 750, "2 s per step, was 1")
    assert schedule.decay_from == 600
    assert schedule.revise(400, 520.0, 2.0) == (750, 740, "time spent otherwise than planned")
    assert schedule.revise(700, 850.0, 2.0, reserve=20.2).new == 700 + 165                # 329.8 s left
    assert schedule.revise(741, 901.0, 5.0, reserve=20.2) is None and schedule.total == 865
    assert schedule.rate == 5.0


def test_a_first_measurement_within_the_decay_still_makes_a_plan():
    schedule = budgeted()
    assert schedule.factor(70, 1100.0) == pytest.approx(100 / 480)                       # the decay needs no measurement
    assert schedule.revise(70, 1100.0, 10.0).new == 80 and schedule.decay_from == 70


def test_an_unmeasurable_rate_changes_nothing():
    schedule = budgeted()
    schedule.revise(100, 100.0, 1.0)
    for rate in (0.0, math.nan, math.inf, -1.0):
        assert schedule.revise(100, 100.0, rate) is None and schedule.rate == 1.0


def test_a_resumed_run_keeps_its_plan_and_its_time():
    schedule = budgeted()
    schedule.revise(500, 300.0, 0.6, reserve=30.0)
    again = through_json(schedule)
    assert again.state() == schedule.state() and again.running == 300.0
    assert again.resume(500, 300.0) is None and again.state() == schedule.state()
    assert again.resume(500, 360.0) == (schedule.total, schedule.total - 100, "time lost since the checkpoint")
    assert again.resume(500, 200.0) is None and again.running == 360.0
    assert again.revise(500, 350.0, 0.6, 30.0) is not None and again.running == 360.0


def test_in_the_decay_a_resumed_run_goes_on_from_the_rate_of_its_weights():
    schedule = budgeted()
    schedule.revise(500, 300.0, 1.0)
    schedule.revise(1200, 960.0, 2.0)                                                    # halfway down, and slower by now
    again = through_json(schedule)
    assert again.resume(1200, 960.0) is None and again.total == 1400                     # nothing lost: the plan stands
    again.resume(1200, 1080.0)                                                           # half of the rest is lost
    assert again.factor(1200, 1080.0) == pytest.approx(0.5) and again.factor(1260, 1140.0) == pytest.approx(0.25)
    assert again.done(1260, 1200.0) and again.total == 1260 and again.decay_from == 920


def test_the_last_step_is_taken_where_more_than_half_of_it_fits():
    schedule = budgeted()
    assert not schedule.done(0, 1199.9)
    schedule.revise(100, 1000.0, 10.0)
    assert not schedule.done(118, 1194.9) and schedule.done(119, 1195.1)
    assert 0 < schedule.factor(118, 1194.9) < 0.02


def test_without_a_decay_the_rate_stays_up_to_the_end():
    schedule = budgeted(decay=0.0)
    assert schedule.factor(5000, 1199.0) == 1.0 and schedule.done(5000, 1200.0)


def test_warm_up_is_counted_in_steps():
    schedule = budgeted(warmup=10)
    assert [schedule.factor(step, 1.0) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]


# ---------------------------------------------------------------- a deadline


def test_whichever_of_budget_and_deadline_comes_first():
    assert budgeted(deadline=10_500.0).left(100.0, 10_000.0) == 500.0
    assert budgeted(deadline=12_000.0).left(100.0, 10_000.0) == 1100.0
    assert LearningRateSchedule(warmup=1, decay=0.5, deadline=10_500.0).left(1e6, 10_000.0) == 500.0
    with pytest.raises(ValueError, match=r"time\.time"):
        budgeted(deadline=10_500.0).factor(0, 100.0)


def test_downtime_counts_for_a_deadline_only():
    kills = [200.1, 500.2, 800.3]
    Run(budgeted(), lambda t: 0.25, kills=kills, downtime=100.0).check(1200, tolerance=0.005)
    late = Run(budgeted(budget=0.0, deadline=BEGUN + 1200), lambda t: 0.25, kills=kills, downtime=100.0)
    late.check(1200, late.wall, tolerance=0.005)
    assert late.end < 950


def test_after_a_missed_deadline_there_is_a_short_decay_and_a_word_of_it():
    schedule = budgeted(deadline=5000.0)
    schedule.revise(400, 400.0, 0.1, now=4200.0)
    again = through_json(schedule)
    revision = again.resume(400, 400.0, now=99_999.0)
    assert revision.new == 440 and "out of time: 4 s more" in revision.why
    assert again.factor(400, 400.0, 99_999.0) == 1.0
    assert again.factor(420, 402.0, 100_001.0) == pytest.approx(0.5) and again.done(440, 404.0, 100_003.0)


def test_after_a_missed_deadline_a_run_without_decay_is_over():
    schedule = budgeted(deadline=5000.0, decay=0.0)
    schedule.revise(400, 400.0, 0.1, now=4200.0)
    schedule.resume(400, 400.0, now=6000.0)
    assert schedule.done(400, 400.0, 6000.0)


# ---------------------------------------------------------------- from the settings of a run

NOW = 1.6e9


def settings(*words):
    return parse(list(words), "")[0].optimisation


def test_a_resumed_run_keeps_its_plan_unless_another_end_is_asked_for():
    plan = make_schedule(settings("--budget", "100s"), None, 10.0, NOW)
    plan.revise(20, 30.0, 1.0)
    saved = json.loads(json.dumps(plan.state()))
    assert make_schedule(settings("--budget", "100s", "--warmup-steps", "7"), saved, 50.0, NOW).state() == plan.state()
    longer = make_schedule(settings("--budget", "200s"), saved, 50.0, NOW)
    assert longer.budget == 200 and longer.begun == 10 and longer.factor(999, 50.0) == 1
    plan.fraction = saved["share"] = 0.5                          # in its decay: a little more time must not raise the rate again
    assert make_schedule(settings("--budget", "105s"), saved, 90.0, NOW).fraction == 0.5
    assert make_schedule(settings("--max-steps", "9"), saved, 50.0, NOW).done(9)


def test_a_budget_that_is_used_up_before_training_says_how_to_go_on():
    with pytest.raises(ValueError, match="running for 1 m 45 s: nothing is lost, continue with --resume yes and a larger --budget"):
        make_schedule(settings("--budget", "100s"), None, 105.0, NOW)
    with pytest.raises(ValueError, match="later --deadline"):
        make_schedule(settings("--deadline", "2001-01-01T00:00"), None, 5.0, NOW)


def test_progress_counts_training_alone():
    plan = make_schedule(settings("--budget", "100s"), None, 20.0, NOW)
    assert plan.progress(5, 20.0) == 0 and plan.progress(5, 60.0) == 0.5 and plan.progress(5, 100.0) == 1
    assert make_schedule(settings("--max-steps", "8"), None, 0.0, NOW).progress(2) == 0.25


def test_an_end_by_the_clock_reaches_the_schedule():
    timed = make_schedule(settings("--budget", "3m", "--warmup-steps", "7", "--decay", "0.3"), None, 5.0, NOW)
    assert (timed.budget, timed.deadline, timed.max_steps, timed.warmup, timed.decay) == (180, 0, 0, 7, 0.3)
    dated = make_schedule(settings("--deadline", "2999-01-31T18:00"), None, 5.0, NOW)
    assert (dated.budget, dated.deadline) == (0, parse_date("2999-01-31T18:00")) and not dated.done(10**6, 10.0, NOW)
    assert [timed.done(99, running) for running in (170.0, 181.0)] == [False, True] and timed.factor(99, 180 - 27.0) == pytest.approx(0.5)
