"""Mean flow: a network that is asked for the mean velocity on a way, not for the velocity at a point, takes the way in one step.

On the straight line of a flow, x_t = (1 - t) x0 + t eps, the velocity is v = dx / dt = E[eps - x0 | x_t], and the mean velocity from t to r

    u(x_t, r, t) = 1 / (t - r)  integral from r to t of v(x_tau, tau) dtau,        x_r = x_t - (t - r) u

(arXiv:2505.13447, Eq. 3 and 12). Differentiating (t - r) u by t along the curve gives u + (t - r) du/dt = v, in which the integral is gone:

    u = v - (t - r) du/dt,     du/dt = (v d/dx + d/dt) u,  a derivative in forward mode                       (Eq. 6 and 8)

The right side, a constant for gradients, is the target of u. At r = t it is v, and the loss is that of flows.

The network is told the way t - r as one more number beside the time (TimeEmbedding, "elapsed", from 0 on), which has no effect before it is
trained: so it begins as the teacher, whose answer is right for t = r. (The paper embeds t and t - r by two networks and adds them, which is
the same place.) t is sigma, the position on the line, whatever the process's shift.

v is eps - x0 in the paper; with distil=true it is the teacher's guided velocity, of which eps - x0 is a noisy sample. Guidance inside: the
velocity is scale v + (1 - scale) u(x_t, t, t, "") (Eq. 19 with kappa = 0, scale its omega); with distil, the teacher's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyldm.config import Config
from tinyldm.diffusion.process import Flow, Level, at_size
from tinyldm.model import Model
from tinyldm.objectives.base import Networks, Turn
from tinyldm.objectives.denoising import DenoisingBatch, process_of
from tinyldm.objectives.teacher import Distillation, derivative, own_options, single, told_cond


class MeanFlow(Distillation):
    options = dict(distil=True, scale=0.0, apart=0.75, power=0.75, c=1e-3)      # scale 0: the teacher's; apart: fraction with r < t

    @classmethod
    def usual(cls, config: Config) -> dict[str, Any]:
        return dict(times="logit_normal", mean=-0.4, scale=1.0, sampler="euler", steps=1, cfg=1.0)

    @classmethod
    def tells(cls, config: Config) -> tuple[str, ...]:
        return ("elapsed",)

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if config.objective.prediction != "flow" or not isinstance(at_size(process_of(config.objective)), Flow):
            raise ValueError("--objective mean_flow is for the straight line: it needs a model of process and prediction flow")
        option = own_options(cls, config)
        if option["scale"] not in (0, 1) and not config.finetune.kind and not config.text.weights:
            raise ValueError("mean_flow option scale compares the answers to a caption and to none, encoded once: leave it out, or name "
                             "pretrained text encoders with --text-weights, since those that are trained along change")
        if not (0 <= option["apart"] <= 1 and option["power"] >= 0 and option["c"] > 0):
            raise ValueError(f"mean_flow options {option}: use apart between 0 and 1, power of at least 0, a positive c")

    def further(self, random: torch.Generator, shape: torch.Size) -> dict[str, Tensor]:
        other = torch.randn(shape[0], generator=random)
        return {"other": other, "apart": torch.rand(shape[0], generator=random)}

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        t = self.level(batch.t, batch.x0).sigma.flatten()
        other = torch.sigmoid(self.mean + self.spread * batch.own["other"])
        other = self.level(other, batch.x0).sigma.flatten()
        r = torch.where(batch.own["apart"] < self.option["apart"], torch.minimum(t, other), t)
        t = torch.where(batch.own["apart"] < self.option["apart"], torch.maximum(t, other), t)
        at = line(t)
        x = at.alpha * batch.x0 + at.sigma * batch.eps
        v, cond = self.velocity(networks, x, at, batch), self.cond(batch)
        ask = lambda net, cond: lambda x, t, way: net(x, 1000 * t, told_cond(cond, batch, {"elapsed": way}))
        one = torch.ones_like(t)
        _, change = derivative(ask(self.model.net, single(cond)), (x, t, t - r), (v, one, one))
        error = ask(networks["net"], cond)(x, t, t - r).to(x.dtype) - (v - (t - r).view(-1, 1, 1, 1) * change)
        square = error.square().flatten(1).mean(1)
        losses = square / (square.detach() + self.option["c"]) ** self.option["power"]          # Eq. 22
        return batch.weighted(losses)

    @torch.no_grad()
    def velocity(self, networks: Networks, x: Tensor, at: Level, batch: DenoisingBatch) -> Tensor:
        """dx / dt of the guided curve at x_t, [b, c, h, w]."""
        if self.option["distil"]:
            return (x - self.teach(x, at, batch, self.guidance)) / at.sigma
        v = batch.eps - batch.x0
        if self.guidance == 1:
            return v
        told = {"elapsed": torch.zeros_like(at.t)}
        return self.guidance * v + (1 - self.guidance) * networks["net"](x, at.t, told_cond(batch.empty, batch, told)).to(x.dtype)

    def begin_phase(self, config: Config, model: Model) -> None:
        super().begin_phase(config, model)
        chosen = config.objective
        self.mean = -0.4 if chosen.times_mean is None else chosen.times_mean
        self.spread = 1.0 if chosen.times_scale is None else chosen.times_scale


def line(t: Tensor) -> Level:
    """The level at t [b] of the line without a shift."""
    sigma = t.view(-1, 1, 1, 1)
    return Level(1000 * t, 1 - sigma, sigma)
