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
from tinyldm.planning.flops import MetaNetworks, count_flops, forwards, meta_networks, size
from tinyldm.planning.memory import activations, memory

ENCODE_UTILISATION = 0.4    # estimate: fraction of the GPU's peak that the VAE's encoder reaches
OVERHEAD = 0.04             # estimate: fraction of the running time for sample grids, validation, checkpoints and restarts


@dataclass(frozen=True)
class PlannedPhase:
    """The plan of one phase: the first stage, or the second stage at one picture size."""

    name: str
    config: Config                  # the settings of this phase
    batch: int
    micro: int                      # the largest micro-batch
    trained: dict[str, nn.Module]
    frozen: int                     # number of parameters of frozen networks on the GPU
    flops: dict[str, int]           # per image, by part: three times those of the forward pass where the part is trained
    activations: float              # bytes per image, an estimate
    casts: int                      # bytes of the casts of weights
    cache_bytes: int = 0            # bytes per picture on disk; 0: the first stage, which has no cache
    steps: int = 0
    encoding: float = 0.0           # hours of encoding the latents, a projection

    @property
    def useful(self) -> int:
        """FLOPs of training on one image."""
        return sum(self.flops[part] for part in (("net", "text") if self.cache_bytes else self.flops))

    @property
    def rate(self) -> float:
        """Images per second, a projection. The utilisation counts everything that the GPU computes, including the forward passes
        that gradient checkpointing repeats, which the model FLOPs utilisation (MFU) does not count."""
        recomputed = self.flops["net"] / 3 if self.cache_bytes and self.config.network.grad_checkpointing else 0
        return self.config.plan.utilisation * self.config.plan.gpu_tflops * 1e12 / (self.useful + recomputed)

    @property
    def hours(self) -> float:
        return self.steps * self.batch / self.rate / 3600

    def memory(self, micro: int | None = None) -> dict[str, float]:
        """Bytes on the GPU, by kind."""
        return memory(self.config, self.trained, self.frozen, self.activations * (micro or self.micro), self.casts)

    def memory_gb(self, micro: int | None = None) -> float:
        """Total memory on the GPU in GB."""
        return sum(self.memory(micro).values()) / 1e9


class Plan(NamedTuple):
    config: Config
    networks: MetaNetworks
    phases: list[PlannedPhase]
    pictures: int                   # number of pictures in the data; 0: not known
    budget_hours: float             # 0: no budget

    @property
    def hours(self) -> float:
        """Total hours, a projection."""
        return sum(s.hours + s.encoding for s in self.phases) / (1 - OVERHEAD)


def make_plan(config: Config, must_fit: bool = True) -> Plan:
    """The plan of a run. must_fit: ValueError, with the setting to change, where a phase does not fit into the GPU's memory."""
    for name in ("utilisation", "gpu_tflops", "gpu_gb"):
        if not (value := getattr(config.plan, name)) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0")
    networks, parts, budget = meta_networks(config), phases(config), budget_hours(config)
    first = [] if config.autoencoder.weights else [plan_vae_phase(parts[0], networks)]
    planned = [*first, *(plan_network_phase(part, networks) for part in parts)]
    if must_fit:
        for index, phase in enumerate(planned, -len(first)):
            check_fit(config, phase, index)
    pictures = config.data.scenes if config.data.sources == ["toyworld"] else config.plan.pictures
    if not config.data.cache:
        speed = ENCODE_UTILISATION * config.plan.gpu_tflops * 1e12 * 3600                              # FLOPs per hour
        planned = [replace(s, encoding=pictures * s.flops["encode"] / speed) if s.cache_bytes else s for s in planned]
    left = budget * (1 - OVERHEAD) - sum(s.encoding + s.hours for s in planned)      # only the first stage's steps are set yet
    return Plan(config, networks, [*first, *share_out(config, planned[len(first):], left)], pictures, budget)


