import math

import pytest
from helpers import thinned
import torch

from tinyldm.diffusion.grids import SCHEDULES, Levels, curve, find_schedule, grid
from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.diffusion.process import CLEAN, PROCESSES, Discrete, Level, make_process
from tinyldm.diffusion.samplers import SAMPLERS, final

SD = make_process("scaled_linear")
DISCRETE = [name for name in PROCESSES if isinstance(make_process(name), Discrete)]
BY_NOISE = ["karras", "exponential", "log_snr", "beta"]


def times(*args, **options):
    return [level.t for level in grid(*args, **options)]


def fits(name, schedule):
    on_flows, on_tables = {"flow_match", "flow_sigmas"}, {"leading", "skipping", "linspace", "linspace_unrounded"}
    return schedule not in (on_flows if not name.endswith("flow") else set()) | (on_tables if name not in DISCRETE else set())


PAIRS = [(name, schedule) for name in PROCESSES for schedule in SCHEDULES if fits(name, schedule)]


@pytest.mark.parametrize("name, schedule", thinned(2, PAIRS))
def test_every_grid_is_python_floats_falling_in_noise_to_clean_data(name, schedule):
    for steps in (1, 2, 7, 50):
        levels = grid(make_process(name), steps, schedule)
        assert len(levels) == steps + 1 and levels[-1] == CLEAN
        assert all(type(value) is float for level in levels for value in level)
        ratios = [math.inf if level.alpha == 0 else level.sigma / level.alpha for level in levels]
        assert all(now > nxt for now, nxt in zip(ratios, ratios[1:]))


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("schedule", ["trailing", "leading", "linspace"])
def test_whole_times_carry_the_table_of_training(name, schedule):
    process = make_process(name)
    for level in grid(process, 13, schedule)[:-1]:
        trained = process(torch.tensor([(level.t + 0.5) / 1000], dtype=torch.float64))
        assert level == Level(*(value.item() for value in trained))


def test_spacings_are_those_of_the_literature():
    assert times(SD, 4, "trailing") == [999, 749, 499, 249, 0]
    assert times(SD, 4, "leading") == [750, 500, 250, 0, 0]
    assert times(SD, 4, "leading", offset=1) == [751, 501, 251, 1, 0]
    assert times(SD, 4, "linspace") == [999, 666, 333, 0, 0]
    assert times(SD, 3, "linspace_unrounded") == [999, 499.5, 0, 0]
    assert times(SD, 4, "linspace", drop_last=True) == [999, 749, 500, 250, 0]
    assert times(SD, 4) == times(SD, 4, "normal") == times(SD, 4, "trailing")


def test_one_step_starts_from_the_noisiest_level():
    for schedule in ("normal", "linspace", "linspace_unrounded", "karras"):
        assert times(SD, 1, schedule) == pytest.approx([999, 0])
    assert times(make_process("flow"), 1) == [1000, 0]


def test_flow_grids_are_uniform_in_unshifted_time():
    assert times(make_process("flow"), 4) == [1000, 750, 500, 250, 0]
    shifted = [3000 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    assert times(make_process("flow", shift=3.0), 4) == pytest.approx(shifted)


def test_set_alpha_to_one_false_ends_at_the_first_entry():
    last = grid(SD, 10, set_alpha_to_one=False)[-1]
    assert last == Level(0.0, SD.alpha[0].item(), SD.sigma[0].item())


def test_karras_is_even_in_the_seventh_root_and_ends_on_the_table():
    levels = grid(SD, 9, "karras")[:-1]
    roots = [(level.sigma / level.alpha) ** (1 / 7) for level in levels]
    steps = [a - b for a, b in zip(roots, roots[1:])]
    assert steps == pytest.approx([steps[0]] * 8)
    assert (levels[0].alpha, levels[-1].alpha) == pytest.approx((SD.alpha[-1].item(), SD.alpha[0].item()))
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1) for level in levels)


