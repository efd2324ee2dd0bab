"""Whole sampling runs against diffusers' schedulers, live, on a toy network: float32-rounding parity.

The scheduler's config, as diffusers saves it, goes through `sampling`. The sampler and grid that it returns are run,
noise included, and compared. Where this library does something else on purpose, and why:

  DDIM, PNDM steps  theirs step from t to t - T // n instead of to the next time of their own list. The two agree for
                    leading, and for trailing when n divides T; otherwise ours follows the list.
  One step          with linspace theirs is numpy's linspace(0, 999, 1) = [0], a step from almost clean data; ours
                    starts from the noisiest level. (DPM-Solver++ and UniPC make one time more and do the same as ours.)
  Trailing times    numpy's arange accumulates rounding: for n = 61, 103, 121, ... theirs has an n + 1st time of -1,
                    for n = 48, 96, 112, ... it rounds a half the wrong way. Ours has n times, halves to even.
  Strength          theirs rounds 50 * 0.58 down to 28, ours to 29. From the middle of their list LMS takes weights of full order
                    for the single slope that it has, and PNDM takes a later step twice instead of the first; ours start anew.
  Clipping          where a config of another class does not say clip_sample, DDIM and DDPM made from it clip x0 to
                    [-1, 1]; ours, asked for by name, never.
  Variants          a sampler asked for by name is that sampler: solver_order, solver_type, algorithm_type, lower_order_final,
                    euler_at_final, disable_corrector and PNDM's Runge-Kutta start are not taken over.
  Zero SNR          Heun, LMS and PNDM made from a config with rescale_betas_zero_snr ignore it and sample on another
                    curve than the network's. Ours run on the right one, in coordinates that stay finite at alpha = 0.
  Flow              a config of a flow means its own times for every sampler. Theirs knows flows in FlowMatchEuler,
                    FlowMatchHeun, DPM-Solver++ and UniPC alone; other classes take them for Stable Diffusion's curve.
  Karras by name    on DDIM, DDPM, PNDM (table's ends) and Euler a (ends of its times), which have no such times there.
  Equal times       theirs find the first step by its time and take the second of two equal ones: Karras times of the
                    cosine table, rounded or cut, times of beta sigmas cut (from 50 steps on) and flow times of several
                    hundred steps skip a step or crash.
  Cut times         DPM-Solver++ and UniPC cut the times of exponential and beta sigmas to whole ones (2e-3 in the
                    picture); ours passes the unrounded time to the network.
  Learned variance  of DDPM: theirs adds noise in a last step from t > 0 to clean data, where beta_tilde is 0 and its
                    logarithm is put at 1e-20. Ours adds none.
  Brownian tree     DPM++ SDE draws from torchsde's tree; ours draws the same path from its generators, one seed an image.
  Rounding          their tables are float32: 1 - alpha_bar has lost 4 digits at t = 0 of "linear" and of its Karras
                    ends, and the end of "cosine" more. Euler, Euler a, Heun and LMS hold x / alpha in float32, PNDM
                    divides by alpha: near alpha = 0 they lose up to 4 digits (1e-2 with Heun from the end of cosine).

By default (not through `sampling`) two samplers and a grid differ too. `heun` and `lms` step in the coordinate of a flow;
diffusers' is scale=signal. "karras" takes its ends from the table and passes unrounded times to the network; diffusers'
needs ends= and rounded=True.
"""

import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import pytest
from helpers import combinations
import torch

from tinyldm.diffusion.grids import Levels, grid
from tinyldm.diffusion.guidance import denoiser, denoiser_with_variance
from tinyldm.diffusion.noise import initial_noise, make_generators, randn_like
from tinyldm.diffusion.process import make_process
from tinyldm.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp_sde, final, find_sampler, heun
from tinyldm.diffusion.step import signal
from tinyldm.vendor_loaders.scheduler import PREDICTION_TYPES, PUBLISHED, from_config, sampling, to_config

