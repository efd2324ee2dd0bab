"""`scheduler/scheduler_config.json` of a model folder: what a network was trained on, and how to sample from it.

diffusers keeps three things in one config: the curve, what the network predicts, and how to sample. The first two belong
to the trained network: `from_config` reads them from the config of any scheduler. The third is `sampling`: the sampler and
the grid that draw what that scheduler draws, or what another scheduler made from the same config would draw.

    s = sampling(config)                                                 # or sampling(config, "heun", "karras")
    levels = grid(process, steps, s.schedule, **s.grid)
    x = eps * (levels[0].sigma if s.start_at_sigma else 1.0)
    x = final(find_sampler(s.sampler)(denoise, x, levels, generators, **s.options))

`to_config` goes the other way: it writes the scheduler that draws the pictures of one of our samplers, with trailing times,
ending at clean data.

    process                        prediction  flow_match  sampler           written as
    any table (also betas)         eps, x0, v  either      all               its class in PUBLISHED, or a fallback
    flow                           flow        False       unipc             UniPCMultistepScheduler
    flow                           flow        False       ddim, euler       DPMSolverMultistepScheduler, order 1
    flow                           flow        False       others            DPMSolverMultistepScheduler, order 2
    flow, dynamic_flow             flow        True        all               FlowMatchEulerDiscreteScheduler
    everything else                            either      all               TinyLDMScheduler

`flow_match` says whether the pipeline of the network runs FlowMatchEulerDiscreteScheduler (a field of pipelines.py).
StableDiffusionPipeline crashes with it: hence the three rows with False.

The last row is for pairs of process and prediction that no scheduler of diffusers computes correctly, for processes that
diffusers lacks (the continuous ones, and any that was registered from outside), and for networks that learn their variance.
Only tinyldm opens such a folder. A sampler registered from outside is written as ddim is, on a flow as dpmpp_2m is: the
tinyldm.json of a model folder names the sampler itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tinyldm.diffusion.grids import find_schedule
from tinyldm.diffusion.prediction import PREDICTIONS
from tinyldm.diffusion.process import Process, make_process
from tinyldm.diffusion.samplers import SAMPLERS, sampler_name
from tinyldm.lookup import lookup
from tinyldm.vendor_loaders.scheduler_classes import (
    BETA_SCHEDULES,
    DYNAMIC_FIELDS,
    FLOW_FIELDS,
    FLOW_MATCH,
    FLOWS,
    OWN,
    OWN_PROCESSES,
    PREDICTION_TYPES,
    PUBLISHED,
    PUBLISHED_PROCESSES,
    REFUSAL_REASONS,
    SDE_FIELDS,
    SDE_SAMPLERS,
    SIGMA_SCHEDULES,
    TIME_SHIFT_TYPES,
    USES_ROW_OF,
    OwnProcess,
    Published,
)
from tinyldm.vendor_loaders.scheduler_process import NamedProcess, default_options, read_process

FIRST_ORDER = {"dpmpp_2m": "ddim", "dpmpp_2m_sde": "ddpm"}  # sampler -> the one that it is with solver_order 1


class ProcessAndPrediction(NamedTuple):
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
    """The sampler and the grid that draw the pictures of the scheduler that `config` describes.

    sampler   None: the config's own class decides, and a field that it lacks means that class's default. A name in
              SAMPLERS: as the class of diffusers for that sampler, made
              `from_config`, would draw: with the fields that the config states, else with the defaults of that class. The
              fields that select another solver (order, variant) are ignored: the name of the sampler says which solver.
              A sampler that was registered from outside draws on the grid of the config's own class.
    schedule  None or "normal": as the config says. Another name in SCHEDULES, or a list of times, replaces its spacing.

    ValueError for unknown names, and for fields that change the picture in a way that cannot be expressed here.
    """
    trained = read_process(config)
    own_class = _class_of(config) if sampler is None else None
    if own_class:
        config = {**own_class.unstated, **config}
    name = sampler_name(sampler) if sampler is not None else _sampler_of_class(config)
    find_schedule(schedule or "normal")
    schedule = None if schedule == "normal" else schedule
    if config.get("_class_name") == OWN:
        own = OWN_PROCESSES.get(trained.name, OwnProcess(start_at_sigma=trained.name not in PUBLISHED_PROCESSES))
        return Sampling(name, {}, schedule or own.schedule, {}, own.start_at_sigma)
    if trained.name in FLOWS:
        found = _flow_sampling(config, name, schedule)
    else:
        published = _row(name, config)
        _refuse_unsupported(config, published.picture_fields)
        found = _table_sampling(config, published, trained, name, schedule)
    if own_class and name in FIRST_ORDER and config.get("solver_order") == 1:
        return found._replace(sampler=FIRST_ORDER[name])
    return found._replace(options=found.options | own_class.variant(config)) if own_class else found


def _class_of(config: dict) -> Published | None:
    """The row of the config's own class."""
    return next((published for published in PUBLISHED.values() if published.name == config.get("_class_name")), None)


