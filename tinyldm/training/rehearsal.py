"""One step of everything that a run does on its GPU, on random numbers, before hours are spent on encoding pictures.

What fails here costs a minute: a compiler that is missing or that gives up, or memory that does not suffice. Compiled kernels stay in
torch's cache on the disk, so that compiling them again for the training takes less time.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from tinyldm.config import Config, change
from tinyldm.data.encoding import CompiledVAE, encode
from tinyldm.data.loader import Batch
from tinyldm.data.shard import SIZES
from tinyldm.device import autocast, first_line, in_parts, out_of_memory
from tinyldm.objectives import Turn
from tinyldm.pipeline import decode
from tinyldm.planning.flops import on_this_gpu
from tinyldm.planning.plan import compiles, make_plan
from tinyldm.training.context import RunContext
from tinyldm.training.distributed import World, clip
from tinyldm.training.frozen import open_vae
from tinyldm.training.learner import Learner
from tinyldm.training.micro_batches import MicroBatches
from tinyldm.training.second_stage import LatentStage


REFUSED = "--compile: torch.compile fails on this machine ({}): leave the flag out, or install what is missing"


class Rehearsed(NamedTuple):
    config: Config              # run.compile is True or False in it
    micro_batches: list[int]    # per phase and process: as many as the memory needs, at least as many as the config asks for


def rehearse(config: Config, context: RunContext, last: Path | None) -> Rehearsed:
    """Decide whether the run compiles, and try every phase. last: the checkpoint to continue from.

    Where torch.compile fails and the same step works without it, the run goes on without it. ValueError where that happens although
    --compile was given, and where a single picture does not fit into memory. On CPUs and MPS only --compile is tried."""
    typed, device = config.run.compile, context.device
    config = change(config, compile=wants_compile(config, device))
    if device.type != "cuda" and not config.run.compile:
        return Rehearsed(config, [])
    vae, reason = open_vae(config, context), ""  # reason: why torch.compile failed
    try:
        counts = try_phases(config, context, vae, last)
    except Exception as error:
        if not config.run.compile or isinstance(error, ValueError) or out_of_memory(error):
            raise
        if config.run.fsdp:                                     # the other processes would not try again with this one
            raise ValueError(REFUSED.format(first_line(error))) from error
        config, reason = change(config, compile=False), first_line(error)
    if reason:
        free_memory(device)                                     # outside of `except`, whose traceback keeps the networks alive
        counts = try_phases(config, context, vae, last)         # raises what is not the compiler's fault
        if typed:
            raise ValueError(REFUSED.format(reason))
        print(f"torch.compile fails on this machine ({reason}): the run goes on without it, more slowly")
    free_memory(device)
    failed_anywhere, *counts = map(int, context.world.all_reduce_max(bool(reason), *counts))
    return Rehearsed(change(config, compile=False) if failed_anywhere else config, counts)


def wants_compile(config: Config, device: torch.device) -> bool:
    """Whether to compile, by the run's hours on this GPU."""
    hours = 0.0
    if compiles(config, hours, device.type) != compiles(config, math.inf, device.type):        # then the hours matter
        try:
            hours = make_plan(on_this_gpu(config, device), must_fit=False).hours
        except ValueError:                                      # the deadline has passed: the run is about to end
            pass
    return compiles(config, hours, device.type)


def free_memory(device: torch.device) -> None:
    """Free compiled graphs and the memory of networks that nothing refers to any more."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def try_phases(config: Config, context: RunContext, vae: nn.Module, last: Path | None) -> list[int]:
    """-> the number of micro-batches of each phase that fits into memory."""
    stage = RehearsalStage(config, context, vae, last)
    # Each process tries by itself, because one may be out of memory where the others are not; a sharded network needs all of them.
    world = stage.world if config.run.fsdp else World()
    learner = Learner(stage.trained, stage.objective, stage.settings, world, context.device)
    return [stage.try_phase(index, learner) for index in range(len(stage.phases))]


class RehearsalStage(LatentStage):
    """The second stage without data."""

    def __init__(self, config: Config, context: RunContext, vae: nn.Module, last: Path | None):
        self.micro_batches = None
        self.build(config, context, vae, ["a picture"], last)

    def try_phase(self, index: int, learner: Learner) -> int:
        """Two updates of every turn, one batch to encode, one picture to decode."""
        config, device = self.phases[index], self.context.device
        networks, most = self.prepare_networks(index), self.settings.batch_size // self.world.size
        sample = f"a picture of {config.data.resolution} px"

        def start_over(count: int) -> None:
            learner.drop_gradients()
            free_memory(device)

        micro_batches = MicroBatches(self.micro_batch_count(index), most, sample, start_over, retry=not config.run.fsdp)
        for turn in self.objective.turns:
            for attempt in micro_batches.attempts():
                with attempt:
                    # The second update finds in memory what later ones do: the optimizer's state, and gradients of a micro-batch before.
                    for count in (1, min(2, attempt.count)):
                        self.try_update(turn, networks, config, -(-most // attempt.count), count, learner)
        images = np.zeros((config.data.encode_batch_size, config.data.resolution, config.data.resolution, 3), np.uint8)
        with self.model.at_work("vae"):
            self.try_autoencoder(images, config)
        return micro_batches.count

    def try_autoencoder(self, images: np.ndarray, config: Config) -> None:
        """Encode a batch of pictures, and decode one."""
        device, vae = self.context.device, self.model.vae
        if not config.data.cache:
            size = SimpleNamespace(count=len(images))           # in place of BatchSize, which would read and write the cache's folder
            encoder = CompiledVAE(vae, size) if config.run.compile else vae
            [*in_parts(lambda part: encode(encoder, part, device, config.run.dtype, config.data.flip), images, len(images))]
        with torch.no_grad(), autocast(device, config.run.dtype):
            decode(vae, self.latents(1, config).to(device))

    def try_update(self, turn: Turn, networks: dict, config: Config, size: int, count: int, learner: Learner) -> None:
        """Forward and backward passes of `count` equal micro-batches of random latents, then an update."""
        tokens = self.model.text.tokenize([f"picture {i}" for i in range(size)])
        samples = Batch(np.arange(size), self.latents(size, config), tokens, torch.rand(size, SIZES) * config.data.resolution,
                        pictures=lambda: torch.zeros(size, 3, config.data.resolution, config.data.resolution, dtype=torch.uint8))
        batch = self.objective.draw(samples, torch.Generator().manual_seed(0), size, slice(0, size))
        batch = self.objective.to_device(batch, self.context.device)
        for _ in range(count):
            with autocast(self.context.device, config.run.dtype):
                losses = self.objective.losses(turn, networks, batch, 0.0)
            losses.mean().backward()
            learner.meters[turn.name].add(losses, 1 / size)
        learner.update(turn, clip(learner.weights(turn), self.settings.grad_clip), 1.0, measure=True)

    def latents(self, count: int, config: Config) -> torch.Tensor:
        vae = self.model.vae.config
        side = config.data.resolution // vae.downscale
        return torch.randn(count, vae.latent_channels, side, side)