diffusers = pytest.importorskip("diffusers")

SD = make_process("scaled_linear")
SD_CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = ("leading", "trailing", "linspace")
SEEDS = [11, 12]
NEEDED = {  # fields without which theirs does something that is refused here
    "ddim": {"clip_sample": False},
    "ddpm": {"clip_sample": False},
    "pndm": {"skip_prk_steps": True},
}
KARRAS = [name for name, published in PUBLISHED.items() if published.karras]


def start(dtype=torch.float32):
    generators = make_generators(SEEDS)
    return initial_noise((4, 5, 5), generators).to(dtype), generators


def theirs(scheduler, net, steps, dtype=torch.float32, **options):
    """The loop of a diffusers pipeline."""
    scheduler.set_timesteps(steps)
    x, generators = start(dtype)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    seeds = {"generator": generators} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(scaled, t.expand(len(x))), t, x, **seeds, **options).prev_sample
    return x


def ours(config, net, steps, sampler=None, schedule=None, dtype=torch.float32):
    """The loop of sample.py."""
    process, prediction = from_config(config)
    found = sampling(config, sampler, schedule)
    levels = grid(process, steps, found.schedule, **found.grid)
    x, generators = start(dtype)
    x = x * (levels[0].sigma if found.start_at_sigma else 1.0)
    denoise = denoiser(net, None, prediction)
    return final(find_sampler(found.sampler)(denoise, x, levels, generators=generators, **found.options))


def close(found, reference, tolerance=1e-5):
    """The error relative to the size of the image, which must be float32 rounding, not an error of the method."""
    error = ((found - reference).abs().max() / reference.abs().max()).item()
    assert error < tolerance, f"relative difference {error:.1e}"


def saved(scheduler):
    return json.loads(scheduler.to_json_string())


def make(name, **fields):
    return getattr(diffusers, PUBLISHED[name].name)(**SD_CONFIG | NEEDED.get(name, {}) | fields)


def agrees(scheduler, net, steps, *names, config=None):
    close(ours(config or saved(scheduler), net, steps, *names), theirs(scheduler, net, steps))


def strays(name, spacing, steps):
    """Whether theirs leaves its own list of times, or starts from the wrong end (see DDIM, PNDM steps and One step)."""
    if name in ("ddim", "pndm") and (spacing == "linspace" or spacing == "trailing" and 1000 % steps):
        return True
    return spacing == "linspace" and steps == 1 and not PUBLISHED[name].drop_last


@pytest.mark.parametrize("name, spacing, kind", combinations(4, PUBLISHED, SPACINGS, ["eps", "v"]))
def test_a_saved_config_is_drawn_as_its_scheduler_draws(name, spacing, kind, toy_network):
    scheduler = make(name, timestep_spacing=spacing, steps_offset=1, prediction_type=PREDICTION_TYPES[kind])
    assert sampling(saved(scheduler)).sampler == name
    for steps in (1, 2, 5, 8, 20, 30, 50):
        if not strays(name, spacing, steps):
            agrees(scheduler, toy_network, steps)


@pytest.mark.parametrize("name, spacing, kind", combinations(4, KARRAS, SPACINGS, ["eps", "v"]))
def test_a_saved_config_with_karras_sigmas(name, spacing, kind, toy_network):
    fields = {"timestep_spacing": spacing, "steps_offset": 1, "prediction_type": PREDICTION_TYPES[kind]}
    scheduler = make(name, use_karras_sigmas=True, **fields)
    for steps in (1, 2, 5, 8, 20, 50):
        if not strays(name, spacing, steps):
            agrees(scheduler, toy_network, steps)
    agrees(scheduler, toy_network, 20, None, "karras", config=saved(make(name, **fields)))  # asked for by name


@pytest.mark.parametrize("name, spacing", combinations(3, [name for name, published in PUBLISHED.items() if "x0" in published.predictions],
                                                       SPACINGS))
