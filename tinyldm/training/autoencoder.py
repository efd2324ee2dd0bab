"""Stage 1 of a run without a pretrained VAE: train one on crops, then standardise its latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyldm.config import Config, build
from tinyldm.data.encoding import posterior
from tinyldm.device import autocast
from tinyldm.files import replace_folder
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.pipeline import to_bytes, to_pixels
from tinyldm.sheet import tile
from tinyldm.training import checkpoint
from tinyldm.training.log import Log
from tinyldm.training.loop import update, write_log
from tinyldm.training.meter import Meter
from tinyldm.training.optim import make_optimizers, set_lr
from tinyldm.training.run import Clock, Interrupted, Progress, Signals, generator, write_picture
from tinyldm.training.schedule import Schedule
from tinyldm.vendor_loaders.folder import save_vae
from tinyldm.vendor_loaders.load import load_weights


def random_crops(images: np.ndarray, size: int, count: int, seed: int, step: int) -> Tensor:
    """count crops of size x size (0: whole pictures) -> float32 [count, 3, size, size] in [-1, 1]."""
    rng = np.random.default_rng([seed, 1, step])
    chosen = rng.integers(len(images), size=count)
    side = images.shape[1]
    size = min(size or side, side)
    ys, xs = rng.integers(side - size + 1, size=(2, count))
    return to_pixels(np.stack([images[i, y : y + size, x : x + size] for i, y, x in zip(chosen, ys, xs)]))


def train_vae(config: Config, run: Path, images: np.ndarray, device: torch.device, signals: Signals, clock: Clock,
              last: Path | None) -> AutoencoderKL:
    """L1 + MSE + a small KL (arXiv:2112.10752, Eq. 25 without the adversary), on random crops. last: the checkpoint to go on from."""
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(build(VAEConfig, config.vae | {"sample_size": config.resolution}, "--vae")).to(device)
    parameters = dict(vae.named_parameters())
    optimizers = make_optimizers(parameters, kind=config.optimizer, lr=config.vae_lr, muon_lr=config.vae_muon_lr)
    start, meter = 0, Meter(device)
    if last:
        load_weights(vae, last / "vae" / "diffusion_pytorch_model.safetensors")
        checkpoint.load_optimizers(last / "optimizer.safetensors", optimizers, parameters)
        state = checkpoint.read_state(last)
        start = state["step"]
        meter.load(state["meter"])
    log = Log(run / "log.jsonl", "vae", start)

    def fill(folder: Path) -> None:
        save_vae(folder / "vae", vae)
        checkpoint.save_optimizers(folder / "optimizer.safetensors", optimizers, parameters)

    bar, schedule = Progress("VAE", start, config.vae_steps, config.vae_batch_size, device), Schedule(
        warmup=config.warmup_steps, decay=0.6, max_steps=config.vae_steps)
    for step in range(start, config.vae_steps):
        set_lr(optimizers, factor := schedule.factor(step))
        pixels = random_crops(images, config.vae_crop, config.vae_batch_size, config.seed, step).to(device)
        with autocast(device, config.dtype):
            posterior = vae.encode(pixels)
            noise = torch.randn(posterior.mean.shape, generator=generator(config.seed, 1, step)).to(device)
            decoded = vae.decode(posterior.sample(noise))
        error = decoded.float() - pixels
        loss = error.abs().mean() + error.square().mean() + config.vae_kl * posterior.kl().mean()
        loss.backward()
        meter.add(loss.view(1), share=1.0)
        if update(list(parameters.values()), optimizers, config.grad_clip, meter) is None:
            log.write(stage="vae", step=step + 1, event="skipped", text=meter.skip(step, config.seed))
        bar.update()
        if (step + 1) % config.log_every == 0:
            write_log(log, "vae", step + 1, meter, bar, factor, config.vae_lr * factor, running=clock.running())
        if signals.received or (step + 1) % config.save_every == 0:
            checkpoint.write(run, "vae", step + 1, fill, {"meter": meter.state()}, config.keep_last, config.keep_every)
        if signals.received:
            raise Interrupted
    bar.close()
    return vae


def finish_vae(config: Config, run: Path, vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> None:
    """Measure the latents' mean and scale, make them part of the VAE, save it and a picture of what it loses."""
    some = images[:2048]
    z = torch.cat([posterior(vae, batch, device, config.dtype).mean for batch in np.array_split(some, -(-len(some) // 64))])
    mean = z.mean((0, 2, 3))
    vae.centre(mean)
    scale = 1 / float((z - mean[:, None, None]).std())
    vae.config = replace(vae.config, scaling_factor=scale)
    shown = images[:8]
    with torch.no_grad():
        decoded = to_bytes(vae.decode(vae.encode(to_pixels(shown).to(device)).mean))
    psnr = -10 * np.log10((((decoded.astype(float) - shown) / 255) ** 2).mean(axis=(1, 2, 3))).mean()
    write_picture(run / "samples" / "vae.png", tile(np.concatenate([shown, decoded]), columns=8))
    print(f"VAE: {psnr:.1f} dB on 8 pictures, scaling factor {vae.config.scaling_factor:.4f}")
    replace_folder(run / "vae", lambda folder: save_vae(folder, vae))
