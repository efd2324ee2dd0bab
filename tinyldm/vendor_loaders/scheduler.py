"""`scheduler/scheduler_config.json` of a model folder: what a network learned, and how to sample from it.

diffusers keeps three things in one config: the curve, what the network predicts, and how to sample. The first two are
the model's: `from_config` reads them from any of its schedulers. The third is `sampling`: which sampler and which grid
draw what that scheduler draws, or what another one made from the same config would.

    s = sampling(config)                                                 # or sampling(config, "heun", "karras")
    levels = grid(process, steps, s.schedule, **s.grid)
    x = eps * (levels[0].sigma if s.start_at_sigma else 1.0)
    x = final(find_sampler(s.sampler)(denoise, x, levels, generators, **s.options))

`to_config` goes the other way: the scheduler whose pictures are those of a sampler here, with trailing times, ending
at clean data.

    network  process                        prediction  sampler      written as
    any      any table (also betas)         eps, x0, v  all          its class in PUBLISHED, or its stand-in's
    U-Net    flow                           flow        unipc        UniPCMultistepScheduler
    U-Net    flow                           flow        ddim, euler  DPMSolverMultistepScheduler, order 1
    U-Net    flow                           flow        others       DPMSolverMultistepScheduler, order 2
    DiT      flow                           flow        all          FlowMatchEulerDiscreteScheduler
    any      everything else                            all          TinyLDMScheduler

The last row is for pairs that no scheduler of diffusers computes correctly, for continuous processes, and for networks
that learn their variance: such a folder is for tinyldm alone.
StableDiffusionPipeline does not run FlowMatchEulerDiscreteScheduler, hence the rows for a flow U-Net.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from tinyldm.diffusion.grids import find_schedule
from tinyldm.diffusion.prediction import PREDICTIONS
from tinyldm.diffusion.process import PROCESSES, Process, make_process
from tinyldm.diffusion.samplers import SAMPLERS, sampler_name
from tinyldm.lookup import lookup
from tinyldm.vendor_loaders.scheduler_classes import BY_NOISE, FLOW_FIELDS, LIKE, PUBLISHED, SDE, WHY

OWN = "TinyLDMScheduler"
FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"
BETA_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "flow": "flow_prediction"}


class Schedule(NamedTuple):
    """A process by name, so that it can be written again, and what the network predicts on it."""

    name: str
    options: dict[str, Any]
    prediction: str


class Learned(NamedTuple):
    process: Process
    prediction: str


class Sampling(NamedTuple):
    """How a scheduler config says to sample: everything that draw() needs beside the model."""

    sampler: str              # a name in SAMPLERS
    options: dict[str, Any]   # the sampler's keyword arguments
    schedule: str             # a name in grids.SCHEDULES
    grid: dict[str, Any]      # further keyword arguments of grids.grid
    start_at_sigma: bool      # start from levels[0].sigma * eps instead of eps


# ---- how to sample


def sampling(config: dict, sampler: str | None = None, schedule: str | None = None) -> Sampling:
    """What draws the pictures of the scheduler that `config` describes.

    sampler   None: the config's own class decides. A name in SAMPLERS: as that sampler's class of diffusers, made
              `from_config`: the config's fields where it has them, else that class's defaults. What makes a scheduler
              another solver (order, variant) stays behind: it is part of the name.
    schedule  None or "normal": as the config says. Another name in SCHEDULES, or a list of times, takes the place of its
              spacing.

    ValueError for unknown names, and for fields that change the picture in a way that cannot be expressed here.
    """
    learned = read_schedule(config)
    name = sampler_name(sampler) if sampler is not None else _solver(config)
    first_order = sampler is None and name == "dpmpp_2m" and config.get("solver_order", 2) == 1
    find_schedule(schedule or "normal")
    schedule = None if schedule == "normal" else schedule
    if config.get("_class_name") == OWN:
        own = "karras" if learned.name == "edm" else "normal"
        return Sampling(name, {}, schedule or own, {}, learned.name in ("ve", "edm"))
    if learned.name == "flow":
        found = _flow_sampling(config, name, schedule)
    else:
        _refuse_others(config, PUBLISHED[LIKE.get(name, name)].fields)
        found = _table_sampling(config, learned, name, schedule)
    return found._replace(sampler="ddim") if first_order else found


def _solver(config: dict) -> str:
    """The sampler of the config's own class."""
    kind = config.get("_class_name")
    own = {OWN: "dpmpp_2m", FLOW_MATCH: "euler"} | {published.name: name for name, published in PUBLISHED.items()}
    if kind not in own:
        raise ValueError(f"the scheduler {kind} has no counterpart here: name a sampler ({', '.join(SAMPLERS)})")
    solver = PUBLISHED[own[kind]].solver if kind not in (OWN, FLOW_MATCH) else {}
    sde = own[kind] == "dpmpp_2m" and SDE.items() <= config.items()
    if sde:
        solver = solver | {"algorithm_type": (SDE["algorithm_type"],), "solver_order": (2,)}
    if config.get("final_sigmas_type") == "sigma_min":  # from there on these two decide about the last step
        solver = solver | {"lower_order_final": (True,), "euler_at_final": (False,)}
    _refuse_others(config, solver)
    return "dpmpp_2m_sde" if sde else own[kind]