def _sampler_of_class(config: dict) -> str:
    """The sampler that draws as the config's own class does."""
    class_name = config.get("_class_name")
    samplers = {OWN: "dpmpp_2m", FLOW_MATCH: "euler"} | {published.name: name for name, published in PUBLISHED.items()}
    if class_name not in samplers:
        raise ValueError(f"the scheduler {class_name} has no counterpart here: name a sampler ({', '.join(SAMPLERS)})")
    name = samplers[class_name]
    fields = PUBLISHED[name].solver_fields if class_name not in (OWN, FLOW_MATCH) else {}
    sde = name == "dpmpp_2m" and SDE_FIELDS.items() <= config.items()
    if sde:
        fields = fields | {"algorithm_type": (SDE_FIELDS["algorithm_type"],)}
    _refuse_unsupported(config, fields)
    return "dpmpp_2m_sde" if sde else name


def _row(name: str, config: dict) -> Published:
    """The row of PUBLISHED by which a sampler reads this config. A sampler that was registered from outside has none: it
    takes the row of the config's own class, and that of ddim where the class has no row either."""
    return PUBLISHED.get(USES_ROW_OF.get(name, name)) or _class_of(config) or PUBLISHED["ddim"]


def _refuse_unsupported(config: dict, fields: Mapping[str, tuple]) -> None:
    """ValueError for a field whose value is not among the given ones. A field that the config lacks is accepted."""
    for field, values in fields.items():
        if config.get(field, values[0]) not in values:
            raise ValueError(f"the scheduler config has {field}={config[field]!r}: {REFUSAL_REASONS[field]}")


def _flow_sampling(config: dict, name: str, schedule: str | None) -> Sampling:
    """On a flow, the config decides about the grid, and every sampler runs on it in its own coordinate."""
    if schedule:
        return Sampling(name, {}, schedule, {}, False)
    _refuse_unsupported(config, FLOW_FIELDS)
    if config.get("_class_name") == FLOW_MATCH:
        return Sampling(name, {}, "flow_match", {"twice": False} if config.get("use_dynamic_shifting") else {}, False)
    # UniPC starts at sigma = 1 - 1e-6. In float32 its alpha, 1 - sigma, is 17 * 2^-24.
    grid = {"from_noise": True, "alpha_floor": 17 * 2.0**-24} if name == "unipc" else {}
    return Sampling(name, {}, "flow_sigmas", grid, False)


def _table_sampling(config: dict, published: Published, trained: NamedProcess, name: str, schedule: str | None) -> Sampling:
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    spacings = {"leading": "leading", "trailing": "trailing", "linspace": published.linspace}
    spacing = schedule if schedule in spacings else config.get("timestep_spacing", published.spacing)
    spaced = lookup(spacings, spacing, "timestep_spacing")
    offset = {"offset": config.get("steps_offset", 0)} if spacing == "leading" else {}
    lu_lambdas = False
    if schedule is None and published.karras:
        lu_lambdas = published.lu_lambdas and config.get("use_lu_lambdas", False) and not config.get("use_karras_sigmas")
        schedule = "exponential" if lu_lambdas else next((ours for field, ours in SIGMA_SCHEDULES.items() if config.get(field)), None)
    grid: dict[str, Any] = {}
    if published.schedule and schedule is None:
        schedule, grid = published.schedule, {"original": config.get("original_inference_steps", 50)}
    elif schedule in SIGMA_SCHEDULES.values():
        grid = {field: config[field] for field in published.sigma_ends if config.get(field) is not None}
        if published.linspace == "linspace_unrounded":
            grid |= {"ends": spaced, **offset}
        elif (lu_lambdas or schedule == "karras") and published.karras == "rounded" and trained.name != published.unrounded_process:
            grid |= {"rounded": True}
    elif schedule in (None, *spacings):
        schedule = spaced
        grid = offset | ({"drop_last": True} if published.drop_last and spacing != "trailing" else {})
    field, default = published.end_field
    if config.get(field, default) in (False, "sigma_min"):
        grid["set_alpha_to_one"] = False
    if zero_snr and published.alpha_floor:
        grid["alpha_floor"] = published.alpha_floor
    # Without support for zero terminal SNR, a class has no pictures to reproduce there: the sampler then keeps its default
    # coordinate, which is finite at alpha = 0.
    as_published = name in PUBLISHED and (published.zero_snr or not zero_snr)
    options = published.options(trained.prediction) if as_published else {}
    return Sampling(name, options, schedule, grid, published.start_at_sigma and spacing != "leading")


def with_fields(config: dict, fields: Mapping[str, Any]) -> dict:
    """The config with these fields, as the constructor of a pipeline sets them (pipelines.READ): those that its class has."""
    row = _class_of(config)
    known = config.keys() | {"steps_offset"} | (row.picture_fields.keys() | row.solver_fields.keys() if row else set())
    return config | {field: value for field, value in fields.items() if field in known}


# ---- what the network was trained on


def from_config(config: dict) -> ProcessAndPrediction:
    """A config that `to_config` wrote, or a published one, -> the process and the prediction."""
    name, options, prediction = read_process(config)
    return ProcessAndPrediction(make_process(name, **options), prediction)


# ---- writing a config


