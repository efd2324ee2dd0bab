"""From prompts to pictures: text encoder, sampler with guidance, VAE decoder. What every script draws with."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyldm.animation import Morph, slerp
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import cfg as guided
from tinyldm.diffusion.guidance import Denoiser, denoiser, inpaint, interval
from tinyldm.diffusion.ode import invert
from tinyldm.diffusion.samplers import find_sampler, sampler_name
from tinyldm.noise import initial_noise, make_generators
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.tiling import decode_tiled, tiled
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.prompts import plain, token_weights
from tinyldm.training import checkpoint
from tinyldm.vendor_loaders import hub
from tinyldm.vendor_loaders.folder import read_json
from tinyldm.vendor_loaders.load import FILES, VAE, Model
from tinyldm.vendor_loaders.scheduler import Sampling, sampling

ONE_BY_ONE, TILED = 512 * 512, 1024 * 1024      # pixels of a picture above which the VAE decodes singly, and in tiles


def find_model(path: str | None, runs: Path = Path("runs")) -> Path | str:
    """The model that a person means: a model folder, a checkpoint file or hub id as it is, the newest checkpoint of a run
    folder, or, for None, of the run that finished last under `runs`. ValueError with what to do where there is none."""
    if path is None:
        finished = [last for run in runs.glob("*") for last in checkpoint.names(run)[-1:]
                    if checkpoint.read_state(last).get("finished")]
        if not finished:
            raise ValueError(f"no finished run under {runs}/: train one with 'python train.py --preset tiny', "
                             "or name a run or model folder with --model")
        return max(finished, key=lambda last: (last / "state.json").stat().st_mtime) / "model"
    folder = Path(path)
    if hub.is_hub_id(path):
        return path
    if not folder.exists():
        raise ValueError(f"{folder} does not exist: name a run, a model folder, a checkpoint file or a hub id such as "
                         "stable-diffusion-v1-5/stable-diffusion-v1-5")
    if (folder / "model_index.json").exists() or folder.suffix in FILES:
        return folder
    if (folder / "model" / "model_index.json").exists():
        return folder / "model"
    trained = [last for last in checkpoint.names(folder) if (last / "model").is_dir()]
    if not trained and (folder / "config.json").exists():
        config = read_json(folder / "config.json", "name a run or a model folder")
        raise ValueError(f"{folder} has no checkpoint of its network yet: train on with --resume auto" if "preset" in config
                         else f"{folder} is one part of a model: name the folder around it")
    if not trained:
        raise ValueError(f"{folder} is neither a run, a model folder nor a checkpoint file ({', '.join(FILES)})")
    return trained[-1] / "model"


class Settings(NamedTuple):
    """How to draw, beside what. The first five have defaults of the model's own."""

    sampler: str            # as typed or by default, for people to read
    schedule: str
    steps: int
    cfg: float
    how: Sampling
    rescale: float = 0.0    # in [0, 1]: `guidance.cfg`
    interval: tuple[float, float] | None = None     # of sigma / alpha in which there is guidance: `guidance.interval`
    weighted: bool = False  # captions hold weights, as in "a (fox:1.3)": prompts.py


def settings(model: Model, *, sampler: str | None = None, schedule: str | None = None, steps: int | None = None,
             cfg: float | None = None) -> Settings:
    """Fill what is None: from the model's own defaults (tinyldm.json), else as diffusers draws with such a folder: the
    scheduler that its config names, 50 steps, guidance 7.5. 'dpmpp_2m_karras' names sampler and schedule at once.

    ValueError for names that nobody knows and for steps and schedules that do not fit the model's process.
    """
    defaults = model.defaults
    sampler = sampler if sampler is not None else defaults.get("sampler")
    if sampler is not None:
        spelled = re.sub(r"[ _-]karras$", "", sampler.strip(), flags=re.IGNORECASE)
        schedule = "karras" if spelled != sampler.strip() else schedule
        sampler = sampler_name(spelled)
    how = sampling(model.scheduler, sampler, schedule)
    steps = steps if steps is not None else defaults.get("steps", 50)
    grid(model.process, steps, how.schedule, **how.grid)
    return Settings(how.sampler, how.schedule, steps, cfg if cfg is not None else defaults.get("cfg", 7.5), how)


class Canvas(NamedTuple):
    """A picture to start from, and where to draw on it."""

    pixels: Tensor                  # [1, 3, h, w] in [-1, 1]
    strength: float                 # in (0, 1]: the share of the steps that is run, so how much may change
    mask: Tensor | None = None      # [1, 1, h, w] in [0, 1], 1 where to draw; None: everywhere
    shows: str | None = None        # its caption: start from the noise that it is drawn from, found by inversion; "": the prompt


