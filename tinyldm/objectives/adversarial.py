"""The adversarial loss of an autoencoder: a discriminator learns to tell reconstructions from originals, and the decoder to fool it.

    losses   0.5 (real(D(x)) + fake(D(x'))) for the discriminator, generator(D(x')) for the autoencoder: KINDS
    weight   how much the autoencoder listens: the ratio of the gradients of both losses at the decoder's last layer
             (arXiv:2012.09841, Eq. 7), which makes them equally strong, whatever the size of the discriminator's logits
    R1       gradient penalty on originals (arXiv:1801.04406, Eq. 9)
    LeCam    keeps the logits of each kind near the average of the other (arXiv:2104.03310; relu as in google/lecam-gan)

The published weight is that of the batch on which it is used. Here a step uses that of the step before: so it is one number, whatever
the number of micro-batches and processes, and no process waits for another in the middle of its backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyldm.lookup import lookup
from tinyldm.models.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from tinyldm.objectives.reconstruction import mean


class Kind(NamedTuple):
    """Losses of logits, element by element."""

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    blind: float                        # the discriminator's loss while all of its logits are 0


KINDS: dict[str, Kind] = {
    "hinge": Kind(lambda d: F.relu(1 - d), lambda d: F.relu(1 + d), lambda d: -d, 1.0),                 # arXiv:1705.02894
    "non_saturating": Kind(lambda d: F.softplus(-d), F.softplus, lambda d: F.softplus(-d), math.log(2)),    # arXiv:1406.2661
}
EPS, MOST = 1e-4, 1e4                   # added to the denominator of the adaptive weight, and its upper limit
DECAY = 0.99                            # of the averages over steps, LeCam's among them: about 100 steps
WATCHED = 200                           # steps of the discriminator before anything is said about it
WINS, SAME = 0.05, 0.01                 # fraction of the blind loss, difference of the mean logits: less is a collapse


@dataclass(frozen=True)
class GANConfig:
    """--vae-gan. Times are fractions of the training."""

    kind: str = "hinge"
    start: float = 0.5                  # when the discriminator begins to learn
    warmup: float = 0.05                # how long after that the autoencoder's adversarial loss grows from 0
    adaptive: bool = True
    width: int = 64
    layers: int = 3
    norm: str = "batch"
    lr: float = 1e-4                    # peak learning rate of AdamW, with the schedule of the autoencoder
    betas: tuple[float, float] = (0.5, 0.9)
    r1: float = 0.0
    lecam: float = 0.0

    def __post_init__(self):
        lookup(KINDS, self.kind, "adversarial loss")
        self.discriminator              # raises where it cannot be built
        for name in ("start", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1: it is a fraction of the training")
        for name in ("r1", "lecam"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be a positive number")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie between 0 and 1")

    @property
    def discriminator(self) -> PatchDiscriminatorConfig:
        return PatchDiscriminatorConfig(self.width, self.layers, self.norm)

    def ramp(self, progress: float) -> float:
        """The factor of the autoencoder's adversarial loss, from 0 to 1, after this fraction of the training."""
        since = progress - self.start
        return float(since >= 0) if self.warmup == 0 else min(max(since / self.warmup, 0.0), 1.0)


