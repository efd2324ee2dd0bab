"""What the second stage begins with: the frozen VAE, and the latents of all pictures."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import nn

from tinyldm.config import Config
from tinyldm.data.cache import Cache
from tinyldm.data.prepare import phase_folders, prepare
from tinyldm.folders.load import load_vae
from tinyldm.training.context import RunContext


def prepare_latents(config: Config, context: RunContext, make_vae: Callable[[], None], begun: bool) -> tuple[nn.Module, list[Cache]]:
    """The frozen VAE, and per phase the latents of all pictures, each made only where it is not there yet. Several processes
    share the encoding; the main one trains or copies the VAE (make_vae) alone.

    begun: the second stage has begun; its latents are used as they are, whatever has become of the sources since."""
    while not (context.folder / "vae").is_dir():
        if context.world.main:
            make_vae()
        else:
            context.check(), time.sleep(0.5)
    vae, caches = load_vae(context.folder / "vae", context.device), []
    for phase, folder in phase_folders(config, context.folder / "latents"):
        if not config.data.cache and not begun:
            while (report := prepare(phase, folder, vae, context.device, check=context.check)) is None:
                context.check(), time.sleep(2)                                  # other processes are at the last shards
            context.world.barrier()                                             # until then another process may remove and rewrite the index
            print(report)
        caches.append(Cache(folder))
    return vae, caches