def encode_text(model: Model, texts: Sequence[str], weighted: bool = False) -> Cond:
    """Prompts -> Cond with context [b, n, d]. Padding is attended to, or not, as it was in training.

    weighted: a token's features are multiplied by its weight, nothing else changes, `pooled` neither. (AUTOMATIC1111's
    "No norm". Its "Original" then scales all by one number to restore their mean, which may be anywhere near 0.)
    """
    device = next(model.text.parameters()).device
    captions = [plain(text) for text in texts] if weighted else list(texts)
    cond = encode_tokens(model.text, torch.from_numpy(model.tokenizer.encode(captions)), device,
                         model.defaults.get("mask_padding", False))
    if not weighted:
        return cond
    weights = torch.tensor([token_weights(model.tokenizer, text) for text in texts]).to(cond.context)        # [b, n]
    return replace(cond, context=cond.context * weights[..., None])


def encode_tokens(text: CLIPText, ids: Tensor, device: torch.device, mask_padding: bool = False, cut: bool = False) -> Cond:
    """Token ids [b, n] on the CPU -> Cond on the device; captions that are equal are encoded once.

    mask_padding: the network attends to a caption up to its EOS. Only then can `cut` shorten all to about the longest one
    without changing the result (CLIP's attention is causal): to a multiple of 16, so that few shapes are compiled for.
    """
    distinct, places = ids.unique(dim=0, return_inverse=True)
    mask = None
    if mask_padding:
        ends = text.ends(distinct)
        distinct = distinct[:, :-(-(int(ends.max()) + 1) // 16) * 16] if cut else distinct
        mask = (torch.arange(distinct.shape[1]) <= ends[:, None])[places].to(device, non_blocking=True)
    features, places = text(distinct.to(device, non_blocking=True)), places.to(device, non_blocking=True)
    return Cond(features.hidden[places], mask, features.pooled[places])


def towards(cond: Cond, there: Cond, share: Tensor) -> Cond:
    """Conditions share [b] of the way from cond to there, every token along its own arc."""
    bend = lambda a, b: None if a is None else slerp(a.float(), b.float(), share.view(-1, *[1] * (a.dim() - 1))).to(a.dtype)
    mask = None if cond.mask is None else cond.mask | there.mask
    return Cond(bend(cond.context, there.context), mask, bend(cond.pooled, there.pooled))


def guide(ask: Callable[[Cond], Denoiser], cond: Cond, negative: Cond, how: Settings, prediction: str) -> Denoiser:
    """The denoiser with the guidance that `how` asks for; `ask` makes a plain one for a condition."""
    denoise = guided(ask(cond.cat(negative)), how.cfg, how.rescale, prediction)
    return denoise if how.interval is None else interval(denoise, ask(cond), *how.interval)


@torch.no_grad()
def draw(model: Model, prompts: Sequence[str], seeds: Sequence[int], how: Settings, *, negative: str = "", width: int = 0,
         height: int = 0, eta: float | None = None, canvas: Canvas | None = None, morph: Morph | None = None,
         on_step: Callable[[Tensor], None] = lambda x0: None) -> np.ndarray:
    """One picture per (prompt, seed), as one batch -> uint8 [b, height, width, 3].

    Image i's noise is a function of seeds[i] alone, never of the batch. width and height default to the canvas's, or
    the model's own. on_step is called after every step with the current guess of the clean latents [b, c, h, w].
    morph: pictures on their way to another; give all the same seed, and the noise that random samplers add is the same.
    """
    check_size(model, *(size := picture_size(model, width, height) if canvas is None else canvas.pixels.shape[:1:-1]))
    parameter = next(model.net.parameters())
    sampler, options = find_sampler(how.how.sampler), how.how.options | ({} if eta is None else {"eta": eta})
    strength = 1.0 if canvas is None else canvas.strength
    levels = grid(model.process, how.steps, how.how.schedule, strength=strength, **how.how.grid)
    generators, f = make_generators(seeds), model.vae.config.downscale
    noise = initial_noise((model.vae.config.latent_channels, size[1] // f, size[0] // f), generators).to(parameter.device)

    cond = encode_text(model, prompts, how.weighted)
    if morph is not None:
        share = torch.tensor(morph.shares, device=noise.device)                         # [b]
        there = initial_noise(noise.shape[1:], make_generators([morph.seed])).to(noise)
        noise = slerp(noise, there, share.view(-1, 1, 1, 1), (1, 2, 3))
        cond = towards(cond, encode_text(model, [morph.prompt], how.weighted), share)

    net, spread = lambda x, t, cond: model.net(x.to(parameter.dtype), t, cond), []
    ask = lambda cond: denoiser(net, cond, model.prediction, spread)
    denoise = ask(cond)
    if how.cfg != 1:
        denoise = guide(ask, cond, encode_text(model, [negative] * len(seeds), how.weighted), how, model.prediction)
    if how.sampler == "ddpm" and model.net.config.out_channels == 2 * noise.shape[1]:   # the variance is learned
        options = options | {"spread": lambda: spread[0][: len(noise)]}
    if canvas is None:
        x = levels[0].sigma * noise if how.how.start_at_sigma else noise
    else:
        known = encode(model.vae, canvas.pixels.to(parameter.device))                   # [1, c, h, w]
        x = levels[0].alpha * known + levels[0].sigma * noise
        if canvas.shows is not None:
            captions = [canvas.shows] if canvas.shows else prompts
            known = known.expand(len(captions), -1, -1, -1)
            for x, x0 in invert(ask(encode_text(model, captions, how.weighted)), known, levels):
                on_step(x0.expand_as(noise))
            x = x.expand_as(noise)
        if canvas.mask is not None:
            cells = torch.nn.functional.max_pool2d(canvas.mask.to(x), f)                # a latent that is touched is drawn
            denoise = inpaint(denoise, known, cells)
    for x, x0 in sampler(denoise, x, levels, generators=generators, **options):
        on_step(x0)
    pixels = decode(model.vae, x)
    if canvas is not None and canvas.mask is not None:
        pixels = torch.lerp(canvas.pixels.to(pixels), pixels, canvas.mask.to(pixels))   # what was to stay stays exactly
    return to_bytes(pixels)


def picture_size(model: Model, width: int = 0, height: int = 0) -> tuple[int, int]:
    """(width, height) in pixels, what is 0 replaced by the model's own: what it was trained at."""
    trained = (model.net.config.sample_size * model.vae.config.downscale if isinstance(model.net, UNet)
               else model.vae.config.sample_size)
    own = model.defaults.get("resolution", trained)
    return width or own, height or own


def unit(model: Model) -> int:
    """Width and height of pictures are multiples of this: the VAE's downscale times what the network divides by."""
    return unit_of(model.net.config, model.vae.config.downscale)


def unit_of(network: UNetConfig | DiTConfig, downscale: int) -> int:
    """The same, before there is a model."""
    return downscale * (2 ** (len(network.widths) - 1) if isinstance(network, UNetConfig) else network.patch)


def check_size(model: Model, width: int, height: int) -> None:
    """ValueError for sizes that the model cannot draw, and for networks that draw only with more than noise and text."""
    f = unit(model)
    for size in (width, height):
        if size % f:
            raise ValueError(f"image size {size} is not a multiple of {f}: use {size // f * f or f} or {(size // f + 1) * f}")
    if (takes := model.net.config.in_channels) != (channels := model.vae.config.latent_channels):
        raise ValueError(f"the network takes {takes} channels, the VAE makes {channels}: models made for inpainting alone "
                         "cannot be drawn with; any ordinary model inpaints with --mask")


def encode(vae: VAE, pixels: Tensor) -> Tensor:
    """Pixels [b, 3, h, w] in [-1, 1] -> standardised latents [b, c, h/f, w/f], float32: the posterior's mean."""
    means, f = lambda some: vae.encode(some).mean, vae.config.downscale
    pixels = pixels.to(next(vae.parameters()).dtype)
    large = pixels.shape[2] * pixels.shape[3] > TILED
    z = tiled(means, pixels, 1 / f, tile=64 * f, overlap=16 * f) if large else means(pixels)
    return vae.to_latents(z.float())


def decode(vae: VAE, x: Tensor) -> Tensor:
    """Standardised latents -> pixels, in one pass where they are small, else one by one, else in tiles.

    ValueError where they are not finite, which would be drawn as black.
    """
    z = vae.from_latents(x).to(next(vae.parameters()).dtype)
    area = z.shape[2] * z.shape[3] * vae.config.downscale**2
    if area > TILED:
        pixels = torch.cat([decode_tiled(vae.decode_fine, vae.decode_coarse(one), vae.config.downscale) for one in z.split(1)])
    else:
        pixels = torch.cat([vae.decode(part) for part in z.split(1 if area > ONE_BY_ONE else len(z))])
    if not pixels.isfinite().all():
        raise ValueError("the pictures are not finite numbers: use --dtype fp32 (float16 overflows in some models) or a lower --cfg")
    return pixels


def to_bytes(pixels: Tensor) -> np.ndarray:
    """[b, 3, h, w] in [-1, 1] -> uint8 [b, h, w, 3]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_pixels(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [b, h, w, 3] -> float32 [b, 3, h, w] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).to(torch.float32, copy=True).div_(127.5).sub_(1)
