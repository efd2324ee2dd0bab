"""The first stage of a run without a pretrained VAE: it trains one on crops, then standardises its latents."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import torch

from tinyldm.cli import best_effort
from tinyldm.config import Config, OptimisationConfig, change
from tinyldm.data.encoding import posterior
from tinyldm.data.prepare import some_pictures
from tinyldm.device import in_parts
from tinyldm.files import replace_folder
from tinyldm.folders.load import load_vae
from tinyldm.folders.save import save_vae
from tinyldm.lookup import build_dataclass
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.objectives import FIRST_STAGE_OBJECTIVES
from tinyldm.pictures.pixels import psnr, to_bytes, to_pixels, write_picture
from tinyldm.pictures.sheet import tile
from tinyldm.random_streams import Stream, seed_sequence
from tinyldm.training.context import RunContext
from tinyldm.training.distributed import World
from tinyldm.training.stage import Phase, Stage
from tinyldm.training.trained import TrainedAutoencoder

PICTURES = "vae-pictures"               # start of the name of the folder in a run that holds the VAE's pictures while it trains
LARGEST_PART = 0.1                      # fraction of the free disk space that they may take


class AutoencoderStage(Stage):
    """The main process trains an autoencoder by itself, on crops of pictures that are held in memory."""

    name, title, stream = "vae", "VAE", Stream.POSTERIOR
    average = checkpoint_at_end = False

    def __init__(self, config: Config, context: RunContext, images: np.ndarray):
        """images: uint8 [n, h, w, 3]."""
        torch.manual_seed(config.run.seed)
        fields = config.autoencoder.fields | {"sample_size": config.data.resolution}
        self.vae = AutoencoderKL(build_dataclass(VAEConfig, fields, "--vae")).to(context.device)
        self.config, self.context, self.images, self.world = config, context, images, World()
        self.settings, self.phases = optimisation(config), [change(config, stages={})]
        self.objective = FIRST_STAGE_OBJECTIVES[config.autoencoder.objective](config.autoencoder, self.vae)
        for network in self.objective.networks.values():
            network.to(context.device)
        self.trained = TrainedAutoencoder(self.vae)

    def begin_phase(self, index: int) -> Phase:
        settings, seed = self.config.autoencoder, self.config.run.seed
        crops = lambda step: random_crops(self.images, settings.crop, settings.batch_size, seed, step)
        return Phase(self.config, crops, slice(0, settings.batch_size), {"vae": self.vae, **self.objective.networks}, 1)

    def finish(self) -> None:
        """Measure the latents' mean and scale, make them part of the VAE, write RUN/vae and a picture that shows reconstructions.

        From here on the scaling factor belongs to the weights: to_latents applies it wherever latents are made, from_latents
        takes it back before decoding, and the diffusion network only ever sees latents of unit variance."""
        config, vae, device, run = self.config, self.vae, self.context.device, self.context.folder
        some = self.images[:2048]
        z = torch.cat([*in_parts(lambda part: posterior(vae, part, device, config.run.dtype).mean, some, 64)])
        mean = z.mean((0, 2, 3))
        vae.centre(mean)
        scale = 1 / float((z - mean[:, None, None]).std())
        vae.config = dataclasses.replace(vae.config, scaling_factor=scale)
        shown = self.images[:8]
        with torch.no_grad():
            decoded = to_bytes(vae.decode(vae.encode(to_pixels(shown).to(device)).mean))
        write_picture(run / "samples" / "vae.png", tile(np.concatenate([shown, decoded]), columns=8))
        print(f"VAE: {psnr(decoded, shown).mean():.1f} dB on 8 pictures, scaling factor {scale:.4f}")
        replace_folder(run / "vae", lambda folder: save_vae(folder, vae))


def optimisation(config: Config) -> OptimisationConfig:
    """The settings of the first stage's optimizers: its own where it has some, else the run's."""
    own = config.autoencoder
    return dataclasses.replace(config.optimisation, lr=own.lr, muon_lr=own.muon_lr, decay=own.decay, batch_size=own.batch_size,
                               max_steps=own.steps, budget="", deadline="", weight_decay=0.0, rollback=False)


def random_crops(images: np.ndarray, size: int, number: int, seed: int, step: int) -> np.ndarray:
    """The batch of a step: `number` crops of size x size pixels (size 0: whole pictures), uint8 [number, size, size, 3]."""
    side = images.shape[1]
    size = min(size or side, side)
    rng = np.random.default_rng(seed_sequence(Stream.CROPS, seed, step))
    chosen = rng.integers(len(images), size=number)
    ys, xs = rng.integers(side - size + 1, size=(2, number))
    return np.stack([images[i, y:y + size, x:x + size] for i, y, x in zip(chosen, ys, xs)])


def copy_pretrained(config: Config, context: RunContext) -> None:
    """Write RUN/vae from the pretrained autoencoder of --vae-weights."""
    replace_folder(context.folder / "vae", lambda folder: save_vae(folder, load_vae(config.autoencoder.weights)))


def training_pictures(config: Config, context: RunContext) -> np.ndarray:
    """The pictures that a VAE trains on, uint8 [n, h, w, 3], cropped square. They are kept in the run's folder, so that a run that
    is interrupted in its first stage need not decode or draw them again, and goes on with the same ones. Of the settings that they
    depend on, a resumed run may change the number only, which is in the folder's name."""
    folder = context.folder / f"{PICTURES}-{config.autoencoder.pictures}"
    try:
        images = np.load(folder / "pictures.npy", allow_pickle=False)
        print(f"the VAE trains on the same {len(images):,} pictures as before")
        return images
    except (OSError, ValueError, EOFError):                     # the first start, or a damaged file
        pictures, faults = some_pictures(config, config.autoencoder.pictures, context.signals.check)
    print(f"the VAE trains on {len(pictures):,} pictures" + f" ({sum(faults.values()):,} unusable ones left out)" * bool(faults))
    images = np.stack([item.image for item in pictures])
    forget_pictures(context.folder)                             # another number of them
    if images.nbytes < shutil.disk_usage(context.folder).free * LARGEST_PART:
        best_effort("keeping the VAE's pictures", lambda: replace_folder(folder, lambda partial: (
            partial.mkdir(), np.save(partial / "pictures.npy", images))))
    return images


def forget_pictures(run: Path) -> None:
    """Remove the pictures that training_pictures keeps in a run's folder."""
    for folder in run.glob(f"*{PICTURES}-*"):                   # half-written ones too
        shutil.rmtree(folder, ignore_errors=True)
