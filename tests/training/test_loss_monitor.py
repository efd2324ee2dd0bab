"""Loss spikes: what is one, what is none, and when a loss is lost."""

import json
import math

import numpy as np
import pytest

from tinyldm.training.loss_monitor import RECENT, LossMonitor


def losses(steps: int, noise: float, seed: int = 0, batch: int = 0) -> np.ndarray:
    """A loss that falls fast, then slowly, with lognormal noise (or that of a batch of exponential losses)."""
    rng, step = np.random.default_rng(seed), np.arange(steps)
    curve = 0.3 + 0.2 * (step + 1) ** -0.3 + 0.6 * np.exp(-step / 60)
    return curve * (rng.gamma(batch, 1 / batch, steps) if batch else np.exp(noise * rng.normal(size=steps)))


def watch(values, course: LossMonitor | None = None) -> tuple[list[tuple[int, str]], list[int]]:
    """-> (what was said, at which steps; the steps after which the loss was lost)."""
    course, said, lost = course or LossMonitor(), [], []
    for step, value in enumerate(values):
        if line := course.observe(step, float(value)):
            said.append((step, line))
        if course.diverged:
            lost.append(step)
    return said, lost


@pytest.mark.parametrize(("noise", "batch"), [(0.02, 0), (0.1, 0), (0.3, 0), (0, 64), (0, 4), (0, 1)])
def test_healthy_losses_raise_no_alarm(noise, batch):
    assert watch(losses(30_000, noise, batch=batch)) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "batch"), [(0.02, 0), (0.1, 0), (0.3, 0), (0, 64), (0, 4), (0, 1)])
def test_a_million_healthy_steps_are_never_lost(noise, batch):
    said, lost = watch(losses(1_000_000, noise, seed=1, batch=batch))
    assert lost == [] and len(said) <= 5


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("begin", [400, 2000])
def test_a_loss_that_doubles_and_stays_is_lost_within_30_steps(noise, begin):
    for seed in range(10):
        values = losses(begin + 31, noise, seed)
        values[begin:] *= 2
        _, lost = watch(values)
        assert lost and begin + 10 <= lost[0] < begin + 30


def test_a_loss_that_climbs_to_twice_its_size_within_100_steps_is_lost():
    values = losses(1600, 0.05)
    values[1500:] *= 2 ** np.linspace(0, 1, 100)
    assert watch(values)[1]


@pytest.mark.parametrize("length", [1, 5, 14])
def test_a_spike_that_passes_is_told_once_and_is_not_lost(length):
    values = losses(3000, 0.05)
    values[1500:1500 + length] *= 4
    values[2000] *= 4
    said, lost = watch(values)
    assert [step for step, _ in said] == [1500, 2000] and lost == []


def test_a_spike_is_quiet_until_the_loss_has_been_back_for_a_while():
    values = losses(3000, 0.01)
    for step in (1500, 1500 + RECENT - 2, 1500 + 2 * (RECENT - 2)):       # one spike that comes back, then another
        values[step] *= 4
    values[1600] *= 4
    assert [step for step, _ in watch(values)[0]] == [1500, 1600]


def test_a_spike_goes_on_while_the_loss_is_now_and_then_well_above_its_course():
    values = 0.5 * np.exp(0.05 * (-1.0) ** np.arange(3000))
    values[[1500, 1550]] *= 4
    assert [step for step, _ in watch(values)[0]] == [1500, 1550]
    values[[1515, 1530, 1545]] = 0.5 * math.exp(4.5 * 0.05 * 2**0.5)        # standard deviations: not enough for one to begin
    assert [step for step, _ in watch(values)[0]] == [1500]


def test_a_small_rise_that_lasts_is_neither_a_spike_nor_lost():
    values = losses(3000, 0.03)
    values[1500:] *= 1.15
    assert watch(values)[1] == []


def test_losses_almost_without_noise_are_not_held_against_it():
    values = losses(3000, 0.001)
    values[1500] *= 1.05
    assert watch(values) == ([], [])


def test_a_spike_says_how_large_it_is():
    values = losses(1000, 0.05) * 0 + 0.5 * np.exp(0.05 * np.random.default_rng(0).normal(size=1000))
    values[900] = 0.5 * math.exp(0.05 * 20)
    (step, said), = watch(values)[0]
    assert step == 900 and said.startswith("loss 1.36 at step 900 is ") and said.endswith(" standard deviations above its trend of 0.499")
    assert 18 <= int(said.split(" is ")[1].split()[0]) <= 22


def test_spikes_do_not_widen_the_course():
    calm, rough = LossMonitor(), LossMonitor()
    values = losses(3000, 0.05)
    watch(values, calm)
    values[1000:3000:200] *= 1000
    watch(values, rough)
    assert rough.variance < 1.2 * calm.variance and rough.mean == pytest.approx(calm.mean, abs=0.01)


def test_a_fall_is_no_alarm_and_nothing_is_said_of_the_first_steps():
    values = losses(3000, 0.05)
    values[1500:] *= 0.2
    assert watch(values) == ([], [])
    young = losses(100, 0.05) * 0 + 5.0
    young[50] = 20.0
    young[80:] = 10.0
    assert watch(young) == ([], [])


def test_a_loss_that_stays_up_becomes_the_new_course():
    values = losses(24_000, 0.05)
    values[20_000:] *= 2
    said, lost = watch(values)
    assert len(said) == 1 and lost[-1] < 22_500


def test_losses_of_nothing_and_below_do_no_harm():
    said, lost = watch([*losses(500, 0.05), 0.0, -1.0, *losses(500, 0.05)[300:]])
    assert said == [] and lost == []


@pytest.mark.parametrize("cut", [3, 60, 119, 1003, 1015])
def test_a_resumed_course_says_the_same_exactly(cut):
    values = losses(1300, 0.05)
    values[1000:1004] *= 4
    values[1200:] *= 2
    whole, first, second = LossMonitor(), LossMonitor(), LossMonitor()
    said, lost = watch(values, whole)
    before = watch(values[:cut], first)
    state = first.state()
    first.observe(cut, 100.0)                                                   # which is no business of the state
    second.load(json.loads(json.dumps(state)))
    lines, later = [], []
    for step in range(cut, len(values)):
        if line := second.observe(step, float(values[step])):
            lines.append((step, line))
        if second.diverged:
            later.append(step)
    assert (before[0] + lines, before[1] + later) == (said, lost) and second.state() == whole.state()
    assert len(said) == 2 and lost
