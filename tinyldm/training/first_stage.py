"""The first stage of a run without a pretrained VAE: it trains one on crops, then standardises its latents.

In a run of both stages the main process does this by itself. With --only vae it is the whole run, of all processes.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyldm.config import Config, OptimisationConfig, change
from tinyldm.data.encoding import posterior
from tinyldm.data.loader import own_part
from tinyldm.device import autocast, in_parts
from tinyldm.files import replace_folder
from tinyldm.folders.load import load_vae
from tinyldm.folders.save import save_part
from tinyldm.model import AUTOENCODERS, architecture, autoencoder_config
from tinyldm.objectives import FIRST_STAGE_OBJECTIVES
from tinyldm.pictures.pixels import psnr
from tinyldm.planning.flops import peak_flops, vae_flops
from tinyldm.random_streams import Stream
from tinyldm.training.context import RunContext
from tinyldm.training.distributed import World
from tinyldm.training.learner import Learner
from tinyldm.training.report import refresh_report
from tinyldm.training.stage import Phase, Stage, Train
from tinyldm.training.trained import TrainedAutoencoder
from tinyldm.training.vae_pictures import POLL, forget_pictures, hold_out, middle, random_crops, training_pictures
from tinyldm.training.vae_validation import SHOWN, VAEValidation, reconstruct, write_grid

MEASURED = 2048                         # pictures from which the scale of the latents is measured, at most


class AutoencoderStage(Stage):
    """Trains an autoencoder on crops of pictures."""

    name, title, stream = "vae", "VAE", Stream.POSTERIOR
    checkpoint_at_end = False

    def __init__(self, config: Config, context: RunContext, images: np.ndarray, last: Path | None = None, world: World | None = None):
        """images: uint8 [n, h, w, 3]. last: the checkpoint to continue from. world: the processes that train; None: this one alone."""
        own, self.world = config.autoencoder, world or World()
        torch.manual_seed(config.run.seed)
        self.vae = new_autoencoder(config, last).to(context.device)
        if context.device.type == "cpu":
            self.vae.to(memory_format=architecture(self.vae).memory_format)
        self.config, self.context, self.images = config, context, images
        self.average, self.val_every, self.patience, self.reported = own.ema > 0, own.val_every, own.early_stop, bool(config.run.only)
        self.planned = self.reported
        self.kept, self.held_out = hold_out(len(images), config.run.val_samples if own.val_every else 0)
        if own.val_every and not len(self.held_out):
            raise ValueError(f"a tenth of {len(images)} pictures is none: use ten or more, or leave out --vae-val-every")
        self.settings, self.phases = optimisation(config), [change(config, stages={})]
        if config.run.only and (peak := peak_flops(config.plan, context.device)):
            self.peak, self.costs = peak * self.world.size, [vae_flops(self.vae, min(own.crop or images.shape[1], images.shape[1]))]
        self.objective = FIRST_STAGE_OBJECTIVES[own.objective](own, self.vae)
        self.objective.mean = self.world.mean
        for network in self.objective.networks.values():
            network.to(context.device)
        self.trained = TrainedAutoencoder(self.vae)

    def begin_phase(self, index: int) -> Phase:
        own, seed, world, only = self.config.autoencoder, self.config.run.seed, self.world, self.config.run.only
        networks = {"vae": self.vae, **self.objective.networks}
        part = own_part(own.batch_size, world.rank, world.size)
        crops = lambda step: random_crops(self.images, own.crop, own.batch_size, seed, step, self.kept if own.val_every else None)[part]
        count = min(-(-self.config.optimisation.grad_accum // world.size), own.batch_size // world.size) if only else 1
        return Phase(self.config, crops, part, networks, count, self.validation(networks, -(-(part.stop - part.start) // count)))

    def validation(self, networks: dict[str, nn.Module], micro_batch: int) -> VAEValidation | None:
        """What is measured on the pictures that are held out; None where none are."""
        if not len(self.held_out):
            return None
        samples = middle(np.array(self.images[self.held_out]), self.config.autoencoder.crop)
        device, dtype = self.context.device, self.config.run.dtype

        def losses(micro: Any, progress: float) -> Tensor:
            with autocast(device, dtype):
                return self.objective.losses(self.objective.turns[0], networks, micro, progress)

        batch = self.objective.validation_batch(samples, self.config.run.seed)
        grid = self.grid_file if self.world.main else None
        return VAEValidation(batch, micro_batch, device, losses, self.objective.to_device, self.vae, samples, dtype, grid)

    @property
    def grid_file(self) -> Path:
        return self.context.folder / "samples" / "vae.png"

    def state(self) -> dict[str, Any]:
        return {"pictures": [len(self.images), len(self.held_out)]}

    def check_resume(self, state: dict[str, Any]) -> None:
        before, now = state.get("pictures", [0, 0]), self.state()["pictures"]
        if before != now and (before[1] or now[1]):
            raise ValueError(f"the run began with {before[0]:,} pictures, {before[1]:,} of them held out, and now has {now[0]:,} and "
                             f"{now[1]:,}: some would be both trained on and validated on; keep --vae-pictures and the data, and "
                             "--vae-val-every 0 where it was 0")

    def draw_progress(self) -> None:
        self.draw_reconstructions()

    def draw_reconstructions(self) -> tuple[np.ndarray, np.ndarray]:
        """Write samples/vae.png with the weights as they are -> its pictures and their reconstructions."""
        shown = np.array(self.images[self.held_out[:SHOWN]] if len(self.held_out) else self.images[:SHOWN])
        decoded, _ = reconstruct(self.vae, shown, self.context.device, "fp32")
        write_grid(self.grid_file, shown, decoded)
        return shown, decoded

    def finish(self, learner: Learner) -> None:
        """Measure the latents' mean and scale, make them part of the VAE, write RUN/vae and a picture that shows reconstructions. All
        processes call this; the main one does it.

        From here on the scaling factor belongs to the weights: to_latents applies it wherever latents are made, from_latents
        takes it back before decoding, and the diffusion network only ever sees latents of unit variance. That of a frozen encoder
        stays as it is, and so do the latents that diffusion networks know."""
        config, vae, device = self.config, self.vae, self.context.device
        if chosen := learner.take_final_weights():
            print(f"VAE: {chosen}")
        if self.world.main:
            if config.autoencoder.freeze != "encoder":
                some = np.array(self.images[:MEASURED])
                vae.standardise(torch.cat([*in_parts(lambda part: posterior(vae, part, device, config.run.dtype).mean, some, 64)]))
            shown, decoded = self.draw_reconstructions()
            print(f"VAE: {psnr(decoded, shown).mean():.1f} dB on {len(shown)} pictures, scaling factor {vae.config.scaling_factor:.4f}")
            replace_folder(self.context.folder / "vae", lambda folder: save_part(folder, vae))
            if config.run.only:
                refresh_report(self.context.folder)
        self.world.barrier()


def new_autoencoder(config: Config, last: Path | None) -> nn.Module:
    """The autoencoder to train. Where it begins with weights of others, a resumed run has them, and its class and fields, in its last
    checkpoint: their source may have changed or gone."""
    own = config.autoencoder
    if own.init:
        vae = load_vae(last / "vae" if last else own.init).train().requires_grad_(True)
        vae.config = dataclasses.replace(vae.config, sample_size=own.crop or config.data.resolution)
    else:
        fields = autoencoder_config(own.name, own.fields, sample_size=config.data.resolution)
        vae = AUTOENCODERS[own.name].module(fields)
    return vae


def optimisation(config: Config) -> OptimisationConfig:
    """The settings of the first stage's optimizers: its own where it has some, else the run's. Where it is the whole run, --budget and
    --deadline are its own."""
    own, run = config.autoencoder, config.optimisation
    timed = bool(config.run.only and (run.budget or run.deadline))
    return dataclasses.replace(run, lr=own.lr, muon_lr=own.muon_lr, decay=own.decay, batch_size=own.batch_size, weight_decay=0.0,
                               rollback=False, optimizer=own.optimizer or run.optimizer, ema_decay=own.ema, ema_widths=[],
                               max_steps=0 if timed else own.steps, budget=run.budget * timed, deadline=run.deadline * timed)


def first_stage(config: Config, context: RunContext, last: Path | None, train: Train) -> None:
    """RUN/vae, unless it is there: pretrained, or trained, by all processes if it is all that is trained, else by the main one alone,
    while the others wait."""
    world = context.world if config.run.only else World()
    while not (context.folder / "vae").is_dir():
        if not (context.world.main or config.run.only):
            context.check(), time.sleep(POLL)
        elif config.autoencoder.weights:
            copy_pretrained(config, context)
        else:
            stage = AutoencoderStage(config, context, training_pictures(config, context, world), last, world)
            stage.finish(train(stage, context, last))
    if context.world.main:
        forget_pictures(context.folder)


def copy_pretrained(config: Config, context: RunContext) -> None:
    """Write RUN/vae from the pretrained autoencoder of --vae-weights."""
    replace_folder(context.folder / "vae", lambda folder: save_part(folder, load_vae(config.autoencoder.weights)))
