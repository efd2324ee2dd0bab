import math

import pytest
import torch

from tinyldm.diffusion.grids import SCHEDULES, grid
from tinyldm.diffusion.process import CLEAN, PROCESSES, Level, make_process

SD = make_process("scaled_linear")
DISCRETE = [name for name in PROCESSES if name != "flow"]


def times(*args, **options):
    return [level.t for level in grid(*args, **options)]


def fits(name, schedule):
    on_flows = {"flow_match", "flow_sigmas"}
    return schedule in ({"normal", "trailing"} | on_flows if name == "flow" else set(SCHEDULES) - on_flows)


PAIRS = [(name, schedule) for name in PROCESSES for schedule in SCHEDULES if fits(name, schedule)]


@pytest.mark.parametrize("name, schedule", PAIRS)
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


def test_karras_takes_the_ends_of_another_schedule_and_rounds_its_times_when_told():
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
    for schedule in ("leading", "linspace", "linspace_unrounded", "karras"):
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