def test_a_network_that_predicts_x0(name, spacing, toy_network):
    for karras in {False, name in KARRAS}:
        fields = {"use_karras_sigmas": True} if karras else {}
        scheduler = make(name, timestep_spacing=spacing, steps_offset=1, prediction_type="sample", **fields)
        for steps in (1, 2, 5, 8, 20, 50):
            if not strays(name, spacing, steps):
                # Heun with linspace: float32 rounding, measured as the distance to this run in float64: theirs 1.3e-5, ours 6e-7.
                tolerance = 2e-5 if (name, spacing) == ("heun", "linspace") else 1e-5
                # LMS in float64: its rounding in float32 over 50 trailing Karras steps (1.2e-5) would hide what is compared (3e-6).
                dtype = torch.float64 if name == "lms" else torch.float32
                found = ours(saved(scheduler), toy_network, steps, dtype=dtype)
                close(found, theirs(scheduler, toy_network, steps, dtype), tolerance)


@pytest.mark.parametrize(
    "curve, name",
    [("linear", name) for name in PUBLISHED]
    + [("squaredcos_cap_v2", name) for name in ("ddim", "ddpm", "dpmpp_2m", "unipc")],
)
def test_other_curves(curve, name, toy_network):
    fields = {"beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction"}
    agrees(make(name, beta_schedule=curve, timestep_spacing="trailing", **fields), toy_network, 10)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", [name for name, published in PUBLISHED.items() if published.zero_snr])
def test_zero_terminal_snr(name, spacing, toy_network):
    """At 20 steps: at 2 theirs feel the rounding of x / alpha, which is 4096 at first."""
    fields = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": spacing}
    if not strays(name, spacing, 20):
        agrees(make(name, **fields), toy_network, 20)
    if name in KARRAS:
        agrees(make(name, use_karras_sigmas=True, **fields), toy_network, 20)


FIELDS = [  # fields of some schedulers
    ("ddim", {"set_alpha_to_one": False, "steps_offset": 1}),
    ("pndm", {"set_alpha_to_one": True}),
    ("euler", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}),
    ("unipc", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}),
    ("dpmpp_2m", {"solver_order": 1}),
    *[(name, {"final_sigmas_type": "sigma_min", "timestep_spacing": spacing})
      for name in ("dpmpp_2m", "unipc") for spacing in SPACINGS],
    *[(name, {"final_sigmas_type": end} | fields) for end in ("zero", "sigma_min") for name, fields in (
        ("dpmpp_2m", {"lower_order_final": False}), ("dpmpp_2m", {"euler_at_final": True}),
        ("dpmpp_2m", {"lower_order_final": False, "euler_at_final": True}), ("dpmpp_2m", {"solver_type": "heun"}),
        ("dpmpp_2m", {"solver_type": "heun", "lower_order_final": False}), ("dpmpp_2m", {"use_lu_lambdas": True}),
        ("dpmpp_2m", {"use_lu_lambdas": True, "use_karras_sigmas": True}), ("dpmpp_2m", {"use_lu_lambdas": True, "solver_order": 1}),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "lower_order_final": False}),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "lower_order_final": False}),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True}),
        ("unipc", {"disable_corrector": [0, 3]}), ("unipc", {"use_karras_sigmas": True, "disable_corrector": [1]}))],
    *[("dpmpp_2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False, "timestep_spacing": spacing, "steps_offset": 1,
                    "prediction_type": "v_prediction"}) for spacing in SPACINGS],
    *[("unipc", {"final_sigmas_type": "sigma_min"} | fields) for fields in (         # to clean data theirs is not a number
        {"solver_type": "bh1"}, {"solver_type": "bh1", "disable_corrector": [1]}, {"lower_order_final": False},
        {"solver_type": "bh1", "lower_order_final": False, "use_karras_sigmas": True})],
]  # fmt: skip


