"""Distribution matching: a generator learns from the difference of two scores, that of the data and that of what it draws.

For the densities p of real and of drawn pictures at a level, where x_t = alpha x + sigma eps and x is drawn by the generator from noise z,

    d KL(drawn | real) / dx = alpha (score_drawn - score_real)(x_t),     score(x_t) = (alpha E[x0 | x_t] - x_t) / sigma^2

(Tweedie), so that it is alpha^2 / sigma^2 (x0_drawn - x0_real): a difference of two denoisers' guesses. The real one is the guided teacher.
The drawn one is a third network, `fake`, which is trained as a diffusion of what the generator draws, in turns of its own: `every` of
them for each of the generator's (arXiv:2405.14867, Sec. 4.2). The generator's loss is one half of the mean square of x - sg(x - g), with

    g = (x0_drawn - x0_real) / mean |x - x0_real|,  which takes the place of alpha^2 / sigma^2       (arXiv:2311.18828, Eq. 7-8)

Each step is a guess of x0, noised again to the next of `steps` evenly spaced times (sampler lcm), and in training the generator sees in
step k what its own steps before have drawn, not noised data (backward simulation, Sec. 4.5): one k per step of the training.

    gan        > 0: weight of an adversarial term (Sec. 4.3): a small head on the middle features of `fake` tells noised data from
               noised drawings; it and `fake` learn from that with weight `gan_fake`. The generator can surpass its teacher by it
    align      < 1: SenseFlow's implicit distribution alignment (arXiv:2506.00523): after each step of the generator
               fake <- align fake + (1 - align) generator, so that it does not lag behind and `every` can be small. Its code has 0.98
    segment    > 0: weight of SenseFlow's intra-segment guidance: from x at this step's time the teacher goes to a time between it and
               the next, the generator from there to the next, without gradients; the generator's direct way is to end there too

Choices. SenseFlow's paper leaves open how the two ways are compared, and where between; as in the authors' code, it is by Euler steps, a
pseudo-Huber distance with c = 0.001 (here of root mean squares) and times drawn evenly (here up to both ends), and 0.5 is a usual weight.
The teacher is guided there as everywhere. `fake` learns at times drawn evenly, the generator at those of --times, between 0.02 and 0.98.
Both turns of a step have the same captions, noise of their own, and the same k.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyldm.config import Config
from tinyldm.diffusion.loss import sample_losses
from tinyldm.diffusion.process import Level
from tinyldm.model import Model
from tinyldm.models.layers import Cond
from tinyldm.objectives.base import Networks, Turn
from tinyldm.objectives.denoising import DenoisingBatch
from tinyldm.objectives.feature_head import features_of, make_head
from tinyldm.objectives.teacher import Distillation, ddim, move_average, own_options, pseudo_huber, with_times

FAKE, HEAD = "fake", "head"
FIRST, LAST = 0.02, 0.98            # times at which the generator is judged


class DMD(Distillation):
    options = dict(steps=4, every=5, scale=0.0, gan=0.0, gan_fake=0.01, align=1.0, segment=0.0)
    own_loss = False                        # `fake` learns by the diffusion loss

    def __init__(self, config: Config, model: Model, trained: tuple[str, ...], teacher: Model):
        super().__init__(config, model, trained, teacher)
        self.networks |= {FAKE: copy.deepcopy(model.net).requires_grad_(True)}
        if self.option["gan"]:
            self.networks |= {HEAD: make_head(model, self.encode(self.empty[None], model.device))}
        self.saved = tuple(name for name in (FAKE, HEAD) if name in self.networks)
        self.turns = Turn("generator", trained, every=self.option["every"]), Turn("fake", self.saved)

    @classmethod
    def usual(cls, config: Config) -> dict[str, Any]:
        return dict(times="uniform", sampler="lcm", steps=own_options(cls, config)["steps"], cfg=1.0)

    @classmethod
    def begins_as(cls, model: Model, config: Config) -> Model:
        return with_times(model, own_options(cls, config)["steps"])

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        option = own_options(cls, config)
        if not (option["steps"] >= 1 and option["every"] >= 1 and 0 <= option["align"] <= 1 and min(option["gan"], option["segment"]) >= 0):
            raise ValueError(f"dmd options {option}: use steps and every of at least 1, 0 <= align <= 1, gan and segment of at least 0")
        if config.finetune.adapts:
            raise ValueError("--objective dmd trains a second whole network beside the generator: leave out --finetune lora")

    def further(self, random: torch.Generator, shape: torch.Size) -> dict[str, Tensor]:
        b, steps = shape[0], self.option["steps"]
        return {"step": torch.randint(steps, (), generator=random).expand(b), "noise": torch.randn(b, steps, *shape[1:], generator=random),
                "between": torch.rand(b, generator=random), "fake_eps": torch.randn(shape, generator=random),
                "fake_t": torch.rand(b, generator=random)}

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        cond = self.cond(batch)
        with torch.set_grad_enabled(turn.name == "generator" and torch.is_grad_enabled()):
            x, start, k = self.generate(networks["net"], batch, cond)
        losses = (self.generator_losses(networks, x, start, k, batch, cond) if turn.name == "generator" else
                  self.fake_losses(networks, x, batch, cond))
        return batch.weighted(losses)

    def generate(self, net: Any, batch: DenoisingBatch, cond: Cond) -> tuple[Tensor, Tensor, int]:
        """(what the generator guesses of x0 in step k, what it sees there, k); the steps before it without gradients."""
        noise, k = batch.own["noise"], int(batch.own["step"][0])
        x = self.at(0, batch).sigma * noise[:, 0]
        for i in range(k):
            with torch.no_grad():
                guessed = self.f(net, x, self.at(i, batch), cond)
            nxt = self.at(i + 1, batch)
            x = nxt.alpha * guessed + nxt.sigma * noise[:, i + 1]
        return self.f(net, x, self.at(k, batch), cond), x, k

    def at(self, k: int, batch: DenoisingBatch) -> Level:
        """The level of step k, as the grid has it when pictures are drawn."""
        time = (1 - k / self.option["steps"]) * (1 - 2**-20)
        return self.level(batch.t.new_full(batch.t.shape, time), batch.x0)

    def generator_losses(self, networks: Networks, x: Tensor, start: Tensor, k: int, batch: DenoisingBatch, cond: Cond) -> Tensor:
        now = self.level(FIRST + (LAST - FIRST) * batch.t, x)
        noisy = now.alpha * x + now.sigma * batch.eps
        g = self.direction(networks[FAKE], x.detach(), noisy.detach(), now, batch, cond)
        losses = (x - (x - g).detach()).square().flatten(1).mean(1) / 2
        if self.option["gan"]:
            losses = losses + self.option["gan"] * F.softplus(-self.judge(networks, noisy, now, cond))
        if self.option["segment"]:
            losses = losses + self.option["segment"] * self.segment_losses(networks["net"], x, start, k, batch, cond)
        return losses

    @torch.no_grad()
    def direction(self, fake: nn.Module, x: Tensor, noisy: Tensor, now: Level, batch: DenoisingBatch, cond: Cond) -> Tensor:
        """g [b, c, h, w], for x noised to the level `now`."""
        real = self.teach(noisy, now, batch, self.guidance)
        return (self.f(fake, noisy, now, cond) - real) / (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)

    def segment_losses(self, net: Any, x: Tensor, start: Tensor, k: int, batch: DenoisingBatch, cond: Cond) -> Tensor:
        now, end = self.at(k, batch), self.at(k + 1, batch)
        middle = self.level((1 - (k + batch.own["between"]) / self.option["steps"]).clamp(1e-3, 1 - 2**-20), x)
        with torch.no_grad():
            halfway = ddim(start, self.teach(start, now, batch, self.guidance), now, middle)
            wanted = ddim(halfway, self.f(net, halfway, middle, cond), middle, end)
        return pseudo_huber(ddim(start, x, now, end) - wanted, 0.001)

    def fake_losses(self, networks: Networks, x: Tensor, batch: DenoisingBatch, cond: Cond) -> Tensor:
        eps, t = batch.own["fake_eps"], batch.own["fake_t"]
        losses = sample_losses(networks[FAKE], x, eps, t, cond, self.process(x), **self.loss_settings)
        if self.option["gan"]:
            now = self.level(FIRST + (LAST - FIRST) * batch.t, x)
            drawn, real = (self.judge(networks, now.alpha * each + now.sigma * batch.eps, now, cond) for each in (x, batch.x0))
            losses = losses + self.option["gan_fake"] * (F.softplus(drawn) + F.softplus(-real))
        return losses

    def judge(self, networks: Networks, x: Tensor, now: Level, cond: Cond) -> Tensor:
        return networks[HEAD](features_of(networks[FAKE], x, now, cond))

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if self.option["align"] < 1 and (step - 1) % self.option["every"] == 0:
            move_average(self.networks[FAKE], self.model.net, self.option["align"])

    def validation_batch(self, samples: Any, seed: int) -> None:
        """None: the generator's loss says where to go, not how far it is."""