def _refuse_others(config: dict, fields: Mapping[str, tuple]) -> None:
    """ValueError for a field whose value is not among the given ones; a missing field is none of them."""
    for field, values in fields.items():
        if config.get(field, values[0]) not in values:
            why = WHY.get(field, "there is no such solver here; name a sampler to draw with another")
            raise ValueError(f"the scheduler config has {field}={config[field]!r}: {why}")


def _flow_sampling(config: dict, name: str, schedule: str | None) -> Sampling:
    """On a flow the grid is the config's, and any sampler runs on it in its own coordinate."""
    if schedule:
        return Sampling(name, {}, schedule, {}, False)
    _refuse_others(config, FLOW_FIELDS)
    if config.get("_class_name") == FLOW_MATCH:
        return Sampling(name, {}, "flow_match", {}, False)
    # UniPC starts at 1 - 1e-6, of which float32 makes this
    grid = {"from_noise": True, "alpha_floor": 17 * 2.0**-24} if name == "unipc" else {}
    return Sampling(name, {}, "flow_sigmas", grid, False)


def _table_sampling(config: dict, learned: Schedule, name: str, schedule: str | None) -> Sampling:
    published, zero_snr = PUBLISHED[LIKE.get(name, name)], bool(config.get("rescale_betas_zero_snr"))
    spacings = {"leading": "leading", "trailing": "trailing", "linspace": published.linspace}
    spacing = schedule if schedule in spacings else config.get("timestep_spacing", published.spacing)
    spaced = lookup(spacings, spacing, "timestep_spacing")
    offset = {"offset": config.get("steps_offset", 0)} if spacing == "leading" else {}
    if schedule is None and published.karras:
        schedule = next((ours for field, ours in BY_NOISE.items() if config.get(field)), None)
    grid: dict[str, Any] = {}
    if schedule in BY_NOISE.values():
        grid = {field: config[field] for field in published.sigma_ends if config.get(field) is not None}
        if published.linspace == "linspace_unrounded":
            grid |= {"ends": spaced, **offset}
        elif schedule == "karras" and published.karras == "rounded" and learned.name != published.unrounded:
            grid |= {"rounded": True}
    elif schedule in (None, *spacings):
        schedule = spaced
        grid = offset | ({"drop_last": True} if published.drop_last and spacing != "trailing" else {})
    field, default = published.end
    if config.get(field, default) in (False, "sigma_min"):
        grid["set_alpha_to_one"] = False
    if zero_snr and published.alpha_floor:
        grid["alpha_floor"] = published.alpha_floor
    # A class that knows nothing of zero terminal SNR has no pictures to draw: there our own coordinate, finite at 0.
    own = name in PUBLISHED and (published.zero_snr or not zero_snr)
    options = published.options(learned.prediction) if own else {}
    return Sampling(name, options, schedule, grid, published.start_at_sigma and spacing != "leading")


# ---- what was learned


def from_config(config: dict) -> Learned:
    """Any config `to_config` writes, or a published one, -> the process and the prediction."""
    name, options, prediction = read_schedule(config)
    return Learned(make_process(name, **options), prediction)


def read_schedule(config: dict) -> Schedule:
    """As from_config, with the process by name: `to_config(*schedule, network)` writes it again.

    ValueError for curves that make_process does not have.
    """
    if config.get("_class_name") == OWN:
        return Schedule(config["process"], config["options"], config["prediction"])
    if config.get("use_dynamic_shifting"):
        raise ValueError("the scheduler shifts its times by image size (use_dynamic_shifting): only a fixed shift "
                         "can be expressed here")
    if config.get("_class_name") == FLOW_MATCH:
        return Schedule("flow", {"shift": config.get("shift", 1.0)}, "flow")
    kinds = {published: ours for ours, published in PREDICTION_TYPES.items()}
    prediction = lookup(kinds, config.get("prediction_type", "epsilon"), "prediction_type")
    if config.get("use_flow_sigmas", False) != (prediction == "flow"):
        raise ValueError(f"the scheduler has use_flow_sigmas={config.get('use_flow_sigmas', False)} with "
                         f"prediction_type {PREDICTION_TYPES[prediction]!r}: diffusers computes no such pair")
    if prediction == "flow":
        return Schedule("flow", {"shift": config.get("flow_shift", 1.0)}, "flow")
    if betas := config.get("trained_betas"):
        if len(betas) != config.get("num_train_timesteps", 1000):
            raise ValueError(f"the scheduler has {len(betas)} trained_betas for {config.get('num_train_timesteps', 1000)} "
                             "num_train_timesteps: they must be as many")
        rescaled = {"zero_snr": True} if config.get("rescale_betas_zero_snr") else {}
        return Schedule("betas", {"betas": list(betas), **rescaled}, prediction)
    names = {published: ours for ours, published in BETA_SCHEDULES.items()}
    name = lookup(names, config.get("beta_schedule", "linear"), "beta_schedule")
    options = {"steps": config.get("num_train_timesteps", 1000)}
    if not 1 < options["steps"] <= 100_000:
        raise ValueError(f"the scheduler has num_train_timesteps={options['steps']}: use 2 to 100000, 1000 is usual")
    if name != "cosine":
        usual = HEUN_BETAS if config.get("_class_name") == PUBLISHED["heun"].name else USUAL_BETAS
        options |= {field: config.get(field, value) for field, value in usual.items()}
    if config.get("rescale_betas_zero_snr"):
        options["zero_snr"] = True
    return Schedule(name, options, prediction)