@pytest.mark.parametrize("name, fields", FIELDS)
def test_a_field_that_changes_the_picture(name, fields, toy_network):
    for steps in (14, 15):  # dpmpp_2m: the last of fewer than 15 is of first order
        agrees(make(name, **fields), toy_network, steps)


def ramp(x, t, cond=None):
    """The network of diffusers' own tests of schedulers (tests/schedulers/test_schedulers.py), which is told whole times."""
    t = t.long().view(-1, 1, 1, 1)
    return x * t / (t + 1)


@pytest.mark.parametrize("fields, mean", [
    ({}, 0.3301), ({"prediction_type": "v_prediction"}, 0.2251),
    ({"prediction_type": "v_prediction", "use_karras_sigmas": True}, 0.2096),
])
def test_the_values_of_diffusers_own_tests_of_dpm_solver_without_a_lower_order_at_the_end(fields, mean):
    """The means that tests/schedulers/test_scheduler_dpm_multi.py states, of ten steps with its default config."""
    config = {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02,
              "beta_schedule": "linear", "solver_order": 2, "prediction_type": "epsilon", "thresholding": False,
              "sample_max_value": 1.0, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": False,
              "euler_at_final": False, "lambda_min_clipped": -math.inf, "variance_type": None, "final_sigmas_type": "sigma_min"}
    x = (torch.arange(3 * 8 * 8 * 4).reshape(3, 8, 8, 4) / (3 * 8 * 8 * 4)).permute(3, 0, 1, 2)
    (process, prediction), found = from_config(config | fields), sampling(config | fields)
    levels = grid(process, 10, found.schedule, **found.grid)
    drawn = final(find_sampler(found.sampler)(denoiser(ramp, None, prediction), x, levels, **found.options))
    assert abs(drawn.abs().mean().item() - mean) < 1e-3     # the bound there
    if "use_karras_sigmas" not in fields:                   # whose last step has no length
        lower = final(find_sampler(found.sampler)(denoiser(ramp, None, prediction), x, levels))
        assert abs(lower.abs().mean().item() - mean) > 0.05


SD15 = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None, "clip_sample": False}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_sampler_by_name_on_the_published_config_of_stable_diffusion(name, toy_network):
    """As the class made from_config draws: spacing is that class's default, the rest is the config's."""
    scheduler = getattr(diffusers, PUBLISHED[name].name)
    agrees(scheduler.from_config(SD15), toy_network, 17, name, config=SD15)
    if not PUBLISHED[name].schedule:                            # LCM's class has one grid, whatever the spacing
        agrees(scheduler.from_config(SD15, timestep_spacing="trailing"), toy_network, 20, name, "trailing", config=SD15)
    if name in KARRAS:
        agrees(scheduler.from_config(SD15, use_karras_sigmas=True), toy_network, 17, name, "karras", config=SD15)


@pytest.mark.parametrize("source", PUBLISHED)
def test_every_sampler_by_name_on_every_saved_config(source, toy_network):
    config = saved(make(source, timestep_spacing="leading", steps_offset=1))
    for name, published in PUBLISHED.items():
        scheduler = getattr(diffusers, published.name).from_config(config, **NEEDED.get(name, {}))
        agrees(scheduler, toy_network, 9, name, config=config)


FLOWS = {
    "FlowMatchEuler": lambda shift: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    **{f"{name} {order}": lambda shift, name=name, order=order: getattr(diffusers, PUBLISHED[name].name)(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order)
       for name, order in (("dpmpp_2m", 1), ("dpmpp_2m", 2), ("unipc", 2))},
}  # fmt: skip


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOWS)
def test_flows(name, shift, toy_network):
    for steps in (1, 2, 5, 9, 20):
        agrees(FLOWS[name](shift), toy_network, steps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_on_a_flow_is_flow_match_heun(shift, toy_network):
    """`sampling` does not read this scheduler, but on its grid and in our own coordinate the results agree."""
    scheduler, flow = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift), make_process("flow", shift=shift)
    found = final(heun(denoiser(toy_network, None, "flow"), start()[0], grid(flow, 9, "flow_match")))
    close(found, theirs(scheduler, toy_network, 9))