def test_karras_time_is_where_the_table_has_that_noise():
    for level in grid(SD, 9, "karras")[:-1]:
        low = min(int(level.t), 998)
        logs = (SD.sigma / SD.alpha).log()[low : low + 2].tolist()
        between = logs[0] + (level.t - low) * (logs[1] - logs[0])
        assert between == pytest.approx(math.log(level.sigma / level.alpha), abs=1e-9)


def test_karras_ends_and_exponent_can_be_chosen():
    levels = grid(make_process("cosine"), 5, "karras", sigma_min=0.1, sigma_max=80.0, rho=3.0)[:-1]
    ratios = [level.sigma / level.alpha for level in levels]
    assert (ratios[0], ratios[-1]) == pytest.approx((80, 0.1))
    assert ratios[2] == pytest.approx(((80 ** (1 / 3) + 0.1 ** (1 / 3)) / 2) ** 3)


def test_karras_takes_the_ends_of_another_schedule_and_rounds_its_times_if_asked():
    spaced = grid(SD, 7, "leading", offset=1)
    levels = grid(SD, 7, "karras", ends="leading", offset=1)
    for level, end in ((levels[0], spaced[0]), (levels[-2], spaced[-2])):
        assert level == pytest.approx(end)
    exact = grid(SD, 7, "karras")
    assert grid(SD, 7, "karras", rounded=True) == [level._replace(t=round(level.t)) for level in exact]


def test_flow_sigmas_tell_the_network_whole_times_and_start_beside_or_at_pure_noise():
    flow = make_process("flow")
    levels = grid(flow, 4, "flow_sigmas")
    assert [level.sigma for level in levels] == pytest.approx([0.999, 0.74925, 0.4995, 0.24975, 0])
    assert [level.t for level in levels] == [999, 749, 499, 249, 0]
    levels = grid(flow, 4, "flow_sigmas", from_noise=True)
    assert [level.sigma for level in levels] == pytest.approx([1, 0.75025, 0.5005, 0.25075, 0])
    assert [level.t for level in levels] == [999, 750, 500, 250, 0]


def test_an_alpha_floor_stands_for_zero_and_touches_nothing_else():
    for process in (make_process("scaled_linear", zero_snr=True), make_process("flow")):
        plain, lifted = grid(process, 6), grid(process, 6, alpha_floor=2**-12)
        assert plain[0].alpha == 0 and lifted[0].alpha == 2**-12 and lifted[1:] == plain[1:]
    zero = make_process("scaled_linear", zero_snr=True)
    with pytest.raises(ValueError, match="pass sigma_max"):
        grid(zero, 6, "karras")
    assert grid(zero, 6, "karras", alpha_floor=2**-12)[0].alpha == pytest.approx(2**-12)


def test_strength_keeps_the_end_of_the_grid():
    whole = grid(SD, 20)
    assert grid(SD, 20, strength=0.6) == whole[-13:]
    assert grid(SD, 20, strength=1.0) == whole
    assert len(grid(SD, 50, strength=0.58)) == 30  # 50 * 0.58 is a hair below 29
    for strength in (0.04, 0.0, 1.2):
        with pytest.raises(ValueError, match="use 0.05 to 1"):
            grid(SD, 20, strength=strength)


def test_what_does_not_fit_is_refused_with_what_does():
    flow = make_process("flow")
    with pytest.raises(ValueError, match="did you mean 'karras'"):
        grid(SD, 10, "keras")
    with pytest.raises(ValueError, match="unknown karras option 'roh': did you mean 'rho'"):
        grid(SD, 10, "karras", roh=3)
    with pytest.raises(ValueError, match="unknown trailing option 'offset'"):
        grid(SD, 10, "trailing", offset=1)
    for schedule in ("leading", "linspace", "linspace_unrounded"):
        with pytest.raises(ValueError, match="needs a discrete table: use 'normal'"):
            grid(flow, 10, schedule)
    for schedule in ("flow_match", "flow_sigmas"):
        with pytest.raises(ValueError, match="for process 'flow'"):
            grid(SD, 10, schedule)
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match="use 1 to 1000"):
            grid(SD, steps)
    assert len(grid(flow, 2000)) == 2001


