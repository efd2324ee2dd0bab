"""What stage 2 begins with: the frozen VAE, trained or loaded, and the latents of all pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tinyldm.config import Config
from tinyldm.data.cache import Cache
from tinyldm.data.prepare import prepare, some_pictures, stage_folders
from tinyldm.files import replace_folder
from tinyldm.models.vae import AutoencoderKL
from tinyldm.training.autoencoder import finish_vae, train_vae
from tinyldm.training.distributed import World
from tinyldm.training.run import Clock, Signals
from tinyldm.vendor_loaders.folder import save_vae
from tinyldm.vendor_loaders.load import load_vae


class Here(NamedTuple):
    """Where a run takes place, and with whom."""

    run: Path
    device: torch.device
    world: World
    signals: Signals
    clock: Clock


def prepare_vae(config: Config, here: Here, last: Path | None) -> None:
    """RUN/vae, pretrained or trained here, where it is not there yet. last: the checkpoint to go on from."""
    run, device, signals = here.run, here.device, here.signals
    if config.vae_weights:
        return replace_folder(run / "vae", lambda folder: save_vae(folder, load_vae(config.vae_weights)))
    pictures, faults = some_pictures(config, config.vae_pictures, signals.check)
    images = np.stack([item.image for item in pictures])
    del pictures
    print(f"the VAE trains on {len(images):,} pictures" + f" ({sum(faults.values()):,} unusable ones passed over)" * bool(faults))
    finish_vae(config, run, train_vae(config, run, images, device, signals, here.clock, last), images, device)


def prepare_data(config: Config, here: Here, last: Path | None) -> tuple[AutoencoderKL, list[Cache]]:
    """The frozen VAE, and per stage the latents of all pictures, each made only where it is not there yet. Several processes
    share out what is to be encoded; the main one trains a VAE alone."""
    def check() -> None:
        here.clock.running()
        here.signals.check()

    while not (here.run / "vae").is_dir():
        if here.world.main:
            prepare_vae(config, here, last)
        else:
            check(), time.sleep(0.5)
    vae, caches = load_vae(here.run / "vae", here.device), []
    for stage, folder in stage_folders(config, here.run / "latents"):
        if not config.cache and not (last and last.name.startswith("step")):    # afterwards, whatever has become of the sources
            while (report := prepare(stage, folder, vae, here.device, check=check)) is None:
                check(), time.sleep(2)                                          # others are at the last shards
            here.world.wait()                                                   # and take the index away while they are
            print(report)
        caches.append(Cache(folder))
    return vae, caches
