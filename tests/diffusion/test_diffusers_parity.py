"""Whole sampling runs against diffusers' schedulers, live, on a toy network: float32-rounding parity.

Where this library does something else on purpose, and why (each has a test at the end or a remedy here):

  DDIM steps        DDIMScheduler steps from t to t - T // n instead of to the next time of its own list. The two
                    agree for leading, and for trailing when n divides T; otherwise ours follows the list.
  Heun's coordinate HeunDiscreteScheduler works in x / alpha, which is lost near alpha = 0; ours works on the
                    straight line, which is more accurate and is FlowMatchHeun for flow. `scale=` gives theirs.
  Karras ends       Euler and Heun take them from the spaced times (so leading and trailing narrow the range),
                    DPM-Solver++ from the table. Ours: the table, or sigma_min= and sigma_max=.
  Karras times      DPM-Solver++ rounds the time that the network is told; Euler, Heun and ours do not.
                    Remedy: [level._replace(t=round(level.t)) for level in levels].
  DPM-Solver++      spreads n + 1 times and drops the last in leading and linspace; here drop_last=True.
  Flow to the end   FlowMatchEuler stops at t = 0.001 before 0 (schedule "flow_match"); "normal" is the plain i / n.
  Trailing times    numpy's arange accumulates rounding: for n = 61, 103, 121, ... theirs has an n + 1st time of -1, for
                    n = 48, 96, 112, ... it rounds a half the wrong way. Ours has n times, halves to even.
  One step          with linspace theirs is numpy's linspace(0, 999, 1) = [0], ours starts from the noisiest level.
  Strength          theirs rounds 50 * 0.58 down to 28, ours to 29.
"""

import numpy as np
import pytest

from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import denoiser
from tinyldm.diffusion.process import Level, make_process
from tinyldm.diffusion.samplers import (
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    final,
    heun,
    initial_noise,
    make_generators,
)

diffusers = pytest.importorskip("diffusers")

SD = make_process("scaled_linear")
SD_CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SEEDS = [11, 12]


def start():
    generators = make_generators(SEEDS)
    return initial_noise((4, 5, 5), generators), generators


def theirs(scheduler, net, steps, x, generators=None, **options):
    """The loop of a diffusers pipeline."""
    scheduler.set_timesteps(steps)
    takes_seeds = "generator" in scheduler.step.__code__.co_varnames
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = net(scaled, t.expand(len(x)))
        seeds = {"generator": generators} if takes_seeds and generators else {}
        x = scheduler.step(out, t, x, **seeds, **options).prev_sample
    return x


def close(ours, reference, tolerance=1e-5):
    """Relative to the size of the image: errors of float32, not of the method."""
    error = ((ours - reference).abs().max() / reference.abs().max()).item()
    assert error < tolerance, f"relative difference {error:.1e}"