# Not cosine with the samplers of k-diffusion and pndm, for rounding (see above).
EXPORTED = [
    (process, options, prediction, name)
    for process, options, predictions in (
        ("scaled_linear", {}, ("eps", "x0", "v")),
        ("scaled_linear", {"zero_snr": True}, ("x0", "v")),
        ("linear", {"steps": 500}, ("v",)),
        ("cosine", {}, ("v",)),
        ("flow", {"shift": 2.0}, ("flow",)),
    )
    for prediction in predictions
    for name in (("ddim", "ddpm", "dpmpp_2m", "unipc") if process == "cosine" else PUBLISHED)
]


@pytest.mark.parametrize("process, options, prediction, name", EXPORTED)
def test_diffusers_draws_from_an_exported_config_what_is_drawn_here(process, options, prediction, name, toy_network):
    config = to_config(process, options, prediction, name)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    agrees(scheduler, toy_network, 20, config=config)
    kept = {"zero_snr", "shift"} & set(options) or prediction == "x0"  # another class may be written for these
    assert sampling(config).sampler == name or kept


# ---- what is compared sampler against sampler, not by config

MULTI, ENDED = {}, {"ends": "linspace_unrounded"}  # these take the table's own ends, those of k-diffusion their times'
BY_SIGMA = {
    "euler": ("EulerDiscreteScheduler", {}, ENDED),
    "heun": ("HeunDiscreteScheduler", {"scale": signal}, ENDED),
    "lms": ("LMSDiscreteScheduler", {"scale": signal}, ENDED),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, MULTI),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {}, MULTI),
    "unipc": ("UniPCMultistepScheduler", {}, MULTI),
}
STEPS = (1, 2, 5, 8, 20, 50)


def tolerance(steps):
    """1e-5, and twice that for what 50 steps in float32 add up to, or x / alpha in float32 costs (see Rounding)."""
    return 1e-5 if steps < 50 else 2e-5


def draws(name, net, prediction, levels, start_at_sigma=False, **options):
    x, generators = start()
    x = x * (levels[0].sigma if start_at_sigma else 1.0)
    return final(SAMPLERS[name](denoiser(net, None, prediction), x, levels, generators=generators, **options))


@pytest.mark.parametrize("name, schedule, kind", combinations(4, BY_SIGMA, ["exponential", "beta"], ["eps", "v", "x0"]))
def test_exponential_and_beta_sigmas(name, schedule, kind, toy_network):
    scheduler, options, ends = BY_SIGMA[name]
    sde = {"algorithm_type": "sde-dpmsolver++"} if name == "dpmpp_2m_sde" else {}
    spacing = {} if ends is MULTI else {"timestep_spacing": "linspace"}
    fields = {"prediction_type": PREDICTION_TYPES[kind], f"use_{schedule}_sigmas": True} | sde | spacing
    made = getattr(diffusers, scheduler)(**SD_CONFIG | fields)
    for steps in STEPS:
        if steps == 1 and ends is ENDED:
            continue  # numpy's linspace(0, 999, 1) is [0]: see One step
        levels = grid(SD, steps, schedule, **ends)
        wanted = times(made, steps)
        if ends is MULTI and len(set(wanted)) < len(wanted):
            continue  # see Equal times
        reference = theirs(made, toy_network, steps)
        if ends is MULTI:  # see Cut times
            cut = [level._replace(t=t) for level, t in zip(levels, [*map(float, wanted), 0.0])]
            assert all(-0.1 < level.t - other.t < 1.1 for level, other in zip(levels, cut))
            levels = Levels(cut, levels.curve)
        close(draws(name, toy_network, kind, levels, ends is ENDED, **options), reference, tolerance(50 if ends is ENDED else steps))


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("spacing", [*SPACINGS, "karras"])
def test_dpmpp_2m_sde_with_its_noise(spacing, kind, toy_network):
    fields = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing, "steps_offset": 1}
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD_CONFIG | fields, algorithm_type="sde-dpmsolver++", prediction_type=PREDICTION_TYPES[kind]
    )
    offset = {"offset": 1} if spacing == "leading" else {}
    habit = {"karras": {"rounded": True}, "trailing": {}}.get(spacing, {"drop_last": True})
    for steps in STEPS:
        found = draws("dpmpp_2m_sde", toy_network, kind, grid(SD, steps, spacing, **offset, **habit))
        close(found, theirs(scheduler, toy_network, steps), tolerance(steps))


