"""`scheduler/scheduler_config.json` of a model folder: which process and which prediction a network learned.

diffusers keeps three things in one config: the curve, what the network predicts, and how to sample. The
first two are the model's and are read from any of its schedulers; for the third, a config written here
gives diffusers the habits that sample.py has by default (trailing times, ending at clean data).

    network  process                        prediction  written as
    any      scaled_linear, linear, cosine  eps, x0, v  DDIMScheduler
    U-Net    flow                           flow        DPMSolverMultistepScheduler with use_flow_sigmas
    DiT      flow                           flow        FlowMatchEulerDiscreteScheduler
    any      everything else                            TinyLDMScheduler, which diffusers does not have

The last row is for pairs that no scheduler of diffusers computes correctly (v on flow times, for one, is
taken for v on a variance-preserving curve there): such a folder is for tinyldm alone. StableDiffusionPipeline
does not run FlowMatchEulerDiscreteScheduler, hence the two rows for flow.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from tinyldm.diffusion.prediction import PREDICTIONS
from tinyldm.diffusion.process import PROCESSES, Process, make_process
from tinyldm.lookup import lookup

OWN = "TinyLDMScheduler"
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


def to_config(process_name: str, options: dict[str, Any], prediction: str, network: str) -> dict:
    """The scheduler_config.json of a network ("unet" or "dit") trained so. ValueError for unknown names."""
    make_process(process_name, **options)
    lookup(PREDICTIONS, prediction, "prediction")
    lookup({"unet": 0, "dit": 0}, network, "network")
    options = _defaults(process_name) | options
    # steps_offset is without meaning for trailing times and for flow's; StableDiffusionPipeline insists on 1.
    if process_name == "flow" and prediction == "flow":
        if network == "dit":
            return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
                    "shift": options["shift"]}
        return {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000,
                "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": options["shift"],
                "algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero", "steps_offset": 1}
    if _is_ddim(process_name, options) and prediction != "flow":
        betas = {name: options[name] for name in ("beta_start", "beta_end") if name in options}
        return {"_class_name": "DDIMScheduler", "num_train_timesteps": options["steps"],
                "beta_schedule": BETA_SCHEDULES[process_name], **betas,
                "prediction_type": PREDICTION_TYPES[prediction], "timestep_spacing": "trailing",
                "set_alpha_to_one": True, "clip_sample": False, "thresholding": False,
                "rescale_betas_zero_snr": False, "steps_offset": 1}
    return {"_class_name": OWN, "process": process_name, "options": options, "prediction": prediction}


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
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        return Schedule("flow", {"shift": config.get("shift", 1.0)}, "flow")
    kinds = {published: ours for ours, published in PREDICTION_TYPES.items()}
    prediction = lookup(kinds, config.get("prediction_type", "epsilon"), "prediction_type")
    if config.get("use_flow_sigmas", False) != (prediction == "flow"):
        raise ValueError(f"the scheduler has use_flow_sigmas={config.get('use_flow_sigmas', False)} with "
                         f"prediction_type {PREDICTION_TYPES[prediction]!r}: diffusers computes no such pair")
    if prediction == "flow":
        return Schedule("flow", {"shift": config.get("flow_shift", 1.0)}, "flow")
    for field in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(field):
            raise ValueError(f"the scheduler has {field}={config[field]!r}: this curve cannot be expressed here")
    names = {published: ours for ours, published in BETA_SCHEDULES.items()}
    name = lookup(names, config.get("beta_schedule", "linear"), "beta_schedule")
    options = {"steps": config.get("num_train_timesteps", 1000)}
    if name != "cosine":
        options |= {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    return Schedule(name, options, prediction)


def _defaults(process_name: str) -> dict[str, Any]:
    parameters = inspect.signature(PROCESSES[process_name]).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def _is_ddim(process_name: str, options: dict[str, Any]) -> bool:
    """Whether diffusers' betas describe this curve: it has one cosine only."""
    if process_name not in BETA_SCHEDULES:
        return False
    usual = _defaults(process_name)
    return process_name != "cosine" or all(options[name] == usual[name] for name in options if name != "steps")
