"""Consistency: a network that answers with the same x0 everywhere on a curve draws it in one call.

f(x, t), the network's guess of x0, is x itself at t = 0 (teacher.py). If it also is constant along the curve,

    f(x_t, t) = f(x_s, s)      for neighbours s < t on one curve,                                  (arXiv:2303.01469, Sec. 3)

then f(x_t, t) is the end of the curve. The loss is the distance of both sides; the right one is a constant for gradients. Where x_s
comes from is the only difference between the methods:

    distillation   one step of the teacher's sampler from x_t                                      (arXiv:2303.01469, Eq. 7)
    training       alpha_s x0 + sigma_s eps, with the x0 and eps of x_t: E[eps - x0 | x_t] is the curve's direction, so that its mean
                   is that step, up to the square of its length                                    (Eq. 9)

`schedule` pairs the times. Both schedules are stated in rho = sigma / alpha, EDM's sigma, so they mean the same levels on any process:

    ect   s follows t by rho_s = rho_t (1 - n(rho_t) / q^stage), n = 1 + k sigmoid(-b rho), which begins as the diffusion loss (s = 0)
          and comes closer in `stages` stages                                                      (arXiv:2406.14548, Eq. 17-18)
    ict   rho_s and rho_t are neighbours on Karras' grid of N levels, of the interval into which the drawn time falls; N doubles from s0
          to s1                                                                                    (arXiv:2310.14189, Eq. 6 and 8-9)

The loss is the pseudo-Huber distance over rho_t - rho_s. In ECT's paper c is 0; in iCT's 0.00054, of root mean squares as here. Where the
papers leave a choice: stages are equal fractions of the training, so the last is the finest for 1 / stages of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tinyldm.config import Config
from tinyldm.diffusion.process import Level, find_t
from tinyldm.lookup import lookup
from tinyldm.objectives.base import Networks, Turn
from tinyldm.objectives.denoising import DenoisingBatch
from tinyldm.objectives.teacher import TARGET, Distillation, ddim, heun, own_options, pseudo_huber

SMALLEST, LARGEST, RHO = 0.002, 80.0, 7.0       # of ict's grid (arXiv:2206.00364, Eq. 5)


def ect(rho: Tensor, progress: float, option: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(rho_t, rho_s) [b], when this fraction of the training is over."""
    stage = min(int(progress * option["stages"]), option["stages"] - 1) + 1
    return rho, rho * (1 - (1 + option["k"] * torch.sigmoid(-option["b"] * rho)) / option["q"] ** stage).clamp(min=0)


def ict(rho: Tensor, progress: float, option: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The same, of neighbours on the grid."""
    first, last = option["s0"], option["s1"]
    doublings = int(math.log2(last / first)) + 1
    n = min(first * 2 ** int(progress * doublings), last)                       # intervals
    low, high = SMALLEST ** (1 / RHO), LARGEST ** (1 / RHO)
    index = ((rho.clamp(SMALLEST, LARGEST) ** (1 / RHO) - low) / (high - low) * n).floor().clamp(max=n - 1)
    at = lambda index: (low + index / n * (high - low)) ** RHO
    return at(index + 1), at(index)


PAIRS: dict[str, Callable[[Tensor, float, Mapping[str, Any]], tuple[Tensor, Tensor]]] = {"ect": ect, "ict": ict}
SOLVERS = {"heun": heun, "ddim": lambda denoise, x, now, nxt: ddim(x, denoise(x, now), now, nxt)}


class Consistency(Distillation):
    """Consistency distillation (distil=true, with the teacher's guidance `scale`) and consistency training."""

    options = dict(schedule="ect", distil=False, scale=1.0, solver="heun", ema=0.0, c=0.0, q=2.0, k=8.0, b=1.0, stages=8, s0=10, s1=1280)

    @classmethod
    def usual(cls, config: Config) -> dict[str, Any]:
        return dict(times="log_normal", mean=-1.1, scale=2.0, sampler="lcm", steps=2, cfg=1.0)      # P_mean and P_std of both papers

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        option = own_options(cls, config)
        lookup(PAIRS, option["schedule"], "consistency option schedule"), lookup(SOLVERS, option["solver"], "consistency option solver")
        if not (option["q"] > 1 and option["stages"] >= 1 and 1 <= option["s0"] <= option["s1"] and 0 <= option["ema"] < 1):
            raise ValueError(f"consistency options q={option['q']} stages={option['stages']} s0={option['s0']} s1={option['s1']} "
                             f"ema={option['ema']}: use q above 1, at least one stage, 1 <= s0 <= s1, and 0 <= ema < 1")

    @property
    def guides(self) -> bool:
        return self.option["distil"] and self.guidance != 1

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        process, cond = self.process(batch.x0), self.cond(batch)
        drawn = process(batch.t.double())
        rho_t, rho_s = PAIRS[self.option["schedule"]]((drawn.sigma / drawn.alpha).flatten().clamp(max=1e6), progress, self.option)
        now, nxt = (self.level(find_t(process, rho) * (rho > 0), batch.x0) for rho in (rho_t, rho_s))
        x = now.alpha * batch.x0 + now.sigma * batch.eps
        with torch.no_grad():
            x_nxt = self.teacher_step(x, now, nxt, batch) if self.option["distil"] else nxt.alpha * batch.x0 + nxt.sigma * batch.eps
            wanted = self.f(networks.get(TARGET, networks["net"]), x_nxt, nxt, cond)
        losses = pseudo_huber(self.f(networks["net"], x, now, cond) - wanted, self.option["c"])
        weight = 1 / (rho_t - rho_s).clamp(min=1e-6)
        return batch.weighted(weight.float() * losses)

    def teacher_step(self, x: Tensor, now: Level, nxt: Level, batch: DenoisingBatch) -> Tensor:
        denoise = lambda x, at: self.teach(x, at, batch, self.guidance)
        return SOLVERS[self.option["solver"]](denoise, x, now, nxt)
