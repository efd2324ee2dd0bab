"""Progressive distillation: one step of the student learns two steps of the teacher, and becomes the teacher of half as many steps.

With DDIM's steps (arXiv:2010.02502, Eq. 12) from t over t' = t - 1 / 2N to t'' = t - 1 / N, the teacher comes from x_t to x''. One DDIM
step of a student with guess g comes to

    alpha'' g + sigma'' (x_t - alpha g) / sigma,   which is x'' for   g = (x'' - k x_t) / (alpha'' - k alpha),   k = sigma'' / sigma

(arXiv:2202.00512, Alg. 2 and App. G). That is the student's target, as a guess of x0, with the weight max(SNR, 1) of its square, which the
paper calls truncated: the larger of the squared errors in x0 and eps. It is 1, not 0, at pure noise, where all drawing begins. There a
prediction of eps has no x0: v, flow or x0 have (Sec. 4).

`rounds` are the student's numbers of steps, equal parts of the training. The paper lets the learning rate fall to 0 in every round; here it
falls at the end of the training alone. `scale` guides the first teacher, so that all students draw guided pictures without guidance
(arXiv:2210.03142 does that in a round of its own, guided.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tinyldm.config import Config
from tinyldm.diffusion.process import Discrete, Level
from tinyldm.model import Model
from tinyldm.objectives.base import Networks, Turn
from tinyldm.objectives.denoising import DenoisingBatch
from tinyldm.objectives.teacher import TEACHER, Distillation, ddim, own_options
from tinyldm.vendor_loaders.scheduler import to_config
from tinyldm.vendor_loaders.scheduler_process import read_process


class Promoted(nn.Module):
    """The teacher of a round: in the first one that of the run, later the student of the round before."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.register_buffer("round", torch.tensor(0))

    def forward(self, *inputs: Any) -> Tensor:
        return self.net(*inputs)


class Progressive(Distillation):
    boundary = False
    options = dict(rounds=(8, 4, 2, 1), scale=0.0)          # scale 0: that of the teacher
    saved = (TEACHER,)

    def __init__(self, config: Config, model: Model, trained: tuple[str, ...], teacher: Model):
        super().__init__(config, model, trained, teacher)
        self.rounds, self.round = rounds(config), 0
        self.networks[TEACHER] = Promoted(self.networks[TEACHER])

    @classmethod
    def usual(cls, config: Config) -> dict[str, Any]:
        return dict(times="uniform", sampler="ddim", steps=rounds(config)[-1], cfg=1.0)

    @classmethod
    def begins_as(cls, model: Model, config: Config) -> Model:
        """Of a published model on a table, with DDIM's grid from the noisiest time to clean data, on which the student learns its steps."""
        if not isinstance(model.process, Discrete):
            return model
        process, options, prediction = read_process(model.scheduler)
        learned = model.net.config.out_channels == 2 * model.vae.config.latent_channels
        scheduler = to_config(process, options, prediction, "ddim", learned_variance=learned)
        return replace(model, scheduler=scheduler, defaults={name: value for name, value in model.defaults.items() if name != "schedule"})

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        steps = rounds(config)
        if not all(isinstance(n, int) and n >= 1 for n in steps) or any(a != 2 * b for a, b in zip(steps, steps[1:])):
            raise ValueError(f"progressive option rounds={steps}: each number of steps is half of the one before, as in rounds=8,4,2,1")
        if config.objective.prediction == "eps":
            raise ValueError("--objective progressive begins at pure noise, where a prediction of eps has no picture: it needs v, flow or "
                             "x0")
        if config.finetune.adapts:
            raise ValueError("--objective progressive makes teachers of students, which an adapter is not: leave out --finetune lora")

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        # A run that is made longer is less far on, but its teacher of earlier rounds is gone.
        current = max(min(int(progress * len(self.rounds)), len(self.rounds) - 1), int(self.networks[TEACHER].round))
        self.promote(current)
        n = self.rounds[current]
        t = ((batch.t * n).floor() + 1) / n
        now, middle, end = (self.level(each * (1 - 2**-20), batch.x0) for each in (t, t - 1 / (2 * n), t - 1 / n))
        x = now.alpha * batch.x0 + now.sigma * batch.eps
        target = two_steps(lambda x, at: self.teach(x, at, batch, self.scale(current)), x, now, middle, end)
        error = self.f(networks["net"], x, now, self.cond(batch)) - target
        losses = (truncated_snr(now) * error.square()).flatten(1).mean(1)
        return batch.weighted(losses)

    def scale(self, current: int) -> float:
        return self.guidance if current == 0 else 1.0

    @torch.no_grad()
    def promote(self, current: int) -> None:
        """At the first step of a round: the student becomes the teacher."""
        teacher = self.networks[TEACHER]
        if current > int(teacher.round):
            for own, new in zip(teacher.net.parameters(), self.model.net.parameters(), strict=True):
                own.copy_(new)
            teacher.round.fill_(current)


def rounds(config: Config) -> tuple[int, ...]:
    found = own_options(Progressive, config)["rounds"]
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def two_steps(denoise, x: Tensor, now: Level, middle: Level, end: Level) -> Tensor:
    """The guess of x0 [b, c, h, w] with which one DDIM step from now to end comes to where two of `denoise` come, by way of middle."""
    half = ddim(x, denoise(x, now), now, middle)
    whole = ddim(half, denoise(half, middle), middle, end)
    ratio = end.sigma / now.sigma
    return (whole - ratio * x) / (end.alpha - ratio * now.alpha)


def truncated_snr(at: Level) -> Tensor:
    """max(alpha^2 / sigma^2, 1), [b, 1, 1, 1]: the weight of squared errors in x0. Needs sigma > 0."""
    return (at.alpha / at.sigma).square().clamp(min=1)