def test_every_step_count_of_the_table_has_a_grid():
    for schedule in ("trailing", "leading", "linspace", "linspace_unrounded"):
        for steps in [*range(1, 1000, 77), 999, 1000]:
            found = times(SD, steps, schedule)
            assert len(found) == steps + 1 and 0 <= min(found) and max(found) <= 999


@pytest.mark.parametrize("schedule, steps, options, most", [
    ("leading", 999, dict(offset=1, drop_last=True), 998), ("leading", 1000, dict(offset=1), 999), ("leading", 1000, dict(offset=3), 997),
    ("karras", 5, dict(sigma_min=2.0, sigma_max=2.0), 1)])
def test_steps_between_equal_levels_are_refused_with_the_largest_number_that_works(schedule, steps, options, most):
    with pytest.raises(ValueError, match=f"^{steps} sampling steps with schedule '{schedule}' .*twice: use {most} or fewer$"):
        grid(SD, steps, schedule, **options)
    found = ratios(grid(SD, most, schedule, **options))
    assert len(found) == most + 1 and all(a > b for a, b in zip(found, found[1:]))


@pytest.mark.parametrize("sampler", thinned(6, SAMPLERS.values()))
def test_the_largest_numbers_of_steps_are_taken_by_every_sampler(sampler):
    denoise = lambda x, level: x * level.alpha / (level.alpha**2 + level.sigma**2)              # exact for data of unit variance
    for steps, options in ((998, dict(schedule="leading", offset=1, drop_last=True)), (1000, dict(schedule="leading")),
                           (1000, dict(schedule="trailing"))):
        levels, generators = grid(SD, steps, **options), make_generators([0])
        assert 0.1 < final(sampler(denoise, initial_noise((1, 8, 8), generators), levels, generators=generators)).std() < 10


def ratios(levels):
    return [level.sigma / level.alpha for level in levels]


@pytest.mark.parametrize("name", PROCESSES)
def test_exponential_is_even_in_log_snr_and_has_that_name_too(name):
    levels = grid(make_process(name), 9, "exponential", sigma_min=0.05, sigma_max=20.0)
    logs = [math.log(ratio) for ratio in ratios(levels[:-1])]
    assert logs == pytest.approx([math.log(20) + i / 8 * math.log(0.05 / 20) for i in range(9)], abs=1e-9)
    assert levels == grid(make_process(name), 9, "log_snr", sigma_min=0.05, sigma_max=20.0)


def test_beta_puts_as_many_steps_below_as_above_the_middle_and_more_at_the_ends():
    from scipy.stats import beta

    found = ratios(grid(SD, 9, "beta")[:-1])
    parts = [(ratio - found[-1]) / (found[0] - found[-1]) for ratio in found]
    assert parts == pytest.approx([beta.ppf(1 - i / 8, 0.6, 0.6) for i in range(9)])
    assert parts == pytest.approx([1 - part for part in reversed(parts)]) and parts[0] - parts[1] < parts[3] - parts[4]
    even = ratios(grid(SD, 9, "beta", shape=1.0)[:-1])
    assert [a - b for a, b in zip(even, even[1:])] == pytest.approx([(even[0] - even[-1]) / 8] * 8)


@pytest.mark.parametrize("name", ["vp", "ve", "edm", "flow"])
@pytest.mark.parametrize("schedule", BY_NOISE)
def test_levels_by_noise_lie_on_a_continuous_curve(schedule, name):
    """alpha and sigma are those of the process at the level's t, not those of a formula for tables."""
    process = make_process(name, **({"shift": 3.0} if name == "flow" else {}))
    unshifted = make_process(name)
    levels = grid(process, 7, schedule)
    for level in levels[:-1]:
        wanted = unshifted(torch.tensor([level.t / 1000], dtype=torch.float64))
        assert level == pytest.approx([value.item() for value in wanted], rel=1e-9)
    noisiest = process(torch.tensor([0.999 if name == "flow" else 1.0], dtype=torch.float64))
    assert ratios(levels)[0] == pytest.approx((noisiest.sigma / noisiest.alpha).item(), rel=1e-6)


