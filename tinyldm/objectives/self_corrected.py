"""Self-corrected flow distillation: consistency, reflow on the student's own pictures, and an adversary: one step draws what few do.

On a point x_t of the line between data and noise, f the guess of x0, and the teacher's guided direction there (arXiv:2412.16906):

    truncated consistency    f(x_t, t) -> f'(x_s, s),  s < t a teacher's step away, at most `window`. Where s < `truncate` the target is
                             the data x0 itself: from there to the end there is nothing to learn from another guess
    bidirectional            f(x_t, t) -> f'(x_r, r),  r > t a step of the teacher towards the noise; weight `both_ways`
    reflow                   f(x_t', t) -> x1, where x1 = f(eps, 1) is what the student draws in one step, and x_t' lies on the line
                             between x1 and that eps: so its few steps lead to where its one step does; weight `reflow`
    adversarial              a discriminator tells x1 from data; weight `gan` (0: none). It makes one step sharp, and the term before
                             carries that to few steps

f' has averaged weights; targets are constants for gradients. The distance of the first two is pseudo-Huber per number, c = 0.01, that of
the third is squared. The settings are those of the authors' published CelebA-HQ run (their code states them, the paper not all).

Choices. Their discriminator is a large network made for the paper; here it is the patch discriminator of adversarial.py on latents, with
their loss (softplus) and penalty (R1 of 1) and learning rate. Beside an adapter f' is the student itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyldm.config import Config, OptimisationConfig
from tinyldm.diffusion.loss import LOSSES
from tinyldm.diffusion.process import Flow, at_size
from tinyldm.model import Model
from tinyldm.models.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from tinyldm.objectives.adversarial import Adversary, GANConfig
from tinyldm.objectives.base import Networks, Turn
from tinyldm.objectives.denoising import DenoisingBatch, process_of
from tinyldm.objectives.teacher import TARGET, Distillation, ddim, own_options

DISCRIMINATOR = "discriminator"


class SelfCorrected(Distillation):
    options = dict(scale=0.0, window=0.1, truncate=0.4, ema=0.9, c=0.01, both_ways=0.1, reflow=0.1, gan=0.0, width=64, layers=1)

    def __init__(self, config: Config, model: Model, trained: tuple[str, ...], teacher: Model):
        super().__init__(config, model, trained, teacher)
        self.adversary = None
        if self.option["gan"]:
            shape = dict(width=self.option["width"], layers=self.option["layers"], norm="group")
            gan = GANConfig("non_saturating", start=0, adaptive=False, r1=1.0, **shape)
            self.adversary = Adversary(gan)
            self.adversary.net = PatchDiscriminator(PatchDiscriminatorConfig(**shape, channels=model.net.config.in_channels))
            self.networks, self.saved = self.networks | {DISCRIMINATOR: self.adversary}, (*self.saved, DISCRIMINATOR)
            own = OptimisationConfig(optimizer="adamw", lr=gan.lr, weight_decay=0.0)
            self.turns = Turn("distillation", trained), Turn(DISCRIMINATOR, (DISCRIMINATOR,), optimisation=own, betas=gan.betas)

    @classmethod
    def usual(cls, config: Config) -> dict[str, Any]:
        return dict(times="uniform", sampler="euler", steps=2, cfg=1.0)

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if not isinstance(at_size(process_of(config.objective)), Flow):
            raise ValueError("self_corrected is for flows, and this model has another process: make it one with --objective diff2flow")
        option = own_options(cls, config)
        if not (0 < option["window"] <= 1 and 0 <= option["truncate"] <= 1 and option["c"] > 0 and 0 <= option["ema"] < 1):
            raise ValueError(f"self_corrected options {option}: use 0 < window <= 1, 0 <= truncate <= 1, a positive c, 0 <= ema < 1")
        PatchDiscriminatorConfig(option["width"], option["layers"], "group")

    def further(self, random: torch.Generator, shape: torch.Size) -> dict[str, Tensor]:
        return {"down": torch.rand(shape[0], generator=random), "up": torch.rand(shape[0], generator=random)}

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        net, cond, end = networks["net"], self.cond(batch), self.level(torch.ones_like(batch.t), batch.x0)
        trained = turn.name != DISCRIMINATOR and torch.is_grad_enabled()
        with torch.set_grad_enabled(trained and self.adversary is not None):
            one = self.f(net, batch.eps, end, cond)                                     # drawn in one step
        if turn.name == DISCRIMINATOR:
            return self.adversary.discriminator_losses(batch.x0, one)
        losses = self.consistency(networks, batch, cond) + self.option["reflow"] * self.rectified(net, one.detach(), batch, cond)
        if self.adversary is not None:
            losses = losses + self.option["gan"] * self.adversary.generator_losses(one)
        return batch.weighted(losses)

    def consistency(self, networks: Networks, batch: DenoisingBatch, cond: Any) -> Tensor:
        """Of both directions, [b]."""
        t, window = batch.t.clamp(min=1e-4), torch.full_like(batch.t, self.option["window"])
        s, r = t - batch.own["down"] * torch.minimum(t, window), t + batch.own["up"] * torch.minimum(1 - t, window)
        now, clean, noisy = (self.level(each, batch.x0) for each in (t, s, r))
        x = now.alpha * batch.x0 + now.sigma * batch.eps
        with torch.no_grad():
            taught = self.teach(x, now, batch, self.guidance)
            target = networks.get(TARGET, networks["net"])
            below, above = (self.f(target, ddim(x, taught, now, at), at, cond) for at in (clean, noisy))
            below = torch.where((s < self.option["truncate"]).view(-1, 1, 1, 1), batch.x0, below)
        guessed, c = self.f(networks["net"], x, now, cond), self.option["c"]
        distance = lambda error: LOSSES["huber"](error, c).flatten(1).mean(1) / (2 * c)
        return distance(guessed - below) + self.option["both_ways"] * distance(guessed - above)

    def rectified(self, net: Any, one: Tensor, batch: DenoisingBatch, cond: Any) -> Tensor:
        now = self.level(batch.t, one)
        return (self.f(net, now.alpha * one + now.sigma * batch.eps, now, cond) - one).square().flatten(1).mean(1)

    def start_over(self) -> None:
        if self.adversary is not None:
            self.adversary.start_over()

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.start_over()