def dpm_solver_sde(monkeypatch, **fields):
    """diffusers' DPMSolverSDEScheduler, which asks for torchsde as it is imported, for its Brownian tree alone."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    file = Path(diffusers.__file__).parent / "schedulers" / "scheduling_dpmsolver_sde.py"
    spec = importlib.util.spec_from_file_location("diffusers.schedulers.scheduling_dpmsolver_sde_here", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DPMSolverSDEScheduler(**SD_CONFIG | fields)


@pytest.mark.parametrize("spacing, kind", combinations(2, [*SPACINGS, "karras", "exponential", "beta"], ["eps", "v"]))
def test_dpmpp_sde_given_the_same_brownian_path(spacing, kind, toy_network, monkeypatch):
    """Its tree is replaced by one that draws the increments of W(sigma) in turn, from our generators."""
    by_sigma = spacing in ("karras", "exponential", "beta")
    fields = {f"use_{spacing}_sigmas": True} if by_sigma else {"timestep_spacing": spacing, "steps_offset": 1}
    scheduler = dpm_solver_sde(monkeypatch, prediction_type=PREDICTION_TYPES[kind], **fields)
    schedule = "linspace_unrounded" if spacing == "linspace" else spacing
    options = ENDED if by_sigma else {"offset": 1} if spacing == "leading" else {}
    for steps in STEPS:
        if steps == 1 and spacing not in ("trailing", "leading"):
            continue  # linspace(0, 999, 1) again
        levels = grid(SD, steps, schedule, **options)
        x, generators = start()
        scheduler.set_timesteps(steps)
        path = {}

        def tree(sigma, sigma_next):
            a, b = float(sigma), float(sigma_next)
            if path.get("from") != a:  # the half step of a new step
                path.update({"from": a, "at": b, "w": (a - b) ** 0.5 * randn_like(x, generators)})
                return path["w"] / (a - b) ** 0.5
            return (path["w"] + (path["at"] - b) ** 0.5 * randn_like(x, generators)) / (a - b) ** 0.5

        scheduler.noise_sampler = tree
        y = x * levels[0].sigma / levels[0].alpha
        for t in scheduler.timesteps:
            out = toy_network(scheduler.scale_model_input(y, t).float(), t.expand(len(y)))
            y = scheduler.step(out, t, y).prev_sample
        mine = levels[0].sigma * start()[0]
        found = final(dpmpp_sde(denoiser(toy_network, None, kind), mine, levels, generators=start()[1]))
        close(found, y.float(), tolerance(steps))


def test_ddpm_with_learned_variance(toy_network):
    """learned_range: the network's further channels lie between the logarithms of beta_tilde and beta."""
    scheduler = diffusers.DDPMScheduler(**SD_CONFIG, variance_type="learned_range", clip_sample=False)

    def net(x, t, cond=None):
        out = toy_network(x, t)
        return torch.cat([out, out.sin()], 1)

    for steps in (2, 5, 20, 50):
        x, generators = start()
        found = final(ddpm(denoiser_with_variance(net, None, "eps"), x, grid(SD, steps, "leading"), generators))
        close(found, theirs(scheduler, net, steps))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", ["exponential", "beta"])