def budget_hours(config: Config) -> float:
    """Hours from now to the end of the budget or to the deadline, whichever comes first; 0: the run ends after --max-steps."""
    ends = [parse_duration(config.optimisation.budget)] if config.optimisation.budget else []
    if config.optimisation.deadline:
        ends.append(parse_date(config.optimisation.deadline) - time.time())
        if ends[-1] <= 0:
            raise ValueError(f"--deadline {config.optimisation.deadline} has passed: name a later one")
    return min(ends, default=0.0) / 3600


def share_out(config: Config, planned: list[PlannedPhase], hours: float) -> list[PlannedPhase]:
    """The same phases with their numbers of steps: each phase's fraction of the hours, or of --max-steps where that is set."""
    weights, done, result = config.data.phases or {str(config.data.resolution): 1.0}, 0.0, []
    total = config.optimisation.max_steps
    for phase, weight in zip(planned, weights.values()):
        begin, done = done, done + weight / sum(weights.values())
        steps = (round(total * done) - round(total * begin) if total
                 else int((done - begin) * max(hours, 0.0) * 3600 * phase.rate / phase.batch))
        result.append(replace(phase, steps=steps))
    return result


def plan_vae_phase(config: Config, networks: MetaNetworks) -> PlannedPhase:
    """Plan the first stage: the VAE on crops."""
    settings, vae = config.autoencoder, networks.vae
    side, batch = min(settings.crop or config.data.resolution, config.data.resolution), settings.batch_size
    calls = {part: call for part, call in forwards(networks, side).items() if part in ("encode", "decode")}
    flops = {part: 3 * count_flops(call) for part, call in calls.items()}
    saved, casts = activations(config, *((vae, call) for call in calls.values()))
    return PlannedPhase(f"VAE, {side} px", config, batch, batch, {"vae": vae}, 0, flops, saved, casts, steps=settings.steps)


def plan_network_phase(config: Config, networks: MetaNetworks) -> PlannedPhase:
    """Plan the second stage at one picture size."""
    (net, text, vae), side, calls = networks, config.data.resolution, forwards(networks, config.data.resolution, join=config.text.join)
    trained = {"net": net} if config.text.weights else {"net": net, "text": text}
    flops = {part: (3 if part in trained else 1) * count_flops(call) for part, call in calls.items()}
    saved, casts = activations(config, *((module, calls[part]) for part, module in trained.items()))
    latent = vae.config.latent_channels * (side // vae.config.downscale) ** 2
    batch = config.optimisation.batch_size
    return PlannedPhase(f"{side} px", config, batch, -(-batch // config.optimisation.grad_accum), trained,
                   size(*networks) - size(*trained.values()), flops, saved, casts,
                   cache_bytes=2 * (latent + text.config.context_length))                   # latents in fp16, token ids of 16 bits


def check_fit(config: Config, phase: PlannedPhase, index: int) -> None:
    """ValueError, with a setting that fits, where a phase does not. index: of the phase in the second stage; -1: the VAE."""
    if phase.memory_gb() <= config.plan.gpu_gb:
        return
    divisors = [m for m in range(1, phase.batch + 1) if phase.batch % m == 0]
    if index < 0:
        options = [(f"--vae-batch-size {micro}", micro) for micro in reversed(divisors)]
    else:                                                      # --grad-accum is that of the first phase; the others follow from it
        scaled = {accum: -(-phase.batch // phases(change(config, grad_accum=accum))[index].optimisation.grad_accum)
                  for accum in divisors}
        options = [(f"--grad-accum {accum} (micro-batch {micro})", micro) for accum, micro in scaled.items()]
    found = next(((flag, micro) for flag, micro in options if phase.memory_gb(micro) <= config.plan.gpu_gb), None)
    or_checkpointing = " or --grad-checkpointing" if index >= 0 and not config.network.grad_checkpointing else ""
    advice = (f"{found[0]} would fit, at {phase.memory_gb(found[1]):.1f} GB" if found else
              f"single images need {phase.memory_gb(1):.1f} GB, so shrink it (--{'vae' if index < 0 else config.network.name}"
              f"{or_checkpointing})")
    raise ValueError(f"micro-batch {phase.micro} at {phase.name} needs {phase.memory_gb():.1f} GB "
                     f"(estimate), the GPU has {config.plan.gpu_gb:g} (--gpu-gb): {advice}")
