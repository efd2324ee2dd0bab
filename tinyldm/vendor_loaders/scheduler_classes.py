"""The scheduler classes of diffusers as a table: their defaults, their conventions, and which of their settings work here.

PUBLISHED has one row per sampler that has a class of its own there; USES_ROW_OF names a row for each of the other samplers,
and OWN_PROCESSES has the processes for which diffusers has no scheduler. scheduler.py reads and writes configs by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tinyldm.diffusion.step import signal

_EMPTY: Mapping[str, Any] = MappingProxyType({})

OWN = "TinyLDMScheduler"

# Our names -> those of diffusers.
BETA_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "flow": "flow_prediction"}

FLOWS = ("flow", "dynamic_flow")
PUBLISHED_PROCESSES = (*BETA_SCHEDULES, "betas", *FLOWS)  # the processes for which diffusers has schedulers

# The betas of a config that states none, by the class that has others than most.
DEFAULT_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
OTHER_BETAS = {"HeunDiscreteScheduler": {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012},
               "LCMScheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}}


class Published(NamedTuple):
    """A scheduler class of diffusers. In picture_fields and solver_fields, each field of its config comes with the values
    that work here, the usual one first: a config that lacks the field means that one, unless `unstated` says otherwise."""

    name: str
    spacing: str                                 # the timestep_spacing of a config that states none
    picture_fields: Mapping[str, tuple] = _EMPTY  # fields that change the picture, whichever sampler draws with this row
    solver_fields: Mapping[str, tuple] = _EMPTY  # fields that turn the class into another solver
    unstated: Mapping[str, Any] = _EMPTY         # the class's own defaults that do not work here, for configs that lack the field
    variant: Callable[[Mapping], dict] = lambda config: {}  # keyword arguments of our sampler for its solver_fields
    writes: Mapping[str, Any] = _EMPTY           # fields that make the class draw as our sampler does
    linspace: str = "linspace"                   # the name in grids.SCHEDULES of what this class calls linspace
    drop_last: bool = False                      # for leading and linspace, the class spreads n + 1 times and drops the last
    start_at_sigma: bool = False                 # the class starts from sigma * eps, except for leading
    end_field: tuple[str, Any] = ("", True)      # the field that says at which level sampling ends, and its default
    karras: str = ""                             # Karras sigmas: "ends" of the spaced times, "rounded" times, "" for none
    lu_lambdas: bool = False                     # whether the class has use_lu_lambdas: exponential sigmas at rounded times
    unrounded_process: str = ""                  # the process on which the times stay unrounded despite karras="rounded"
    sigma_ends: tuple = ()                       # fields that move the ends of the Karras sigmas
    zero_snr: bool = True                        # whether the class supports zero terminal SNR
    alpha_floor: float = 0.0                     # what the class puts for alpha = 0 at zero terminal SNR
    predictions: tuple = ("eps", "x0", "v")
    options: Callable[[str], dict] = lambda prediction: {}  # keyword arguments of our sampler for this prediction
    schedule: str = ""                           # the name in grids.SCHEDULES of the class's only grid; "": its spacing decides
    fallback: str = ""                           # the sampler whose class is written where this one lacks the prediction or zero_snr


# The config field that switches a schedule on, and the name of that schedule in grids.SCHEDULES.
SIGMA_SCHEDULES = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}

_UNCLIPPED_ONLY = {"thresholding": (False,), "clip_sample": (False,)}
_UNSTATED_CLIPS = {"clip_sample": True}
_WRITE_UNCLIPPED = {"thresholding": False, "clip_sample": False}
# what the four samplers from k-diffusion have in common
_K_DIFFUSION = {"spacing": "linspace", "linspace": "linspace_unrounded", "start_at_sigma": True}
# what the two exponential multistep solvers have in common
_EXPONENTIAL = {"spacing": "linspace", "drop_last": True, "end_field": ("final_sigmas_type", "zero"), "karras": "rounded",
                "alpha_floor": 2.0**-12}


def _dpmpp_variant(config: Mapping) -> dict:
    """diffusers ends in a step of first order in three cases: euler_at_final; lower_order_final and fewer than 15 steps; a step to
    clean data, which is of first order in any case."""
    order = {"lower_order_final": True} if config.get("euler_at_final") else (
        {} if config.get("lower_order_final", True) else {"lower_order_final": False})
    return order | ({"solver_type": "heun"} if config.get("solver_type") == "heun" else {})


def _unipc_variant(config: Mapping) -> dict:
    ours = {"lower_order_final": True, "solver_type": "bh2", "disable_corrector": []}   # other names of types mean bh2
    stated = {field: config.get(field, value) for field, value in ours.items()}
    return {field: value for field, value in stated.items()
            if value != ours[field] and (field != "solver_type" or value == "bh1")}


PUBLISHED = {  # by the name of our sampler
    "ddim": Published("DDIMScheduler", "leading", _UNCLIPPED_ONLY, unstated=_UNSTATED_CLIPS,
                      writes={"set_alpha_to_one": True, **_WRITE_UNCLIPPED}, end_field=("set_alpha_to_one", True)),
    "ddpm": Published("DDPMScheduler", "leading",
                      {**_UNCLIPPED_ONLY, "variance_type": ("fixed_small", "fixed_small_log", None)}, unstated=_UNSTATED_CLIPS,
                      writes={"variance_type": "fixed_small", **_WRITE_UNCLIPPED}),
    "euler": Published("EulerDiscreteScheduler", **_K_DIFFUSION, karras="ends", sigma_ends=("sigma_min", "sigma_max"),
                       picture_fields={"final_sigmas_type": ("zero",), "interpolation_type": ("linear",),
                                       "timestep_type": ("discrete",)},
                       alpha_floor=2.0**-12),
    "euler_a": Published("EulerAncestralDiscreteScheduler", **_K_DIFFUSION, alpha_floor=2.0**-12, predictions=("eps", "v"),
                         fallback="ddpm"),
    # Its c_skip and c_out, with a timestep_scaling of 10, differ from 0 and 1 by less than 1e-5 at all times of its grid.
    "lcm": Published("LCMScheduler", "leading", {**_UNCLIPPED_ONLY, "timestep_scaling": (10.0,)},
                     schedule="skipping", writes=_WRITE_UNCLIPPED),
    "heun": Published("HeunDiscreteScheduler", **_K_DIFFUSION, picture_fields={"clip_sample": (False,)}, karras="ends",
                      writes={"clip_sample": False}, zero_snr=False, options=lambda prediction: {"scale": signal},
                      fallback="dpmpp_2m"),
    "lms": Published("LMSDiscreteScheduler", **_K_DIFFUSION, karras="ends", zero_snr=False,
                     options=lambda prediction: {"scale": signal}, fallback="dpmpp_2m"),
    "pndm": Published("PNDMScheduler", "leading", solver_fields={"skip_prk_steps": (True,)}, unstated={"skip_prk_steps": False},
                      writes={"set_alpha_to_one": True, "skip_prk_steps": True}, end_field=("set_alpha_to_one", False),
                      zero_snr=False, predictions=("eps", "v"), fallback="ddim",
                      options=lambda prediction: {"along": "v"} if prediction == "v" else {}),
    "dpmpp_2m": Published("DPMSolverMultistepScheduler", **_EXPONENTIAL, unrounded_process="cosine",
                          picture_fields={"thresholding": (False,), "lambda_min_clipped": (-math.inf,)},
                          solver_fields={"algorithm_type": ("dpmsolver++", "deis"), "solver_order": (2, 1),
                                         "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2")},
                          variant=_dpmpp_variant, lu_lambdas=True,
                          writes={"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}),
    "unipc": Published("UniPCMultistepScheduler", **_EXPONENTIAL, sigma_ends=("sigma_min", "sigma_max"),
                       picture_fields={"thresholding": (False,)},
                       solver_fields={"solver_order": (2,), "solver_type": ("bh2", "bh1", "midpoint", "heun", "logrho"),
                                      "predict_x0": (True,), "solver_p": (None,)},
                       variant=_unipc_variant,
                       writes={"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}),
}

# Samplers without a row in PUBLISHED, and the sampler whose row they use. diffusers has dpmpp_2m_sde as a setting of
# DPMSolverMultistepScheduler (SDE_FIELDS) and dpmpp_sde as a class that needs torchsde; it has none that is edm, adaptive, or a
# sampler with Langevin steps for pipelines that draw text-to-image.
USES_ROW_OF = {"dpmpp_2m_sde": "dpmpp_2m", "dpmpp_sde": "heun", "edm": "heun", "adaptive": "dpmpp_2m",
               "annealed_langevin": "ddpm", "predictor_corrector": "ddpm"}
SDE_FIELDS = {"algorithm_type": "sde-dpmsolver++"}
SDE_SAMPLERS = ("dpmpp_2m_sde", "dpmpp_sde")  # both are written as DPMSolverMultistepScheduler with SDE_FIELDS

# Fields of a scheduler config for a flow, with the values that work here.
FLOW_FIELDS = {"final_sigmas_type": ("zero",), "num_train_timesteps": (1000,)} | dict.fromkeys(
    ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "shift_terminal", "invert_sigmas",
     "stochastic_sampling", "thresholding"), (False, None))

# The class of the pipelines of SD 3 and FLUX. With use_dynamic_shifting, it has an option of dynamic_flow in the field:
FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"
DYNAMIC_FIELDS = {"base_shift": "base_shift", "max_shift": "max_shift", "base_tokens": "base_image_seq_len",
                  "max_tokens": "max_image_seq_len"}
TIME_SHIFT_TYPES = {"exponential": True, "linear": False}       # time_shift_type -> `exponential` of dynamic_flow

# Why another value of a field is refused.
_CLAMPS = "clamping x0 is for pixels, and latents have no fixed range"
_OTHER_SOLVER = "there is no such solver here; name a sampler to draw with another one"
REFUSAL_REASONS = {
    "thresholding": _CLAMPS,
    "clip_sample": _CLAMPS,
    "timestep_scaling": "here a consistency model's guess is not mixed with its input",
    "variance_type": "ddpm here adds the variance of the posterior, fixed_small",
    "final_sigmas_type": "here this sampler always ends at clean data",
    "timestep_type": "here the network receives t, not log(sigma)",
    "num_train_timesteps": "here the network of a flow receives 1000 t",
    "stochastic_sampling": "here a flow is sampled without fresh noise",
    "lambda_min_clipped": "here a grid starts at the end of the table, it is not cut",
    "skip_prk_steps": "a Runge-Kutta start calls the network between the grid's times; --sampler pndm draws without it",
    "algorithm_type": "the solvers here step with x0, as dpmsolver++ does, not with eps; name a sampler to draw with another one",
    "predict_x0": "the solvers here step with x0, not with eps; name a sampler to draw with another one",
} | dict.fromkeys(("solver_order", "solver_type", "solver_p"), _OTHER_SOLVER) | dict.fromkeys(
    ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_karras_sigmas", "interpolation_type", "shift_terminal",
     "invert_sigmas"), "there is no such schedule here")


class OwnProcess(NamedTuple):
    """How to sample on a process for which diffusers has no scheduler. The defaults suit any curve."""

    schedule: str = "normal"      # a name in grids.SCHEDULES
    start_at_sigma: bool = True   # start from sigma * eps, which is eps where sigma ends at 1


# The continuous processes. One that was registered from outside samples by the defaults of OwnProcess.
OWN_PROCESSES = {"vp": OwnProcess(start_at_sigma=False), "ve": OwnProcess(), "edm": OwnProcess("karras"),
                 "as_flow": OwnProcess(start_at_sigma=False)}
