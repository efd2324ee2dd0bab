"""Draws pictures from prompts, for all scripts: text encoders, sampler with guidance, VAE decoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinyldm.device import in_parts
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import Denoiser, denoiser, denoiser_with_variance, inpaint, interval
from tinyldm.diffusion.guidance import cfg as guided
from tinyldm.diffusion.noise import initial_noise, make_generators, slerp
from tinyldm.diffusion.ode import invert
from tinyldm.diffusion.process import Level
from tinyldm.diffusion.samplers import find_sampler, sampler_name
from tinyldm.model import Model, architecture
from tinyldm.models.layers import Cond
from tinyldm.models.tiling import PIXELS_AT_ONCE, decode_tiled, tiled
from tinyldm.pictures.pixels import to_bytes
from tinyldm.vendor_loaders.scheduler import Sampling, sampling

# Published U-Nets that cannot draw from noise alone, by the channels that they take in addition to those of the latents.
FURTHER_INPUTS = {1: "a depth map", 3: "a small picture to enlarge", 4: "a picture to edit", 5: "a mask and the masked picture, to inpaint"}


class DrawSettings(NamedTuple):
    """How to draw pictures. The first five have defaults that depend on the model."""

    sampler: str            # name as typed or by default, for messages
    schedule: str           # name of the grid of noise levels
    steps: int
    cfg: float              # guidance scale; at most 1: no guidance, see `guided`
    sampling: Sampling      # sampler and grid with their options
    rescale: float = 0.0    # in [0, 1], for guidance.cfg
    interval: tuple[float, float] | None = None     # the range of sigma / alpha with guidance, for guidance.interval; None: all
    weighted: bool = False  # captions contain weights, as in "a (fox:1.3)": text/prompt_weights.py

    @property
    def guided(self) -> bool:
        """Whether the negative prompt has an effect: for a scale above 1. Any other means the prompt alone, as in all pipelines of
        diffusers, so that the guidance_scale=0 on the card of a distilled model draws here what it draws there. Little is lost:
        with scale 0, the formula in guidance.cfg would draw the negative prompt, which can be typed as the prompt."""
        return self.cfg > 1


def draw_settings(model: Model, *, sampler: str | None = None, schedule: str | None = None, steps: int | None = None,
                  cfg: float | None = None) -> DrawSettings:
    """Settings, where None is replaced by the model's own default (tinyldm.json), else by diffusers' default for such a folder: the
    scheduler that its config names, 50 steps, guidance 7.5. 'dpmpp_2m_karras' names both a sampler and a schedule.

    ValueError for unknown names, for steps and schedules that do not fit the model's process, and for two that exclude each other.
    """
    defaults = model.defaults
    named = sampler if sampler is not None else defaults.get("sampler")
    if named is not None:
        spelled = re.sub(r"[ _-]karras$", "", named.strip(), flags=re.IGNORECASE)
        if spelled != named.strip() and sampler is not None and schedule not in (None, "karras"):
            raise ValueError(f"sampler {sampler} and schedule {schedule} name two schedules: leave one out")
        schedule = schedule or ("karras" if spelled != named.strip() else None)
        named = sampler_name(spelled)
    found = sampling(model.scheduler, named, schedule)
    count = len(grid(model.process, steps if steps is not None else defaults.get("steps", 50), found.schedule, **found.grid)) - 1
    if steps not in (None, count):
        raise ValueError(f"schedule {found.schedule} has {count} steps, not {steps}: leave the number out")
    return DrawSettings(found.sampler, found.schedule, count, cfg if cfg is not None else defaults.get("cfg", 7.5), found)


class Morph(NamedTuple):
    """The end of an interpolation between two pictures, and the fraction at which each drawn picture lies."""

    prompt: str
    seed: int
    fractions: Sequence[float]          # one per picture: at 0 it is the first picture, at 1 that of this prompt and seed


class Canvas(NamedTuple):
    """A picture to start from, and where to draw on it."""

    pixels: Tensor                  # [1, 3, h, w] in [-1, 1]
    strength: float                 # in (0, 1]: the fraction of the steps that is run, so how much may change
    mask: Tensor | None = None      # [1, 1, h, w] in [0, 1], 1 where to draw; None: everywhere
    shows: str | None = None        # its caption: start from its own noise, found by inversion; "": the prompt; None: random noise


def encode_prompts(model: Model, prompts: Sequence[str], weighted: bool = False) -> Cond:
    """Prompts -> Cond on the network's device. Padding is masked if it was in training."""
    device = next(model.net.parameters()).device
    return model.text.encode(prompts, device, model.defaults.get("mask_padding", False), weighted)


