"""The curve and the prediction that a scheduler config states: what a network was trained on."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from tinyldm.diffusion.process import PROCESSES
from tinyldm.lookup import fit, lookup
from tinyldm.vendor_loaders.scheduler_classes import (
    BETA_SCHEDULES,
    DEFAULT_BETAS,
    DYNAMIC_FIELDS,
    FLOW_MATCH,
    OTHER_BETAS,
    OWN,
    PREDICTION_TYPES,
    TIME_SHIFT_TYPES,
)


class NamedProcess(NamedTuple):
    """The arguments of make_process, so that the process can be written to a file again, and what the network predicts."""

    name: str
    options: dict[str, Any]
    prediction: str


def read_process(config: dict) -> NamedProcess:
    """The process by name and the prediction: `scheduler.to_config(*read_process(config))` writes them again.

    ValueError for curves that make_process cannot make.
    """
    if config.get("_class_name") == OWN:
        return NamedProcess(config["process"], config["options"], config["prediction"])
    if config.get("_class_name") == FLOW_MATCH:
        return _flow_match_process(config)
    if config.get("use_dynamic_shifting"):
        raise ValueError(f"the scheduler {config.get('_class_name')} shifts its times by the size of the picture "
                         f"(use_dynamic_shifting): here only {FLOW_MATCH} can")
    predictions = {published: ours for ours, published in PREDICTION_TYPES.items()}
    prediction = lookup(predictions, config.get("prediction_type", "epsilon"), "prediction_type")
    if config.get("use_flow_sigmas", False) != (prediction == "flow"):
        raise ValueError(f"the scheduler has use_flow_sigmas={config.get('use_flow_sigmas', False)} with "
                         f"prediction_type {PREDICTION_TYPES[prediction]!r}: diffusers does not compute this pair")
    if prediction == "flow":
        return NamedProcess("flow", {"shift": config.get("flow_shift", 1.0)}, "flow")
    steps = fit(config.get("num_train_timesteps", 1000), int, "the scheduler has num_train_timesteps")
    zero_snr = {"zero_snr": True} if config.get("rescale_betas_zero_snr") else {}
    if betas := fit(config.get("trained_betas"), tuple[float, ...] | None, "the scheduler has trained_betas"):
        if len(betas) != steps:
            raise ValueError(f"the scheduler has {len(betas)} trained_betas for {steps} num_train_timesteps: "
                             "it needs one for each")
        return NamedProcess("betas", {"betas": list(betas), **zero_snr}, prediction)
    names = {published: ours for ours, published in BETA_SCHEDULES.items()}
    betas = OTHER_BETAS.get(config.get("_class_name"), DEFAULT_BETAS) | config
    name = lookup(names, betas["beta_schedule"], "beta_schedule")
    if not 1 < steps <= 100_000:
        raise ValueError(f"the scheduler has num_train_timesteps={steps}: use 2 to 100000, 1000 is usual")
    options = {"steps": steps}
    if name != "cosine":
        options |= {field: betas[field] for field in ("beta_start", "beta_end")}
    return NamedProcess(name, options | zero_snr, prediction)


def _flow_match_process(config: dict) -> NamedProcess:
    if not config.get("use_dynamic_shifting"):
        return NamedProcess("flow", {"shift": config.get("shift", 1.0)}, "flow")
    stated = {option: config[field] for option, field in DYNAMIC_FIELDS.items() if field in config}
    exponential = lookup(TIME_SHIFT_TYPES, config.get("time_shift_type", "exponential"), "time_shift_type")
    return NamedProcess("dynamic_flow", default_options("dynamic_flow") | stated | {"exponential": exponential}, "flow")


def default_options(process_name: str) -> dict[str, Any]:
    """The default of every option of a process, recorded so that a later change of a default leaves old models alone.
    Only what JSON can hold: a process that was registered from outside may have other defaults, or parameters without."""
    parameters = inspect.signature(PROCESSES[process_name]).parameters
    return {name: parameter.default for name, parameter in parameters.items()
            if parameter.default is None or isinstance(parameter.default, (bool, int, float, str, list, tuple))}
