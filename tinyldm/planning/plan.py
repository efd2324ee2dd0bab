"""The plan of a run, before anything is loaded or written: parameters, FLOPs, memory, hours, disk.

Any machine plans a run of any size in seconds: flops.py and memory.py count on the meta device. Hours are projections
from the fraction of the GPU's peak that training reaches (--utilisation). show.py prints the plan.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from tinyldm.config import Config, change, phases
from tinyldm.data.shard import SIZES
from tinyldm.data.toyworld_source import all_toyworld
from tinyldm.durations import parse_date, parse_duration
from tinyldm.lookup import lookup
from tinyldm.objectives import OBJECTIVES
from tinyldm.planning.contrastive import plan_clip_phase
from tinyldm.planning.finetune import plan_base, plan_tuned_phase
from tinyldm.planning.flops import MetaNetworks, count_flops, forwards, meta_autoencoder, meta_networks, size, vae_forwards
from tinyldm.planning.memory import saved_bytes
from tinyldm.planning.peak import peak_bytes
from tinyldm.planning.phase import PlannedPhase
from tinyldm.planning.texts import caption_tokens, condition, join_of

# Estimates of the fraction of the GPU's peak that the VAE's encoder reaches: compiled (norms fused, channels last), and not.
ENCODE_UTILISATION = {True: 0.45, False: 0.36}
OVERHEAD = 0.04             # estimate: fraction of the running time for sample grids, validation, checkpoints and restarts
WORTH_COMPILING = 0.5       # hours of work on a GPU: compiling takes some minutes, and saves perhaps a fifth of the rest (estimates)


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
    if config.run.only:
        return plan_autoencoder(config, must_fit)
    if lookup(OBJECTIVES, config.objective.name, "objective").on_pictures:
        return plan_clip(config, must_fit)
    parts, budget = phases(config), budget_hours(config)
    if config.finetune.kind:
        networks, trained, cond = plan_base(config)
        first, planned = [], [plan_tuned_phase(part, networks, trained, cond) for part in parts]
    else:
        networks = meta_networks(config)
        first = [] if config.autoencoder.weights else [plan_vae_phase(parts[0], networks.vae)]
        planned = [plan_network_phase(part, networks) for part in parts]
    pictures = config.data.scenes if all_toyworld(config.data.sources) else config.plan.pictures
    on_first = sum(s.hours for s in first)                                           # only the first stage's steps are set yet

    def with_steps(compiled: bool) -> list[PlannedPhase]:
        encoded = [replace(s, compiled=compiled, encoding=encoding_hours(s, pictures, compiled)) for s in planned]
        return [*first, *share_out(config, encoded, budget * (1 - OVERHEAD) - on_first)]

    plan = Plan(config, networks, with_steps(compiled=False), pictures, budget)
    if compiles(config, plan.hours):
        plan = plan._replace(phases=with_steps(compiled=True))
    if must_fit:
        for index, phase in enumerate(plan.phases, -len(first)):
            check_fit(config, phase, index)
    return plan


def plan_autoencoder(config: Config, must_fit: bool) -> Plan:
    """The plan of --only vae. Networks that are not there have no parameters."""
    networks, budget = MetaNetworks(nn.Identity(), nn.Identity(), meta_autoencoder(config)), budget_hours(config)
    phase = plan_vae_phase(config, networks.vae)
    phase = replace(phase, micro=-(-phase.batch // config.optimisation.grad_accum))
    if budget:
        phase = replace(phase, steps=int(budget * (1 - OVERHEAD) * 3600 * phase.rate / phase.batch))
    if must_fit:
        check_fit(config, phase, -1)
    return Plan(config, networks, [phase], 0, budget)


def plan_clip(config: Config, must_fit: bool = True) -> Plan:
    """The plan of --objective contrastive. As networks it has the two towers, and no autoencoder."""
    clip, phase = plan_clip_phase(config)
    budget = budget_hours(config)
    phase, = share_out(config, [phase], budget * (1 - OVERHEAD))
    if must_fit:
        check_fit(config, phase, 0)
    return Plan(config, MetaNetworks(clip.vision, clip.text, nn.Identity()), [phase], 0, budget)


def compiles(config: Config, hours: float, device: str = "cuda") -> bool:
    """Whether a run of so many hours compiles its network and the VAE's encoder: as --compile says, else on GPUs where it pays back.
    A sharded network is not compiled unless --compile is given. device: a torch.device's type."""
    if config.run.compile is not None:
        return config.run.compile
    return device == "cuda" and not config.run.fsdp and hours >= WORTH_COMPILING


def encoding_hours(phase: PlannedPhase, pictures: int, compiled: bool) -> float:
    """Hours of encoding the latents of all pictures, a projection; 0 with --cache."""
    if phase.config.data.cache:
        return 0.0
    return pictures * phase.flops["encode"] / (ENCODE_UTILISATION[compiled] * phase.config.plan.gpu_tflops * 1e12 * 3600)


def budget_hours(config: Config) -> float:
    """Hours from now to the end of the budget or to the deadline, whichever comes first; 0: the run ends after --max-steps."""
    ends = [parse_duration(config.optimisation.budget)] if config.optimisation.budget else []
    if config.optimisation.deadline:
        ends.append(parse_date(config.optimisation.deadline) - time.time())
        if ends[-1] <= 0:
            raise ValueError(f"--deadline {config.optimisation.deadline} has passed: name a later one")
    return min(ends, default=0.0) / 3600


