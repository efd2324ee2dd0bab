"""From prompts to pictures: text encoder, sampler with guidance, VAE decoder. What every script draws with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import cfg as guided
from tinyldm.diffusion.guidance import denoiser
from tinyldm.diffusion.samplers import find_sampler, initial_noise, make_generators
from tinyldm.models.layers import Cond
from tinyldm.training import checkpoint
from tinyldm.vendor_loaders.folder import Model


def find_model(path: str | None, runs: Path = Path("runs")) -> Path:
    """The model folder that a person means: a model folder, the newest checkpoint of a run folder, or, for None,
    of the run that finished last under `runs`. ValueError with what to do where there is none."""
    if path is None:
        finished = [last for run in runs.glob("*") for last in checkpoint.names(run)[-1:]
                    if checkpoint.read_state(last).get("finished")]
        if not finished:
            raise ValueError(f"no finished run under {runs}/: train one with 'python train.py --preset tiny', "
                             "or name a run or model folder with --model")
        return max(finished, key=lambda last: (last / "state.json").stat().st_mtime) / "model"
    folder = Path(path)
    if (folder / "model_index.json").exists():
        return folder
    if (folder / "model" / "model_index.json").exists():
        return folder / "model"
    trained = [last for last in checkpoint.names(folder) if (last / "model").is_dir()]
    if not trained:
        what = "has no checkpoint of its network yet" if (folder / "config.json").exists() else "is neither a run nor a model folder"
        raise ValueError(f"{folder} {what}: name a folder that train.py wrote")
    return trained[-1] / "model"


def encode_text(model: Model, texts: Sequence[str]) -> Cond:
    """Prompts -> Cond with context [b, n, d]. All n positions are attended to, padding included, as in training."""
    device = next(model.text.parameters()).device
    features = model.text(torch.from_numpy(model.tokenizer.encode(list(texts))).to(device))
    return Cond(features.hidden, pooled=features.pooled)


@torch.no_grad()
def draw(model: Model, prompts: Sequence[str], seeds: Sequence[int], *, negative: str = "", cfg: float = 4.0,
         steps: int = 20, sampler: str = "dpmpp_2m", schedule: str = "normal", width: int = 0, height: int = 0,
         eta: float | None = None, on_step: Callable[[int], None] = lambda images: None) -> np.ndarray:
    """One picture per (prompt, seed), as one batch -> uint8 [b, height, width, 3].

    Image i's noise is a function of seeds[i] alone, never of the batch. width and height default to the model's
    own; both must be multiples of the VAE's downscale. on_step is called with the batch size after every step.
    """
    f = model.vae.config.downscale
    own = model.defaults.get("resolution") or model.vae.config.sample_size
    width, height = width or own, height or own
    for size in (width, height):
        if size % f:
            raise ValueError(f"image size {size} is not a multiple of {f}: use {size // f * f or f} or {(size // f + 1) * f}")
    levels = grid(model.process, steps, schedule)
    options = {} if eta is None else {"eta": eta}
    generators = make_generators(seeds)
    device = next(model.net.parameters()).device
    x = initial_noise((model.net.config.in_channels, height // f, width // f), generators).to(device)

    cond = encode_text(model, prompts)
    if cfg == 1:
        denoise = denoiser(model.net, cond, model.prediction)
    else:
        denoise = guided(denoiser(model.net, cond.cat(encode_text(model, [negative] * len(prompts))), model.prediction), cfg)
    for x, _ in find_sampler(sampler)(denoise, x, levels, generators=generators, **options):
        on_step(len(prompts))
    return to_bytes(model.vae.decode(model.vae.from_latents(x).to(next(model.vae.parameters()).dtype)))


def to_bytes(pixels: Tensor) -> np.ndarray:
    """[b, 3, h, w] in [-1, 1] -> uint8 [b, h, w, 3]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_pixels(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [b, h, w, 3] -> float32 [b, 3, h, w] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