def test_the_ends_of_a_continuous_curve_are_its_own_or_a_thousandth_short_of_them():
    edm = grid(make_process("edm"), 18, "karras")
    assert (edm[0].sigma, edm[-2].sigma) == pytest.approx((80, 0.002))
    flow = grid(make_process("flow"), 5, "log_snr")
    assert (flow[0].sigma, flow[-2].sigma) == pytest.approx((0.999, 0.001))


@pytest.mark.parametrize("name", PROCESSES)
def test_the_curve_by_noise_undoes_the_process(name):
    process = make_process(name)
    at = curve(process)
    for t in (0.05, 0.5, 0.9):
        level = Level(*(value.item() for value in process(torch.tensor([t], dtype=torch.float64))))
        assert at(level.sigma / level.alpha) == pytest.approx(level, rel=1e-6)


def test_levels_keep_their_curve_when_sliced():
    levels = grid(SD, 10, strength=0.5)
    assert isinstance(levels[2:], Levels) and levels[2:].curve is levels.curve and isinstance(levels[2], Level)
    middle = levels.curve(0.5)
    assert middle.sigma / middle.alpha == pytest.approx(0.5) and levels[0].t > middle.t > 0


def test_a_list_of_times_is_a_schedule_as_numbers_or_as_typed():
    levels = grid(SD, 50, "999,800,500,200,50")
    assert [level.t for level in levels] == [999, 800, 500, 200, 50, 0] and levels[-1] == CLEAN
    assert levels == grid(SD, 1, [999, 800, 500, 200, 50]) == grid(SD, 5, " 999, 800,500 ,200,50")
    assert levels[1] == Level(800.0, SD.alpha[800].item(), SD.sigma[800].item())
    assert grid(SD, 5, [999, 800, 500, 200, 50], strength=0.4) == levels[-3:]
    assert len(grid(SD, 5, "999.5,3".replace("999.5", "998.5"))) == 3


def test_times_on_a_continuous_curve_are_thousandths_before_the_shift():
    flow = make_process("flow", shift=3.0)
    assert times(flow, 50, "1000,750,500,250") == pytest.approx(times(flow, 4))
    assert grid(make_process("ve"), 1, [500])[0].sigma == pytest.approx((0.01 * 50) ** 0.5)


def test_lists_that_do_not_fall_or_lie_outside_are_refused():
    for wrong in ("1000,500", "500,800", "500,500", [999, -1], []):
        with pytest.raises(ValueError, match="give falling times, 999 at most and 0 at least"):
            grid(SD, 5, wrong)
    with pytest.raises(ValueError, match="1000 at most and 0.001 at least"):
        grid(make_process("flow"), 5, [500, 0])
    with pytest.raises(ValueError, match="is not a list of times: write them as 999,800"):
        grid(SD, 5, "999,80o")
    with pytest.raises(ValueError, match="did you mean 'log_snr'"):
        find_schedule("logsnr")
    with pytest.raises(ValueError, match="cannot fall from 0.1 to 0.5: pass sigma_max"):
        grid(SD, 5, "exponential", sigma_min=0.5, sigma_max=0.1)


@pytest.mark.slow
def test_scipy_is_loaded_for_beta_alone():
    import subprocess
    import sys

    code = ("import sys; from tinyldm.diffusion.grids import grid; from tinyldm.diffusion.process import make_process as m; "
            "grid(m('flow'), 3, 'karras'); assert 'scipy' not in sys.modules; "
             "grid(m('flow'), 3, 'beta'); assert 'scipy.stats' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
