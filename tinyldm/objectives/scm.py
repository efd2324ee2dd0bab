"""Continuous consistency: the step between the two neighbours of consistency.py goes to 0, and their difference becomes a derivative.

For a step of length d, the gradient of d(f(x_t, t), f(x_s, s)) / d tends to that of the inner product of f with df/dt, taken along the
curve (arXiv:2303.01469, Theorem 5): no grid, and no error of its steps. arXiv:2410.11081 makes it stable on the arc

    y = cos(phi) x0 + sin(phi) eps,     F(y, phi) = cos(phi) eps^ - sin(phi) x0^,     f = cos(phi) y - sin(phi) F        (Eq. 4-5)

in which F is the prediction v. Any curve is that arc, seen through y = x_t / r, r = sqrt(alpha^2 + sigma^2), tan(phi) = sigma / alpha, and
any network, which says x0^ and eps^ of x_t (teacher.both), answers F: so nothing is trained again. For a flow this is SANA-Sprint's
transformation (arXiv:2503.09641, Eq. 9-12). With F~ for F without gradients and v = dy / dphi, the loss is

    | F - F~ - g / (|g| + c) |^2,     g = cos(phi) df~/dphi = cos(phi)^2 (v - F~) - w sin(phi) cos(phi) (y + dF~/dphi)   (Eq. 8, Alg. 1)

v is the teacher's guided prediction (sCD, distil=true) or cos(phi) eps - sin(phi) x0 of the batch (sCT). w warms up from 0 to 1, during
which the student is a diffusion model of v. dF~/dphi is a derivative in forward mode along the curve: of F as a function of x_t and the
process's t, with dx/dphi = (alpha' x0^ + sigma' eps^) dt/dphi, and dphi/dt = (alpha sigma' - sigma alpha') / r^2.

|g| is a root mean square over a picture, as in the paper's code. Its network of adaptive weights is left out: after the division
by |g| + c all levels have losses of about one size.

gan > 0 adds SANA-Sprint's latent adversarial term (LADD, arXiv:2403.12015) with this weight, in the paper 0.5 (arXiv:2503.09641, Sec. 3.3):
a head D on features of the frozen teacher tells what the student guesses from data, both noised to a level s and with their caption,

    student    -D(teacher(noised f(x_t, t)))
    head       (max(0, 1 - D(teacher(noised x0))) + max(0, 1 + D(teacher(noised f(x_t, t))))) / 2                  (hinge)

As in the authors' code, t is the noisiest time with probability `last`, so that one step gets sharp, s has a log-normal sigma / alpha, and
the head learns in turns of its own. Choices: one head on the middle block in place of four; x0 and the guess are noised by the same s and
noise; pictures with another's caption are no third kind, because whose it is would depend on how a batch is divided among processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyldm.config import Config
from tinyldm.diffusion.loss import sample_t
from tinyldm.diffusion.prediction import Network
from tinyldm.diffusion.process import Discrete, Level, Process, at_size, input_scale
from tinyldm.model import Model
from tinyldm.models.layers import Cond
from tinyldm.objectives.adversarial import KINDS
from tinyldm.objectives.base import Networks, Turn
from tinyldm.objectives.denoising import DenoisingBatch, process_of
from tinyldm.objectives.feature_head import features_of, make_head
from tinyldm.objectives.teacher import TEACHER, Distillation, both, derivative, own_options, single

HEAD, HINGE = "head", KINDS["hinge"]
JUDGED_MEAN, JUDGED_STD = -0.6, 1.0         # of log(sigma / alpha) at which the head judges


class SCM(Distillation):
    # scale 0: the teacher's; warmup: a fraction of the training
    options = dict(distil=True, scale=0.0, c=0.1, warmup=0.2, gan=0.0, last=0.5)

    def __init__(self, config: Config, model: Model, trained: tuple[str, ...], teacher: Model | None = None):
        super().__init__(config, model, trained, teacher)
        if self.option["gan"]:
            self.networks, self.saved = self.networks | {HEAD: make_head(model, self.encode(self.empty[None], model.device))}, (HEAD,)
            self.turns = Turn("distillation", trained), Turn(HEAD, (HEAD,))

    @classmethod
    def usual(cls, config: Config) -> dict[str, Any]:
        return dict(times="log_normal", mean=-1.0, scale=1.4, sampler="lcm", steps=2, cfg=1.0)

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if isinstance(at_size(process_of(config.objective)), Discrete):
            raise ValueError("--objective scm differentiates by time, which a table of levels has not: it needs a model of process flow, "
                             "vp, ve or edm")
        if config.finetune.adapts and config.run.dtype != "fp32":
            raise ValueError("--objective scm differentiates in float32, which weights beside an adapter need not be: add --dtype fp32")
        option = own_options(cls, config)
        if not (option["c"] > 0 and 0 <= option["warmup"] < 1 and option["gan"] >= 0 and 0 <= option["last"] <= 1):
            raise ValueError(f"scm options {option}: use a positive c, 0 <= warmup < 1, gan of at least 0, 0 <= last <= 1")
        if option["gan"] and not option["distil"]:
            raise ValueError("scm option gan judges by the features of a teacher: leave out gan or distil=false")

    def further(self, random: torch.Generator, shape: torch.Size) -> dict[str, Tensor]:
        if not self.option["gan"]:
            return {}
        process = self.process(torch.empty(shape, device="meta"))
        return {"last": torch.rand(shape[0], generator=random), "judged_eps": torch.randn(shape, generator=random),
                "judged_t": sample_t("log_normal", shape[0], random, JUDGED_MEAN, JUDGED_STD, process)}

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        process, cond, t = self.process(batch.x0), self.cond(batch), batch.t.clamp(1e-4, 1 - 1e-4)
        if turn.name == HEAD:
            return batch.weighted(self.head_losses(networks, batch, cond))
        now = self.level(t, batch.x0)
        x, scale = now.alpha * batch.x0 + now.sigma * batch.eps, self.guidance
        if self.option["distil"]:
            x0 = self.teach(x, now, batch, scale)
            ends = x0, (x - now.alpha * x0) / now.sigma
        else:
            ends = batch.x0, batch.eps
        warm = min(1.0, progress / self.option["warmup"]) if self.option["warmup"] else 1.0
        g = tangent(self.model.net, process, self.kind, x, t, single(cond), ends, warm)
        g = g / (g.square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1) + self.option["c"])
        answer = on_arc(networks["net"], self.kind, x, now, cond)
        losses = (answer - answer.detach() - g).square().flatten(1).mean(1)
        if self.option["gan"]:
            losses = losses + self.option["gan"] * HINGE.generator(self.judge(networks, self.guessed(networks, batch, cond), batch, cond))
        return batch.weighted(losses)

    def guessed(self, networks: Networks, batch: DenoisingBatch, cond: Cond) -> Tensor:
        """What the student guesses of x0 [b, c, h, w], of some samples at the noisiest level, as when the first step is drawn."""
        at = self.level(batch.t.masked_fill(batch.own["last"] < self.option["last"], 1.0).clamp(1e-4, 1 - 2**-20), batch.x0)
        return self.f(networks["net"], at.alpha * batch.x0 + at.sigma * batch.eps, at, cond)

    def judge(self, networks: Networks, x0: Tensor, batch: DenoisingBatch, cond: Cond) -> Tensor:
        """The head's logits [b] of pictures [b, c, h, w]."""
        at = self.level(batch.own["judged_t"], batch.x0)
        noisy = at.alpha * x0 + at.sigma * batch.own["judged_eps"]
        return networks[HEAD](features_of(self.networks[TEACHER], noisy, at, cond))

    def head_losses(self, networks: Networks, batch: DenoisingBatch, cond: Cond) -> Tensor:
        with torch.no_grad():
            drawn = self.guessed(networks, batch, cond)
        real, fake = (self.judge(networks, x0, batch, cond) for x0 in (batch.x0, drawn))
        return (HINGE.real(real) + HINGE.fake(fake)) / 2