USUAL_BETAS = {"beta_start": 1e-4, "beta_end": 0.02}  # where a config is silent
HEUN_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}


# ---- the other way


def to_config(
    process_name: str, options: dict[str, Any], prediction: str, network: str, sampler: str | None = None,
    learned_variance: bool = False,
) -> dict:
    """The scheduler_config.json of a network ("unet" or "dit") trained so, for diffusers to draw as `sampler` here.

    sampler: a name in SAMPLERS; None is ddim, and dpmpp_2m for a flow. Where its class cannot take the pair, one that
    can is written in its place (see the table above). ValueError for unknown names.
    """
    lookup({"unet": 0, "dit": 0}, network, "network")
    unknown = why_not_public(process_name, options, prediction)
    options = _defaults(process_name) | options
    if unknown or learned_variance:
        return {"_class_name": OWN, "process": process_name, "options": options, "prediction": prediction}
    name = None if sampler is None else sampler_name(sampler)
    # steps_offset is without meaning for trailing times and for flow's; StableDiffusionPipeline insists on 1.
    if process_name == "flow":
        if network == "dit":
            return {"_class_name": FLOW_MATCH, "num_train_timesteps": 1000, "shift": options["shift"]}
        published = PUBLISHED["unipc" if name == "unipc" else "dpmpp_2m"]
        sde = SDE if name in ("dpmpp_2m_sde", "dpmpp_sde") else {}
        order = {"solver_order": 1} if name in ("ddim", "euler") else {}
        return {"_class_name": published.name, "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
                "use_flow_sigmas": True, "flow_shift": options["shift"], **published.writes, **sde, **order,
                "steps_offset": 1}
    published = PUBLISHED["dpmpp_2m" if name == "dpmpp_sde" else LIKE.get(name, name or "ddim")]
    sde = SDE if name in ("dpmpp_2m_sde", "dpmpp_sde") else {}
    if prediction not in published.predictions or options["zero_snr"] and not published.zero_snr:
        published = PUBLISHED[published.stand_in]
    betas = ({"trained_betas": list(options["betas"])} if process_name == "betas" else
             {"beta_schedule": BETA_SCHEDULES[process_name]}
             | {name: options[name] for name in ("beta_start", "beta_end") if name in options})
    rescale = {"rescale_betas_zero_snr": options["zero_snr"]} if published.zero_snr else {}
    return {"_class_name": published.name, "num_train_timesteps": len(make_process(process_name, **options)), **betas,
            "prediction_type": PREDICTION_TYPES[prediction], "timestep_spacing": "trailing",
            **published.writes, **sde, **rescale, "steps_offset": 1}


def why_not_public(process_name: str, options: dict[str, Any], prediction: str) -> str | None:
    """Why no scheduler of diffusers computes this pair, for a person; None where one does."""
    make_process(process_name, **options)
    lookup(PREDICTIONS, prediction, "prediction")
    if process_name in ("vp", "ve", "edm"):
        return (f"StableDiffusionPipeline runs no scheduler of diffusers that has the continuous process '{process_name}': "
                "train with a table (scaled_linear, linear, cosine, betas) or with flow")
    if process_name == "betas" and not options.get("betas"):
        return "without betas there is nothing to write: use process 'linear'"
    if process_name == "flow" and prediction != "flow":
        return (f"on flow times diffusers reads every answer as a flow velocity, never as {prediction}: "
                "train with prediction 'flow'")
    if process_name != "flow" and prediction == "flow":
        return (f"diffusers reads a flow velocity on flow times only, not on '{process_name}': "
                "train with prediction 'v' or 'eps', or with process 'flow'")
    usual = _defaults(process_name)
    changed = [name for name in ("offset", "max_beta") if options.get(name, usual.get(name)) != usual.get(name)]
    if changed:
        return f"diffusers has one cosine only, with the usual {' and '.join(changed)}"
    return None


def _defaults(process_name: str) -> dict[str, Any]:
    parameters = inspect.signature(PROCESSES[process_name]).parameters
    return {name: parameter.default for name, parameter in parameters.items()}