@pytest.mark.parametrize("one", [True, False], ids=["alpha_to_one", "first_alpha"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing, offset, steps", [("leading", 1, 30), ("leading", 0, 20), ("trailing", 0, 20)])
def test_ddim(spacing, offset, steps, kind, one, toy_network):
    scheduler = diffusers.DDIMScheduler(
        **SD_CONFIG,
        clip_sample=False,
        set_alpha_to_one=one,
        timestep_spacing=spacing,
        steps_offset=offset,
        prediction_type=KINDS[kind],
    )
    options = {"offset": offset} if spacing == "leading" else {}
    levels = grid(SD, steps, spacing, set_alpha_to_one=one, **options)
    x, _ = start()
    close(final(ddim(denoiser(toy_network, None, kind), x, levels)), theirs(scheduler, toy_network, steps, x))


DDPM_GRIDS = [("scaled_linear", "leading"), ("linear", "trailing"), ("cosine", "linspace")]


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_noise(eta, toy_network):
    scheduler = diffusers.DDIMScheduler(**SD_CONFIG, clip_sample=False, timestep_spacing="trailing")
    x, generators = start()
    ours = final(ddim(denoiser(toy_network, None, "eps"), x, grid(SD, 20), eta=eta, generators=generators))
    x, generators = start()
    close(ours, theirs(scheduler, toy_network, 20, x, generators, eta=eta))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, spacing", DDPM_GRIDS)
def test_ddpm(name, spacing, kind, toy_network):
    ends = {"scaled_linear": (0.00085, 0.012), "linear": (1e-4, 0.02), "cosine": (1e-4, 0.02)}[name]
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2" if name == "cosine" else name,
        beta_start=ends[0],
        beta_end=ends[1],
        clip_sample=False,
        timestep_spacing=spacing,
        prediction_type=KINDS[kind],
    )
    net = toy_network
    x, generators = start()
    levels = grid(make_process(name), 20, spacing)
    ours = final(ddpm(denoiser(net, None, kind), x, levels, generators=generators))
    x, generators = start()
    close(ours, theirs(scheduler, net, 20, x, generators))


EULER_GRIDS = [("leading", False), ("trailing", False), ("linspace", False), ("linspace", True)]


def euler_start(levels, spacing):
    """Theirs starts from sigma eps in this picture, except for leading, where it starts from eps."""
    x, _ = start()
    return x if spacing == "leading" else levels[0].sigma * x


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("spacing, karras", EULER_GRIDS)
def test_euler(spacing, karras, kind, toy_network):
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD_CONFIG, timestep_spacing=spacing, use_karras_sigmas=karras, prediction_type=KINDS[kind]
    )
    levels = grid(SD, 17, "karras" if karras else "linspace_unrounded" if spacing == "linspace" else spacing)
    ours = final(euler(denoiser(toy_network, None, kind), euler_start(levels, spacing), levels))
    scheduler.set_timesteps(17)
    close(ours, theirs(scheduler, toy_network, 17, start()[0] * scheduler.init_noise_sigma))


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("spacing, karras", EULER_GRIDS)
def test_heun_in_the_coordinate_of_diffusers(spacing, karras, kind, toy_network):
    scheduler = diffusers.HeunDiscreteScheduler(
        **SD_CONFIG, timestep_spacing=spacing, use_karras_sigmas=karras, prediction_type=KINDS[kind]
    )
    levels = grid(SD, 17, "karras" if karras else "linspace_unrounded" if spacing == "linspace" else spacing)
    denoise = denoiser(toy_network, None, kind)
    ours = final(heun(denoise, euler_start(levels, spacing), levels, scale=lambda level: level.alpha))
    scheduler.set_timesteps(17)
    close(ours, theirs(scheduler, toy_network, 17, start()[0] * scheduler.init_noise_sigma))


@pytest.mark.parametrize("steps", [9, 20])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["leading", "trailing", "linspace", "karras"])
def test_dpmpp_2m(schedule, kind, steps, toy_network):
    karras = schedule == "karras"
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD_CONFIG,
        timestep_spacing="linspace" if karras else schedule,
        use_karras_sigmas=karras,
        prediction_type=KINDS[kind],
    )
    levels = grid(SD, steps, schedule, drop_last=schedule in ("leading", "linspace"))
    if karras:
        levels = [level._replace(t=round(level.t)) for level in levels]
    x, _ = start()
    close(final(dpmpp_2m(denoiser(toy_network, None, kind), x, levels)), theirs(scheduler, toy_network, steps, x))


@pytest.mark.parametrize("steps", [14, 15])  # the last of fewer than 15 is of first order
def test_dpmpp_2m_that_ends_at_the_first_entry(steps, toy_network):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD_CONFIG, timestep_spacing="trailing", final_sigmas_type="sigma_min"
    )
    x, _ = start()
    ours = final(dpmpp_2m(denoiser(toy_network, None, "eps"), x, grid(SD, steps, set_alpha_to_one=False)))
    close(ours, theirs(scheduler, toy_network, steps, x))