class Adversary(nn.Module):
    """The discriminator, and in buffers what is remembered from step to step, so that it is part of checkpoints."""

    def __init__(self, settings: GANConfig):
        super().__init__()
        self.settings, self.kind = settings, KINDS[settings.kind]
        self.net = PatchDiscriminator(settings.discriminator)
        self.register_buffer("weight", torch.zeros(()))         # the adaptive one of the next step; 0 in the first step
        self.register_buffer("steps", torch.zeros(()))          # of the discriminator
        # Averages over steps: mean logit of originals, of reconstructions, discriminator's loss, how often the weight is at its limit.
        self.register_buffer("averages", torch.zeros(4))
        self.register_buffer("noted", torch.zeros(3, dtype=torch.bool))         # the collapses that have been reported and still last
        self.start_over()

    def start_over(self) -> None:
        """Forget what has been measured in this step."""
        self.pulls: list[Tensor] = []
        self.scores: list[Tensor] = []

    # ---------------------------------------------------------------- the two losses

    def generator_losses(self, decoded: Tensor) -> Tensor:
        """The autoencoder's adversarial loss [b]. Gradients reach the pictures, not the discriminator's weights."""
        self.net.requires_grad_(False)
        return mean(self.kind.generator(self.net(decoded)))

    def losses(self, decoded: Tensor, last: Tensor, compare: Callable[[Tensor], Tensor], factor: float) -> Tensor:
        """compare(decoded) + factor * weight * generator_losses(decoded), [b]. Measures the weight of the next step, if it is adaptive.

        last: the weights of the decoder's last layer. Both losses are differentiated once, as far as the pixels, and the result serves
        the weight as well as the backward pass to come: another pass through discriminator and LPIPS would cost as much again."""
        if not self.settings.adaptive:
            return compare(decoded) + factor * self.generator_losses(decoded)
        pixels = decoded.detach().requires_grad_()
        losses = compare(pixels), self.generator_losses(pixels)
        pulls = [torch.autograd.grad(loss.sum(), pixels)[0] for loss in losses]
        at_last = [torch.autograd.grad(decoded, last, pull, retain_graph=True)[0] for pull in pulls]
        self.pulls.append(torch.cat([last.new_full((1,), len(pixels)), *(gradient.flatten() for gradient in at_last)]))
        value = (losses[0] + factor * self.weight * losses[1]).detach()
        slope = (decoded * (pulls[0] + factor * self.weight * pulls[1])).flatten(1).sum(1)
        return value + (slope - slope.detach())                 # the losses' values, with their gradients

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's loss [b]."""
        self.net.requires_grad_(True)
        settings, kind, penalised = self.settings, self.kind, self.settings.r1 > 0
        real = real.detach().requires_grad_(penalised)
        with torch.autocast(real.device.type, enabled=False) if penalised else nullcontext():       # R1 is differentiated twice
            on_real = self.net(real)                            # originals and reconstructions apart: so are the statistics of batch norm
        on_fake = self.net(fake.detach())
        losses = (mean(kind.real(on_real)) + mean(kind.fake(on_fake))) / 2
        self.scores.append(torch.stack([torch.ones_like(losses), mean(on_real), mean(on_fake), losses], 1).detach().sum(0))
        if settings.lecam:
            near_real, near_fake = self.averages[:2]
            apart = mean(F.relu(on_real - near_fake).square()) + mean(F.relu(near_real - on_fake).square())
            losses = losses + settings.lecam * (self.steps > 0) * apart
        if penalised:
            slope, = torch.autograd.grad(mean(on_real).sum(), real, create_graph=True)
            losses = losses + settings.r1 / 2 * slope.square().flatten(1).sum(1)
        return losses

    # ---------------------------------------------------------------- from step to step

    @torch.no_grad()
    def after_step(self, average: Callable[[Tensor], Tensor]) -> None:
        """Take over what the micro-batches of this step have measured. average: a tensor -> its mean over all processes."""
        if self.pulls:
            count, pulls = _split(average(torch.stack(self.pulls).sum(0)))
            reconstruction, adversarial = (pulls / count).chunk(2)
            found = reconstruction.norm() / (adversarial.norm() + EPS)
            self.weight.copy_(torch.where(found.isfinite(), found, self.weight).clamp(max=MOST))
        if self.scores:
            count, scores = _split(average(torch.stack(self.scores).sum(0)))
            found = torch.cat([scores / count, (self.weight >= MOST).float().view(1)])
            rate = torch.where(self.steps > 0, 1 - DECAY, 1.0).to(found)    # the averages begin with the first step's values
            sound = found.isfinite().all()
            self.averages.copy_(torch.where(sound, self.averages.lerp(found.nan_to_num(), rate), self.averages))
            self.steps.add_(sound)
        self.start_over()

    def log_row(self) -> dict[str, Any]:
        """What goes into log.jsonl; {} before the discriminator has begun."""
        weight, steps, real, fake, *_ = torch.cat([self.weight.view(1), self.steps.view(1), self.averages]).tolist()
        return {"gan_weight": weight, "gan_real": real, "gan_fake": fake} if steps else {}

    def notes(self) -> list[str]:
        """What is to be reported now: each collapse once, and again where it comes back."""
        steps, real, fake, loss, limit, *noted = torch.cat([self.steps.view(1), self.averages, self.noted.float()]).tolist()
        if steps < WATCHED:
            return []
        seen = {f"the discriminator tells all reconstructions from originals (its loss is {loss:.3g}, and {self.kind.blind:.3g} would be "
                "guessing), so the decoder learns little from it: lower lr, or use r1 or lecam": loss < WINS * self.kind.blind,
                f"the discriminator answers alike to reconstructions and originals (mean logits {fake:.3g} and {real:.3g}), so the decoder "
                "learns nothing from it: raise lr, or lower r1 and lecam": abs(real - fake) < SAME,
                f"the adaptive weight of the adversarial loss is at its limit of {MOST:.0f}: the discriminator gives the decoder no "
                "gradient": limit > 0.5}
        self.noted.copy_(torch.tensor([*seen.values()]))
        return [f"{text} (--vae-gan)" for (text, now), before in zip(seen.items(), noted) if now and not before]


def _split(sums: Tensor) -> tuple[Tensor, Tensor]:
    """[count, *sums] -> the count and the sums."""
    return sums[0], sums[1:]
