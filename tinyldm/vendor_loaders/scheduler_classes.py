"""The scheduler classes of diffusers as a table: their habits, and what of their configs can be drawn here.

One row per sampler of ours. scheduler.py reads configs with it, and writes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tinyldm.diffusion.step import signal

_NONE: Mapping[str, Any] = MappingProxyType({})


class Published(NamedTuple):
    """A scheduler class of diffusers: its habits, and its defaults where a config is silent."""

    name: str
    spacing: str                          # its default timestep_spacing
    fields: Mapping[str, tuple] = _NONE   # its fields that change the picture: the values that can be drawn here
    solver: Mapping[str, tuple] = _NONE   # those that make it another solver, likewise
    writes: Mapping[str, Any] = _NONE     # what to_config adds, so that it draws as our sampler does
    linspace: str = "linspace"            # its linspace, as a name in grids.SCHEDULES
    drop_last: bool = False               # it spreads n + 1 times for leading and linspace
    start_at_sigma: bool = False          # it starts from sigma * eps, except for leading
    end: tuple[str, Any] = ("", True)     # the field that says where it ends, and its default
    karras: str = ""                      # its Karras sigmas: "ends" of the spaced times, "rounded" times, "": none
    unrounded: str = ""                   # a process with which even "rounded" does not round
    sigma_ends: tuple = ()                # its fields that move the ends of the Karras sigmas
    zero_snr: bool = True                 # whether it knows of zero terminal SNR
    alpha_floor: float = 0.0              # what it then puts for alpha = 0
    predictions: tuple = ("eps", "x0", "v")
    options: Callable[[str], dict] = lambda prediction: {}  # our sampler's keyword arguments for this prediction
    stand_in: str = ""                    # the sampler to write where this class cannot take the pair


BY_NOISE = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
_PIXELS = {"thresholding": (False,), "clip_sample": (False,)}
_NOT_CLIPPED = {"thresholding": False, "clip_sample": False}
_K = {"spacing": "linspace", "linspace": "linspace_unrounded", "start_at_sigma": True}  # what k-diffusion's four share
_MULTI = {"spacing": "linspace", "drop_last": True, "end": ("final_sigmas_type", "zero"), "karras": "rounded",
          "alpha_floor": 2.0**-12}  # and the two exponential multistep solvers

PUBLISHED = {  # by our sampler
    "ddim": Published("DDIMScheduler", "leading", _PIXELS, writes={"set_alpha_to_one": True, **_NOT_CLIPPED},
                      end=("set_alpha_to_one", True)),
    "ddpm": Published("DDPMScheduler", "leading",
                      {**_PIXELS, "variance_type": ("fixed_small", "fixed_small_log", None)},
                      writes={"variance_type": "fixed_small", **_NOT_CLIPPED}),
    "euler": Published("EulerDiscreteScheduler", **_K, karras="ends", sigma_ends=("sigma_min", "sigma_max"),
                       fields={"final_sigmas_type": ("zero",), "interpolation_type": ("linear",),
                               "timestep_type": ("discrete",)},
                       alpha_floor=2.0**-12),
    "euler_a": Published("EulerAncestralDiscreteScheduler", **_K, alpha_floor=2.0**-12, predictions=("eps", "v"),
                         stand_in="ddpm"),
    "heun": Published("HeunDiscreteScheduler", **_K, fields={"clip_sample": (False,)}, karras="ends",
                      writes={"clip_sample": False}, zero_snr=False, options=lambda prediction: {"scale": signal},
                      stand_in="dpmpp_2m"),
    "lms": Published("LMSDiscreteScheduler", **_K, karras="ends", zero_snr=False,
                     options=lambda prediction: {"scale": signal}, stand_in="dpmpp_2m"),
    "pndm": Published("PNDMScheduler", "leading", solver={"skip_prk_steps": (True,)},
                      writes={"set_alpha_to_one": True, "skip_prk_steps": True}, end=("set_alpha_to_one", False),
                      zero_snr=False, predictions=("eps", "v"), stand_in="ddim",
                      options=lambda prediction: {"along": "v"} if prediction == "v" else {}),
    "dpmpp_2m": Published("DPMSolverMultistepScheduler", **_MULTI, unrounded="cosine",
                          fields={"thresholding": (False,), "use_lu_lambdas": (False, None),
                                  "lambda_min_clipped": (-math.inf,)},
                          solver={"algorithm_type": ("dpmsolver++", "deis"), "solver_order": (2, 1),
                                  "solver_type": ("midpoint", "logrho", "bh1", "bh2")},
                          writes={"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}),
    "unipc": Published("UniPCMultistepScheduler", **_MULTI, sigma_ends=("sigma_min", "sigma_max"),
                       fields={"thresholding": (False,)},
                       solver={"solver_order": (2,), "solver_type": ("bh2", "midpoint", "heun", "logrho"),
                               "predict_x0": (True,), "lower_order_final": (True,), "disable_corrector": ([],),
                               "solver_p": (None,)},
                       writes={"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}),
}

# Samplers beside these, and whose habits they take. diffusers has the first as a setting of its class, SDE, and the second
# as a class that needs torchsde.
LIKE = {"dpmpp_2m_sde": "dpmpp_2m", "dpmpp_sde": "heun", "edm": "heun", "adaptive": "dpmpp_2m"}
SDE = {"algorithm_type": "sde-dpmsolver++"}

FLOW_FIELDS = {"final_sigmas_type": ("zero",), "num_train_timesteps": (1000,)} | dict.fromkeys(
    ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_dynamic_shifting",
     "shift_terminal", "invert_sigmas", "stochastic_sampling", "thresholding"), (False, None))

WHY = {  # fields that are refused, and why; those without a line here are of solvers
    "thresholding": "x0 is clamped for pixels, latents have no range",
    "clip_sample": "x0 is clamped for pixels, latents have no range",
    "variance_type": "ddpm here adds the posterior's variance, fixed_small",
    "final_sigmas_type": "this sampler ends at clean data here",
    "timestep_type": "the network is told t here, not log(sigma)",
    "num_train_timesteps": "the network of a flow is told 1000 t here",
    "stochastic_sampling": "a flow is walked without fresh noise here",
} | dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_karras_sigmas",
                   "lambda_min_clipped", "interpolation_type", "shift_terminal", "invert_sigmas"),
                  "there is no such schedule here")
