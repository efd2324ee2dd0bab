"""The plan of a run, before anything is loaded or written: parameters, FLOPs, memory, hours, disk.

Any machine plans a run of any size in seconds: flops.py and memory.py count on the meta device. Hours are projections
from the fraction of the GPU's peak that training reaches (--utilisation). show.py prints the plan.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from tinyldm.config import Config, change, phases
from tinyldm.durations import parse_date, parse_duration
from tinyldm.planning.flops import Networks, count_flops, forwards, meta_networks, size
from tinyldm.planning.memory import activations, memory

ENCODE_UTILISATION = 0.4    # estimate: fraction of the GPU's peak that the VAE's encoder reaches
OVERHEAD = 0.04             # estimate: fraction of the running time for sample grids, validation, checkpoints and restarts


@dataclass(frozen=True)
class Stretch:
    """A stretch of training: the autoencoder's, or the network's at one picture size."""

    name: str
    config: Config                  # its own
    batch: int
    micro: int                      # the largest micro-batch
    trained: dict[str, nn.Module]
    frozen: int                     # number of parameters of frozen networks on the GPU
    flops: dict[str, int]           # per image, by part: three times those of the forward pass where the part is trained
    kept: float                     # bytes of activations per image
    casts: int                      # bytes of the weights' casts
    cached: int = 0                 # bytes per picture on disk; 0: stage 1, which has no cache
    steps: int = 0
    encoding: float = 0.0           # hours, a projection

    @property
    def useful(self) -> int:
        """FLOPs of training on one image."""
        return sum(self.flops[part] for part in (("net", "text") if self.cached else self.flops))

    @property
    def rate(self) -> float:
        """Images per second, a projection. The utilisation counts all that the GPU computes, also the forward passes that gradient
        checkpointing runs again, which the model FLOPs utilisation (MFU) does not count."""
        again = self.flops["net"] / 3 if self.cached and self.config.network.grad_checkpointing else 0
        return self.config.plan.utilisation * self.config.plan.gpu_tflops * 1e12 / (self.useful + again)

    @property
    def hours(self) -> float:
        return self.steps * self.batch / self.rate / 3600

    def memory(self, micro: int | None = None) -> dict[str, float]:
        """Bytes on the GPU, by kind."""
        return memory(self.config, self.trained, self.frozen, self.kept * (micro or self.micro), self.casts)

    def need(self, micro: int | None = None) -> float:
        """GB in all."""
        return sum(self.memory(micro).values()) / 1e9


class Plan(NamedTuple):
    config: Config
    networks: Networks
    stretches: list[Stretch]
    pictures: int                   # 0: not known
    given: float                    # hours of the budget; 0: none

    @property
    def used(self) -> float:
        """Hours in all, a projection."""
        return sum(s.hours + s.encoding for s in self.stretches) / (1 - OVERHEAD)


def make_plan(config: Config, must_fit: bool = True) -> Plan:
    """ValueError, with the knob to turn, where a stretch does not fit the GPU."""
    for name in ("utilisation", "gpu_tflops", "gpu_gb"):
        if not (value := getattr(config.plan, name)) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0")
    networks, parts, given = meta_networks(config), phases(config), given_hours(config)
    first = [] if config.autoencoder.weights else [vae_stretch(parts[0], networks)]
    stretches = [*first, *(diffusion_stretch(part, networks) for part in parts)]
    if must_fit:
        for phase, stretch in enumerate(stretches, -len(first)):
            check_fit(config, stretch, phase)
    pictures = config.data.scenes if config.data.sources == ["toyworld"] else config.plan.pictures
    if not config.data.cache:
        speed = ENCODE_UTILISATION * config.plan.gpu_tflops * 1e12 * 3600                              # FLOPs per hour
        stretches = [replace(s, encoding=pictures * s.flops["encode"] / speed) if s.cached else s for s in stretches]
    left = given * (1 - OVERHEAD) - sum(s.encoding + s.hours for s in stretches)                      # so far only the first stage has hours
    return Plan(config, networks, [*first, *shared_out(config, stretches[len(first):], left)], pictures, given)


def given_hours(config: Config) -> float:
    """Running time from now to the end of the budget or to the deadline, whichever comes first; 0: steps decide."""
    ends = [parse_duration(config.optimisation.budget)] if config.optimisation.budget else []
    if config.optimisation.deadline:
        ends.append(parse_date(config.optimisation.deadline) - time.time())
        if ends[-1] <= 0:
            raise ValueError(f"--deadline {config.optimisation.deadline} has passed: name a later one")
    return min(ends, default=0.0) / 3600


def shared_out(config: Config, stretches: list[Stretch], hours: float) -> list[Stretch]:
    """The same stretches with their steps: fractions of the given hours, or of --max-steps where that is given."""
    shares, done, result = config.data.phases or {str(config.data.resolution): 1.0}, 0.0, []
    total = config.optimisation.max_steps
    for stretch, share in zip(stretches, shares.values()):
        begin, done = done, done + share / sum(shares.values())
        steps = (round(total * done) - round(total * begin) if total
                 else int((done - begin) * max(hours, 0.0) * 3600 * stretch.rate / stretch.batch))
        result.append(replace(stretch, steps=steps))
    return result


def vae_stretch(config: Config, networks: Networks) -> Stretch:
    """The first stage: the VAE on crops."""
    settings, vae = config.autoencoder, networks.vae
    side, batch = min(settings.crop or config.data.resolution, config.data.resolution), settings.batch_size
    calls = {part: call for part, call in forwards(networks, side).items() if part in ("encode", "decode")}
    flops = {part: 3 * count_flops(call) for part, call in calls.items()}
    kept, casts = activations(config, *((vae, call) for call in calls.values()))
    return Stretch(f"VAE, {side} px", config, batch, batch, {"vae": vae}, 0, flops, kept, casts, steps=settings.steps)


def diffusion_stretch(config: Config, networks: Networks) -> Stretch:
    """The second stage on pictures of one size."""
    (net, text, vae), side, calls = networks, config.data.resolution, forwards(networks, config.data.resolution)
    trained = {"net": net} if config.text.weights else {"net": net, "text": text}
    flops = {part: (3 if part in trained else 1) * count_flops(call) for part, call in calls.items()}
    kept, casts = activations(config, *((module, calls[part]) for part, module in trained.items()))
    latent = vae.config.latent_channels * (side // vae.config.downscale) ** 2
    batch = config.optimisation.batch_size
    return Stretch(f"{side} px", config, batch, -(-batch // config.optimisation.grad_accum), trained,
                   size(*networks) - size(*trained.values()), flops, kept, casts,
                   cached=2 * (latent + text.config.context_length))                           # fp16, and 16-bit token ids


def check_fit(config: Config, stretch: Stretch, phase: int) -> None:
    """ValueError, with what would fit, where a stretch does not. phase: which of the second stage's; -1: the VAE."""
    if stretch.need() <= config.plan.gpu_gb:
        return
    divisors = [m for m in range(1, stretch.batch + 1) if stretch.batch % m == 0]
    if phase < 0:
        options = [(f"--vae-batch-size {micro}", micro) for micro in reversed(divisors)]
    else:                                                      # the flag sets the first phase's, the others follow from it
        scaled = {accum: -(-stretch.batch // phases(change(config, grad_accum=accum))[phase].optimisation.grad_accum)
                  for accum in divisors}
        options = [(f"--grad-accum {accum} (micro-batch {micro})", micro) for accum, micro in scaled.items()]
    found = next(((knob, micro) for knob, micro in options if stretch.need(micro) <= config.plan.gpu_gb), None)
    again = " or --grad-checkpointing" if phase >= 0 and not config.network.grad_checkpointing else ""
    advice = (f"{found[0]} would fit, at {stretch.need(found[1]):.1f} GB" if found else
              f"single images need {stretch.need(1):.1f} GB, so shrink it (--{'vae' if phase < 0 else config.network.name}{again})")
    raise ValueError(f"micro-batch {stretch.micro} at {stretch.name} needs {stretch.need():.1f} GB "
                     f"(estimate), the GPU has {config.plan.gpu_gb:g} (--gpu-gb): {advice}")