@pytest.mark.parametrize("name", ["euler", "heun", "lms"])
def test_a_saved_config_with_exponential_and_beta_sigmas(name, schedule, spacing, toy_network):
    scheduler = make(name, timestep_spacing=spacing, steps_offset=1, **{f"use_{schedule}_sigmas": True})
    assert sampling(saved(scheduler)).schedule == schedule
    close(ours(saved(scheduler), toy_network, 20), theirs(scheduler, toy_network, 20), tolerance(50))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_saved_config_of_the_stochastic_multistep_solver(spacing, toy_network):
    scheduler = make("dpmpp_2m", algorithm_type="sde-dpmsolver++", timestep_spacing=spacing, steps_offset=1)
    assert sampling(saved(scheduler)).sampler == "dpmpp_2m_sde"
    agrees(scheduler, toy_network, 20)


@pytest.mark.parametrize("schedule", [None, "karras", "exponential", "beta", "900,500,100"])
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(PUBLISHED)))
def test_samplers_without_a_class_run_on_published_configs_and_export_another(name, schedule, toy_network):
    for config, prediction in ((SD15, "eps"), (saved(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)), "flow")):
        assert bool(ours(config, toy_network, 5, name, schedule).isfinite().all())
        process = "flow" if prediction == "flow" else "scaled_linear"
        written = to_config(process, {}, prediction, name)
        assert sampling(written).sampler == name or name in ("dpmpp_sde", "edm", "adaptive", "annealed_langevin", "predictor_corrector", "lcm")


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_noise(eta, toy_network):
    scheduler = make("ddim", timestep_spacing="trailing")
    x, generators = start()
    found = final(ddim(denoiser(toy_network, None, "eps"), x, grid(SD, 20), eta=eta, generators=generators))
    close(found, theirs(scheduler, toy_network, 20, eta=eta))


# ---- differences


def times(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_are_theirs_for_many_step_counts(spacing):
    offset = {"offset": 1} if spacing == "leading" else {}
    off_by_rounding = {48, 61, 96, 103, 112, 121, 122, 144, 176, 192} if spacing == "trailing" else {1}
    config = SD_CONFIG | {"timestep_spacing": spacing, "steps_offset": 1}
    for steps in set(range(1, 200)) - off_by_rounding:
        found = [level.t for level in grid(SD, steps, spacing, **offset)[:-1]]
        assert found == times(diffusers.DDIMScheduler(**config), steps), steps
        found = [level.t for level in grid(SD, steps, spacing, drop_last=spacing != "trailing", **offset)[:-1]]
        assert found == times(diffusers.DPMSolverMultistepScheduler(**config), steps), steps


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_ddim_and_pndm_follow_their_own_list_where_diffusers_does_not(name, toy_network):
    """30 does not divide 1000: a step of diffusers lands beside the next time of its list."""
    scheduler = make(name, timestep_spacing="trailing", set_alpha_to_one=True)
    reference = theirs(scheduler, toy_network, 30)
    assert (ours(saved(scheduler), toy_network, 30) - reference).abs().max() / reference.abs().max() > 1e-3


def test_ddim_on_its_list_is_euler_of_diffusers_which_keeps_to_it(toy_network):
    honest, levels = make("euler", timestep_spacing="trailing"), grid(SD, 30)
    found = final(ddim(denoiser(toy_network, None, "eps"), levels[0].sigma * start()[0], levels))
    close(found, theirs(honest, toy_network, 30))


def test_trailing_never_reaches_a_negative_time():
    scheduler = diffusers.DDIMScheduler(**SD_CONFIG, timestep_spacing="trailing")
    assert times(scheduler, 61)[-1] == -1 and len(times(scheduler, 61)) == 62
    assert [level.t for level in grid(SD, 61, "trailing")[:-1]] == times(scheduler, 61)[:-1]