def share_out(config: Config, planned: list[PlannedPhase], hours: float) -> list[PlannedPhase]:
    """The same phases with their numbers of steps: each phase's fraction of the hours that their encoding leaves, or of --max-steps
    where that is set."""
    weights, done, result = config.data.phases or {str(config.data.resolution): 1.0}, 0.0, []
    total, hours = config.optimisation.max_steps, hours - sum(phase.encoding for phase in planned)
    for phase, weight in zip(planned, weights.values()):
        begin, done = done, done + weight / sum(weights.values())
        steps = (round(total * done) - round(total * begin) if total
                 else int((done - begin) * max(hours, 0.0) * 3600 * phase.rate / phase.batch))
        result.append(replace(phase, steps=steps))
    return result


def plan_vae_phase(config: Config, vae: nn.Module) -> PlannedPhase:
    """Plan the first stage: the VAE on crops."""
    settings = config.autoencoder
    config = change(config, optimizer=settings.optimizer or config.optimisation.optimizer)
    side, batch = min(settings.crop or config.data.resolution, config.data.resolution), settings.batch_size
    calls = vae_forwards(vae, side)
    flops = {part: 3 * count_flops(call) for part, call in calls.items()}
    saved, casts = saved_bytes(config, *((vae, call) for call in calls.values()))
    return PlannedPhase(f"VAE, {side} px", config, batch, batch, {"vae": vae}, 0, flops, dict(zip(calls, saved)), casts, {},
                        4 * (3 * side**2 + latent_numbers(vae, side)), steps=settings.steps)


def plan_network_phase(config: Config, networks: MetaNetworks) -> PlannedPhase:
    """Plan the second stage at one picture size."""
    (net, text, vae), side, join = networks, config.data.resolution, join_of(config)
    calls = forwards(networks, side, join=join)
    trained = {"net": net} if config.text.weights else {"net": net, "text": text}
    flops = {part: (3 if part in trained else 1) * count_flops(call) for part, call in calls.items()}
    saved, casts = saved_bytes(config, *((module, calls[part]) for part, module in trained.items()))
    dtype = torch.float32 if config.run.dtype == "fp32" else torch.bfloat16
    latent, batch = latent_numbers(vae, side), config.optimisation.batch_size
    features = 0 if "text" in trained else condition(text, join).context.numel()
    return PlannedPhase(f"{side} px", config, batch, -(-batch // config.optimisation.grad_accum), trained,
                   4 * (size(*networks) - size(*trained.values())), flops, dict(zip(trained, saved)), casts,
                   {part: peak_bytes(call, dtype) for part, call in calls.items()}, 4 * (2 * latent + features),
                   cache_bytes=bytes_in_cache(config, vae, side, caption_tokens(text)))


def bytes_in_cache(config: Config, vae: nn.Module, side: int, tokens: int) -> int:
    """Bytes on disk of a square picture's arrays in a cache (data/shard.py): latents in fp16, sizes, the picture with --keep-pictures, and
    the token ids of one caption, in 16 bits. The caption itself is not counted."""
    views, parts, latent = 1 + config.data.flip, 1 + config.data.moments, latent_numbers(vae, side)
    picture = 3 * (config.data.keep_pictures * (side // vae.config.downscale)) ** 2
    return views * (2 * parts * latent + 4 * SIZES) + picture + 2 * tokens


def latent_numbers(vae: nn.Module, side: int) -> int:
    """How many numbers the latents of a square picture are."""
    return vae.config.latent_channels * (side // vae.config.downscale) ** 2


def check_fit(config: Config, phase: PlannedPhase, index: int) -> None:
    """ValueError, with a setting that fits, where a phase does not. index: of the phase in the second stage; -1: the VAE."""
    if phase.memory_gb() <= config.plan.gpu_gb:
        return
    divisors = [m for m in range(1, phase.batch + 1) if phase.batch % m == 0]
    if index < 0:
        options = [(f"--grad-accum {phase.batch // micro}" if config.run.only else f"--vae-batch-size {micro}", micro)
                   for micro in reversed(divisors)]
    else:                                                      # --grad-accum is that of the first phase; the others follow from it
        scaled = {accum: -(-phase.batch // phases(change(config, grad_accum=accum))[index].optimisation.grad_accum)
                  for accum in divisors}
        options = [(f"--grad-accum {accum} (micro-batch {micro})", micro) for accum, micro in scaled.items()]
    found = next(((flag, micro) for flag, micro in options if phase.memory_gb(micro) <= config.plan.gpu_gb), None)
    or_checkpointing = "" if config.network.grad_checkpointing else " or --grad-checkpointing"
    shrink = "--vae" if index < 0 else f"--net{or_checkpointing}" if phase.cache_bytes else "--objective-options width=, --text width="
    advice = (f"{found[0]} would fit, at {phase.memory_gb(found[1]):.1f} GB" if found else
              f"single images need {phase.memory_gb(1):.1f} GB, so shrink it ({shrink})")
    raise ValueError(f"micro-batch {phase.micro} at {phase.name} needs {phase.memory_gb():.1f} GB "
                     f"(estimate), the GPU has {config.plan.gpu_gb:g} (--gpu-gb): {advice}")