def on_arc(net: Network, kind: str, x: Tensor, at: Level, cond: Cond) -> Tensor:
    """F: the network's answer for x as a prediction of v on the arc, cos(phi) eps^ - sin(phi) x0^."""
    x0, eps = both(kind, x, net(x / input_scale(at), at.t, cond).to(x.dtype), at)
    return (at.alpha * eps - at.sigma * x0) / (at.alpha**2 + at.sigma**2).sqrt()


def tangent(net: Network, process: Process, kind: str, x: Tensor, t: Tensor, cond: Cond, ends: tuple[Tensor, Tensor],
            warm: float = 1.0) -> Tensor:
    """g [b, c, h, w] at x and t [b]. ends: (x0, eps) by which the curve goes on from x; warm: w."""
    coefficients = lambda t: torch.stack([*process(t)[1:]])
    (alpha, sigma), (d_alpha, d_sigma) = derivative(coefficients, (t,), (torch.ones_like(t),))          # each [b, 1, 1, 1]
    r = (alpha**2 + sigma**2).sqrt()
    cos, sin, per_phi = alpha / r, sigma / r, r**2 / (alpha * d_sigma - sigma * d_alpha)                # dt / dphi
    x0, eps = ends
    answer, change = derivative(lambda x, t: on_arc(net, kind, x, process(t), cond), (x, t),
                                (((d_alpha * x0 + d_sigma * eps) * per_phi).to(x.dtype), per_phi.flatten()))
    return cos**2 * (cos * eps - sin * x0 - answer) - warm * sin * cos * (x / r + change)
