"""Latent consistency models: consistency distillation of the guided teacher, over few and large steps.

    f(x_t, t, w)  ->  f'(x_s, s, w),      x_s = one DDIM step of the teacher, guided by w, from x_t       (arXiv:2310.04378, Eq. 14-17)

t and s = t - 1 / levels are neighbours on a grid of 50 levels (k = 20 of a table's 1000: "skipping steps", Sec. 4.3), because the change
between neighbours of 1000 is too small to learn from. f' has averaged weights (decay 0.95), or the student's own beside an adapter
(LCM-LoRA, arXiv:2311.05556), which has no parameters to spare for averages.

w is `scale`, that of guidance.cfg (the paper's is that minus 1; 0 stands for the model's own). With `scale_to` it is drawn evenly between
the two, and the network is told it and learns all of them; from then on sample.py --cfg is that number.

Choices: the paper's c_skip and c_out, with a timestep_scaling of 10, are 0 and 1 at all but the cleanest few of the table's times: they
only make f(x, 0) = x, which the prediction does here (teacher.py). Its last target is the table's first entry; here it is clean data. The
distance is pseudo-Huber per number, c = 0.001, as in diffusers' scripts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyldm.config import Config
from tinyldm.diffusion.loss import LOSSES
from tinyldm.model import Model
from tinyldm.objectives.base import Networks, Turn
from tinyldm.objectives.denoising import DenoisingBatch
from tinyldm.objectives.teacher import TARGET, Distillation, ddim, own_options, with_times


class LCM(Distillation):
    options = dict(levels=50, scale=0.0, scale_to=0.0, ema=0.95, c=0.001)

    @classmethod
    def usual(cls, config: Config) -> dict[str, Any]:
        return dict(times="uniform", sampler="lcm", steps=4, **({} if cls.tells(config) else {"cfg": 1.0}))

    @classmethod
    def tells(cls, config: Config) -> tuple[str, ...]:
        return ("guidance",) if own_options(cls, config)["scale_to"] else ()

    @classmethod
    def begins_as(cls, model: Model, config: Config) -> Model:
        return with_times(model, own_options(cls, config)["levels"])

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        option = own_options(cls, config)
        if not (option["levels"] >= 2 and option["c"] > 0 and 0 <= option["ema"] < 1):
            raise ValueError(f"lcm options {option}: use at least 2 levels, a positive c, and 0 <= ema < 1")

    def __init__(self, config: Config, model: Model, trained: tuple[str, ...], teacher: Model):
        super().__init__(config, model, trained, teacher)
        self.told = bool(self.tells(config))
        if self.told and self.option["scale_to"] <= self.guidance:
            raise ValueError(f"lcm option scale_to={self.option['scale_to']:g}: use more than the smallest scale, {self.guidance:g}, or "
                             "leave it out")

    def further(self, random: torch.Generator, shape: torch.Size) -> dict[str, Tensor]:
        return {"scale": torch.rand(shape[0], generator=random)}

    def scale(self, batch: DenoisingBatch) -> Tensor:
        """The guidance of each sample, [b]."""
        low = self.guidance
        return low + ((self.option["scale_to"] or low) - low) * batch.own["scale"]

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        levels, scale = self.option["levels"], self.scale(batch)
        index = (batch.t * levels).floor()                              # of the lower level
        # Just below the end of its interval a time is the index that the paper's table has there.
        now, nxt = (self.level(i / levels * (1 - 2**-20), batch.x0) for i in (index + 1, index))
        x = now.alpha * batch.x0 + now.sigma * batch.eps
        x_nxt = ddim(x, self.teach(x, now, batch, scale.view(-1, 1, 1, 1)), now, nxt)
        cond = self.cond(batch, **({"guidance": scale} if self.told else {}))
        with torch.no_grad():
            wanted = self.f(networks.get(TARGET, networks["net"]), x_nxt, nxt, cond)
        error = self.f(networks["net"], x, now, cond) - wanted
        losses = LOSSES["huber"](error, self.option["c"]).flatten(1).mean(1) / (2 * self.option["c"])
        return batch.weighted(losses)