def between(start: Cond, end: Cond, fractions: Tensor) -> Cond:
    """Conditions at `fractions` [b] between start and end; every token is interpolated spherically. A token that only one of two
    captions has takes part in attention with that fraction as its weight: so a morph begins and ends at the two pictures."""
    arc = lambda a, b: None if a is None else slerp(a.float(), b.float(), fractions.view(-1, *[1] * (a.dim() - 1))).to(a.dtype)
    mask = None if start.mask is None else torch.lerp(start.mask.float(), end.mask.float(), fractions.view(-1, 1))
    extra = {name: arc(value, end.extra[name]) for name, value in start.extra.items()}
    return Cond(arc(start.context, end.context), mask, arc(start.pooled, end.pooled), extra)


def guide(conditional: Callable[[Cond], Denoiser], cond: Cond, negative: Cond, settings: DrawSettings, prediction: str) -> Denoiser:
    """A denoiser with the guidance of the settings. conditional: condition -> denoiser without guidance."""
    denoise = guided(conditional(cond.cat(negative)), settings.cfg, settings.rescale, prediction)
    return denoise if settings.interval is None else interval(denoise, conditional(cond), *settings.interval)


@torch.no_grad()
def draw(model: Model, prompts: Sequence[str], seeds: Sequence[int], settings: DrawSettings, *, negative: str = "", width: int = 0,
         height: int = 0, eta: float | None = None, canvas: Canvas | None = None, morph: Morph | None = None,
         on_step: Callable[[Tensor], None] = lambda x0: None) -> np.ndarray:
    """Draw one picture per (prompt, seed), as one batch -> uint8 [b, height, width, 3].

    Image i's noise is a function of seeds[i] alone, never of the batch. width and height default to those of the canvas, else of
    the model. on_step: called after every step with the current prediction of the clean latents [b, c, h, w].
    morph: interpolate towards another picture. Pass the same seed for all, so that stochastic samplers add the same noise to all.
    """
    width, height = picture_size(model, width, height) if canvas is None else canvas.pixels.shape[:1:-1]
    check_size(model, width, height)
    parameter, chosen = next(model.net.parameters()), settings.sampling
    options = chosen.options | ({} if eta is None else {"eta": eta})
    strength = 1.0 if canvas is None else canvas.strength
    levels = grid(model.process, settings.steps, chosen.schedule, strength=strength, **chosen.grid)
    generators, f = make_generators(seeds), model.vae.config.downscale
    noise = initial_noise((model.vae.config.latent_channels, height // f, width // f), generators).to(parameter.device)

    cond = encode_prompts(model, prompts, settings.weighted)
    if morph is not None:
        fractions = torch.tensor(morph.fractions, device=noise.device)                  # [b]
        end = initial_noise(noise.shape[1:], make_generators([morph.seed])).to(noise)
        noise = slerp(noise, end, fractions.view(-1, 1, 1, 1), (1, 2, 3))
        cond = between(cond, encode_prompts(model, [morph.prompt], settings.weighted), fractions)

    net = lambda x, t, cond: model.net(x.to(parameter.dtype), t, cond)
    make = denoiser_with_variance if chosen.sampler == "ddpm" else denoiser     # only ddpm uses a learned variance
    conditional = lambda cond: make(net, cond, model.prediction)
    denoise = conditional(cond)
    if settings.guided:
        unwanted = encode_prompts(model, [negative] * len(seeds), settings.weighted)
        denoise = guide(conditional, cond, unwanted, settings, model.prediction)
    if canvas is None:
        x = levels[0].sigma * noise if chosen.start_at_sigma else noise
    else:
        plain = lambda captions: denoiser(net, encode_prompts(model, captions, settings.weighted), model.prediction)
        x, known = start_from(model, canvas, levels, noise, prompts, plain, on_step)
        if canvas.mask is not None:
            cells = torch.nn.functional.max_pool2d(canvas.mask.to(x), f)                # a latent that the mask touches is drawn
            denoise = inpaint(denoise, known, cells)
    for x, x0 in find_sampler(chosen.sampler)(denoise, x, levels, generators=generators, **options):
        on_step(x0)
    pixels = decode(model.vae, x)
    if canvas is not None and canvas.mask is not None:
        pixels = torch.lerp(canvas.pixels.to(pixels), pixels, canvas.mask.to(pixels))   # outside the mask nothing changes at all
    return to_bytes(pixels)


def start_from(model: Model, canvas: Canvas, levels: Sequence[Level], noise: Tensor, prompts: Sequence[str],
               captioned: Callable[[Sequence[str]], Denoiser], on_step: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
    """The canvas's picture at the first noise level, with the given noise or with its own, found by inversion. -> (noisy latents,
    clean latents)."""
    known = encode(model.vae, canvas.pixels.to(noise.device))                           # [1, c, h, w]
    if canvas.shows is None:
        return levels[0].alpha * known + levels[0].sigma * noise, known
    captions = [canvas.shows] if canvas.shows else prompts
    known = x = known.expand(len(captions), -1, -1, -1)
    for x, x0 in invert(captioned(captions), known, levels):
        on_step(x0.expand_as(noise))
    return x.expand_as(noise), known


def picture_size(model: Model, width: int = 0, height: int = 0) -> tuple[int, int]:
    """(width, height) in pixels, where 0 is replaced by the size that the model was trained at."""
    latent = architecture(model.net).trained_size(model.net.config)     # None: the network has no such field, the VAE has
    size, unit = (latent, model.vae.config.downscale) if latent else (model.vae.config.sample_size, 1)
    size, unit = (model.defaults["resolution"], 1) if "resolution" in model.defaults else (size, unit)
    own_height, own_width = size if isinstance(size, tuple) else (size, size)
    return width or own_width * unit, height or own_height * unit


def check_size(model: Model, width: int, height: int) -> None:
    """ValueError for sizes that the model cannot draw, and for networks that need inputs other than noise and text."""
    f = model.divisor
    for size in (width, height):
        if size % f:
            raise ValueError(f"image size {size} is not a multiple of {f}: use {size // f * f or f} or {(size // f + 1) * f}")
    if (takes := model.net.config.in_channels) != (channels := model.vae.config.latent_channels):
        needs = FURTHER_INPUTS.get(takes - channels)
        why = f"it also needs {needs}" if needs else "they are not of the same model"
        raise ValueError(f"the network takes {takes} channels, the VAE makes {channels}: {why}, so it cannot be drawn with; "
                         "any ordinary model inpaints with --mask")


def encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Pixels [b, 3, h, w] in [-1, 1] -> standardised latents [b, c, h/f, w/f], float32: the mean of the posterior."""
    means, f = lambda part: vae.encode(part).mean, vae.config.downscale
    pixels = pixels.to(next(vae.parameters()).dtype)
    large = pixels.shape[2] * pixels.shape[3] > PIXELS_AT_ONCE
    z = tiled(means, pixels, 1 / f, tile=64 * f, overlap=16 * f) if large else means(pixels)
    return vae.to_latents(z.float())


def decode(vae: nn.Module, x: Tensor) -> Tensor:
    """Standardised latents -> pixels: small pictures in batches (of 4 at 512 px, 16 at 256), which are halved where memory runs out,
    larger ones one by one, the largest in tiles. ValueError where the pixels are not finite (they would be written as black)."""
    z = vae.from_latents(x).to(next(vae.parameters()).dtype)
    area, f = z.shape[2] * z.shape[3] * vae.config.downscale**2, vae.config.downscale
    tiles = lambda part: decode_tiled(vae.decode_fine, vae.decode_coarse(part), f)
    pixels = torch.cat([*in_parts(tiles if area > PIXELS_AT_ONCE else vae.decode, z, max(1, PIXELS_AT_ONCE // area))])
    if not pixels.isfinite().all():
        raise ValueError("the pictures are not finite numbers: use --dtype fp32 (float16 overflows in some models) or a lower --cfg")
    return pixels