@pytest.mark.parametrize("steps", [1, 9, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("order", ["Euler", "Heun"])
def test_flow_match(order, shift, steps, toy_network):
    scheduler = getattr(diffusers, f"FlowMatch{order}DiscreteScheduler")(shift=shift)
    levels = grid(make_process("flow", shift=shift), steps, "flow_match")
    sampler = {"Euler": euler, "Heun": heun}[order]
    x, _ = start()
    close(final(sampler(denoiser(toy_network, None, "flow"), x, levels)), theirs(scheduler, toy_network, steps, x))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [9, 20])
def test_dpmpp_2m_on_flow_levels(steps, shift, toy_network):
    """DPM-Solver++ spreads 0.999 i / n before the shift and tells the network whole times, cut off."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    times = (1 - np.linspace(1, 0.001, steps + 1))[::-1].tolist()  # their arithmetic: the cut feels its rounding
    sigmas = [shift * t / (1 + (shift - 1) * t) for t in times]
    levels = [Level(float(int(1000 * sigma)), 1 - sigma, sigma) for sigma in sigmas]
    x, _ = start()
    close(final(dpmpp_2m(denoiser(toy_network, None, "flow"), x, levels)), theirs(scheduler, toy_network, steps, x))


def times(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_times_are_theirs_for_many_step_counts(spacing):
    offset = {"offset": 1} if spacing == "leading" else {}
    off_by_rounding = {48, 61, 96, 103, 112, 121, 122, 144, 176, 192} if spacing == "trailing" else {1}
    config = SD_CONFIG | {"timestep_spacing": spacing, "steps_offset": 1}
    for steps in set(range(1, 200)) - off_by_rounding:
        ours = [level.t for level in grid(SD, steps, spacing, **offset)[:-1]]
        assert ours == times(diffusers.DDIMScheduler(**config), steps), steps
        ours = [level.t for level in grid(SD, steps, spacing, drop_last=spacing != "trailing", **offset)[:-1]]
        assert ours == times(diffusers.DPMSolverMultistepScheduler(**config), steps), steps


# ------------------------------------------------------------------------------------------- where ours differs


def test_ddim_follows_its_own_list_where_diffusers_does_not(toy_network):
    """30 does not divide 1000: a DDIM step of diffusers lands beside the next time of its list."""
    scheduler = diffusers.DDIMScheduler(**SD_CONFIG, clip_sample=False, timestep_spacing="trailing")
    x, _ = start()
    ours = final(ddim(denoiser(toy_network, None, "eps"), x, grid(SD, 30)))
    other = theirs(scheduler, toy_network, 30, x)
    assert (ours - other).abs().max() / other.abs().max() > 1e-3
    honest = diffusers.EulerDiscreteScheduler(**SD_CONFIG, timestep_spacing="trailing")  # the same step, honest times
    honest.set_timesteps(30)
    levels = grid(SD, 30)
    ours = final(ddim(denoiser(toy_network, None, "eps"), levels[0].sigma * x, levels))
    close(ours, theirs(honest, toy_network, 30, x * honest.init_noise_sigma))


def test_karras_takes_the_ends_of_the_spaced_times_when_told(toy_network):
    scheduler = diffusers.EulerDiscreteScheduler(**SD_CONFIG, timestep_spacing="trailing", use_karras_sigmas=True)
    scheduler.set_timesteps(17)
    spaced = grid(SD, 17, "trailing")
    ends = {"sigma_max": spaced[0].sigma / spaced[0].alpha, "sigma_min": spaced[-2].sigma / spaced[-2].alpha}
    levels = grid(SD, 17, "karras", **ends)
    ours = final(euler(denoiser(toy_network, None, "eps"), levels[0].sigma * start()[0], levels))
    close(ours, theirs(scheduler, toy_network, 17, start()[0] * scheduler.init_noise_sigma))


def test_trailing_never_reaches_a_negative_time():
    scheduler = diffusers.DDIMScheduler(**SD_CONFIG, timestep_spacing="trailing")
    assert times(scheduler, 61)[-1] == -1 and len(times(scheduler, 61)) == 62
    ours = [level.t for level in grid(SD, 61, "trailing")[:-1]]
    assert ours == times(scheduler, 61)[:-1]