def to_config(
    process_name: str, options: dict[str, Any], prediction: str, sampler: str | None = None, *,
    flow_match: bool = False, learned_variance: bool = False,
) -> dict:
    """The scheduler_config.json of a network trained on this process, with which diffusers draws as `sampler` does here.

    sampler           a name in SAMPLERS; None is ddim, and dpmpp_2m on a flow. Where the sampler has no class, or one that
                      lacks this pair, another class is written (see the table above)
    flow_match        whether the network's pipeline runs FlowMatchEulerDiscreteScheduler
    learned_variance  whether the network says its variance in extra channels

    ValueError for unknown names.
    """
    name = None if sampler is None else sampler_name(sampler)
    reason = why_not_public(process_name, options, prediction, flow_match)
    options = default_options(process_name) | options
    if reason or learned_variance:
        return {"_class_name": OWN, "process": process_name, "options": options, "prediction": prediction}
    if process_name not in FLOWS:
        return _table_config(process_name, options, prediction, name)
    if flow_match:
        return {"_class_name": FLOW_MATCH, "num_train_timesteps": 1000, **_flow_match_fields(process_name, options)}
    published = PUBLISHED["unipc" if name == "unipc" else "dpmpp_2m"]
    order = {"solver_order": 1} if name in ("ddim", "euler") else {}
    return {"_class_name": published.name, "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
            "use_flow_sigmas": True, "flow_shift": options["shift"], **published.writes, **_sde_fields(name), **order,
            "steps_offset": 1}  # without effect here, but StableDiffusionPipeline insists on 1


def _flow_match_fields(process_name: str, options: dict[str, Any]) -> dict[str, Any]:
    if process_name == "flow":
        return {"shift": options["shift"]}
    names = {ours: published for published, ours in TIME_SHIFT_TYPES.items()}
    return {"use_dynamic_shifting": True, "time_shift_type": names[options["exponential"]],
            **{field: options[option] for option, field in DYNAMIC_FIELDS.items()}}


def _table_config(process_name: str, options: dict[str, Any], prediction: str, name: str | None) -> dict:
    written_as = "dpmpp_2m" if name in SDE_SAMPLERS else USES_ROW_OF.get(name, name)
    published = PUBLISHED.get(written_as, PUBLISHED["ddim"])
    if prediction not in published.predictions or options["zero_snr"] and not published.zero_snr:
        published = PUBLISHED[published.fallback]
    betas = ({"trained_betas": list(options["betas"])} if process_name == "betas" else
             {"beta_schedule": BETA_SCHEDULES[process_name]}
             | {field: options[field] for field in ("beta_start", "beta_end") if field in options})
    rescale = {"rescale_betas_zero_snr": options["zero_snr"]} if published.zero_snr else {}
    return {"_class_name": published.name, "num_train_timesteps": len(make_process(process_name, **options)), **betas,
            "prediction_type": PREDICTION_TYPES[prediction], "timestep_spacing": "trailing",
            **published.writes, **_sde_fields(name), **rescale,
            "steps_offset": 1}  # without effect on trailing times, but StableDiffusionPipeline insists on 1


def _sde_fields(name: str | None) -> dict[str, Any]:
    return SDE_FIELDS if name in SDE_SAMPLERS else {}


def why_not_public(process_name: str, options: dict[str, Any], prediction: str, flow_match: bool = False) -> str | None:
    """The reason, in a sentence, why no scheduler of diffusers computes this pair; None where one does. flow_match: as in to_config."""
    make_process(process_name, **options)
    lookup(PREDICTIONS, prediction, "prediction")
    if process_name in OWN_PROCESSES:
        return (f"StableDiffusionPipeline runs no scheduler of diffusers that has the continuous process '{process_name}': "
                f"train with a table ({', '.join(BETA_SCHEDULES)}, betas) or with flow")
    if process_name not in PUBLISHED_PROCESSES:
        return (f"diffusers has no scheduler for the process '{process_name}': "
                f"train with a table ({', '.join(BETA_SCHEDULES)}, betas) or with flow")
    if prediction not in PREDICTION_TYPES:
        return f"no scheduler of diffusers takes the prediction '{prediction}': train with {', '.join(PREDICTION_TYPES)}"
    if process_name == "betas" and not options.get("betas"):
        return "process 'betas' without betas leaves nothing to write: use process 'linear', which is the same curve"
    if process_name == "dynamic_flow" and not flow_match:
        return "StableDiffusionPipeline does not tell its scheduler the size of a picture, so it has no dynamic_flow: train with 'flow'"
    if process_name in FLOWS and prediction != "flow":
        return (f"on flow times diffusers reads every network output as a flow velocity, never as {prediction}: "
                "train with prediction 'flow'")
    if process_name not in FLOWS and prediction == "flow":
        return (f"diffusers reads a flow velocity on flow times only, not on '{process_name}': "
                "train with prediction 'v' or 'eps', or with process 'flow'")
    defaults = default_options(process_name)
    changed = [name for name in ("offset", "max_beta") if options.get(name, defaults.get(name)) != defaults.get(name)]
    if changed:
        return f"diffusers has only one cosine, with the usual {' and '.join(changed)}"
    return None
