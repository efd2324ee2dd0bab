"""The inputs of the second stage: the frozen VAE, and the latents of all pictures."""

from __future__ import annotations

from torch import nn

from tinyldm.config import Config
from tinyldm.data.cache import Cache
from tinyldm.data.prepare import phase_folders, prepare
from tinyldm.training.context import RunContext
from tinyldm.training.frozen import open_vae


def prepare_latents(config: Config, context: RunContext, begun: bool) -> tuple[nn.Module, list[Cache]]:
    """The frozen VAE in RUN/vae, or in the model that --finetune trains beside, and for each phase the latents of all pictures. All
    processes encode together, and what exists already is not made again.

    begun: the second stage has begun, so its latents are used as they are, even if the pictures have changed since."""
    vae, caches = open_vae(config, context), []
    for phase, folder in phase_folders(config, context.folder / "latents"):
        if not config.data.cache and not begun:
            report = prepare(phase, folder, vae, context.device, check=context.check, compile=bool(config.run.compile), wait=True)
            context.world.barrier()             # before this, another process may still remove and rewrite the index
            print(report)
        caches.append(Cache(folder))
    return vae, caches
