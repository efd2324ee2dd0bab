"""Draws pictures from prompts, for all scripts: text encoders, sampler with guidance, VAE decoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinyldm.device import in_parts
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import (MIXES, Denoiser, SkipLayers, beside, denoiser, denoiser_with_variance, inpaint, interval,
                                        skip_layers, tell_elapsed)
from tinyldm.diffusion.guidance import cfg as guided
from tinyldm.diffusion.noise import initial_noise, make_generators, slerp
from tinyldm.diffusion.ode import invert
from tinyldm.diffusion.process import CLEAN, Level, Process, at_size
from tinyldm.diffusion.samplers import find_sampler, sampler_name
from tinyldm.lookup import lookup
from tinyldm.model import Model, architecture, is_compiled
from tinyldm.models.layers import Cond
from tinyldm.models.tiling import OVERLAP, PIXELS_AT_ONCE, TILE, decode_tiled, tiled
from tinyldm.pictures.pixels import to_bytes
from tinyldm.shortcuts import Shortcut, find_shortcut
from tinyldm.text.encoders import CAPTIONS_AT_ONCE
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
    told: float = 1.0       # the guidance scale that a network is told which was distilled from a guided one (FLUX dev)
    sizes: tuple[int, int, int, int] | None = None      # height, width, crop top and left of the picture that the training's picture
                                                        # would be cut from; None: it is not cut (arXiv:2307.01952, Sec. 2.2)
    skip: SkipLayers | None = None                      # for guidance.skip_layers
    shortcut: Shortcut | None = None                    # calls of the network that are shorter
    guidance: str = "cfg"                               # what is made of the two guesses: a key of guidance.MIXES
    worse: Model | None = None                          # to steer away from, in place of the negative prompt

    @property
    def guided(self) -> bool:
        """Whether the negative prompt has an effect: for a scale above 1. Any other means the prompt alone, as in all pipelines of
        diffusers, so that the guidance_scale=0 on the card of a distilled model draws here what it draws there. Little is lost:
        with scale 0, the formula in guidance.cfg would draw the negative prompt, which can be typed as the prompt."""
        return self.cfg > 1


# Further conditions of a network by name -> its value for one picture, from the settings and the picture's width and height.
EXTRAS: dict[str, Callable[[DrawSettings, int, int], Any]] = {
    "sizes": lambda settings, width, height: [*(settings.sizes or (height, width, 0, 0)), height, width],
    "guidance": lambda settings, width, height: settings.told,
    "elapsed": lambda settings, width, height: 0.0,             # in each step another: see tell_elapsed
}


def steps_needed(name: str, process: Process) -> int:
    """The steps below which a sampler draws no picture on a process: those that extrapolate from several earlier steps begin badly where
    the first level is pure noise (a flow, zero terminal SNR). 1 for all others."""
    return 50 if sampler_name(name) in ("lms", "pndm") and grid(at_size(process), 2)[0].alpha < 1e-3 else 1


def draw_settings(model: Model, *, sampler: str | None = None, schedule: str | None = None, steps: int | None = None,
                  cfg: float | None = None, true_cfg: float | None = None, guidance: str | None = None, worse: Model | None = None,
                  shortcuts: Mapping[str, float | None] = {}) -> DrawSettings:
    """Settings, where None is replaced by the model's own default (tinyldm.json), else by diffusers' default for such a folder: the
    scheduler that its config names, its pipeline's steps and guidance. 'dpmpp_2m_karras' names both a sampler and a schedule.

    cfg: as `guidance_scale` in diffusers. FLUX dev's network is told this number, and true_cfg is that of classifier-free guidance.
    guidance: a key of guidance.MIXES. worse: see DrawSettings. shortcuts: by name in shortcuts.SHORTCUTS; None: without.

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
    found = sampling(model.scheduler, named, schedule)          # refuses what the config bends, also where the pipeline's own times follow
    if schedule is None and "schedule" in defaults:
        found = sampling(model.scheduler, named, defaults["schedule"])
    count = len(grid(model.process, steps if steps is not None else defaults.get("steps", 50), found.schedule, **found.grid)) - 1
    if steps not in (None, count):
        raise ValueError(f"schedule {found.schedule} has {count} steps, not {steps}: leave the number out")
    scale, told = guidance_scales(model, cfg, true_cfg)
    lookup(MIXES, guidance or "cfg", "guidance")(scale, model.prediction, CLEAN)           # refuses a prediction that it is not for
    return DrawSettings(found.sampler, found.schedule, count, scale, found, told=told, shortcut=find_shortcut(shortcuts, model.net),
                        guidance=guidance or "cfg", worse=worse)


def guidance_scales(model: Model, cfg: float | None, true_cfg: float | None) -> tuple[float, float]:
    """(scale of classifier-free guidance, scale that the network is told). ValueError where the model has no use for one of them."""
    if model.defaults.get("distilled") and max(cfg or 0, true_cfg or 0) > 1:
        raise ValueError("this model was distilled to draw in a few steps without guidance: leave out --cfg and --true-cfg")
    own = model.defaults.get("cfg", 7.5)
    if "guidance" in architecture(model.net).extras(model.net.config):
        return 1.0 if true_cfg is None else true_cfg, own if cfg is None else cfg
    if true_cfg is not None:
        raise ValueError(f"--true-cfg {true_cfg} is for networks that are told a guidance scale (FLUX dev): use --cfg with this model")
    return own if cfg is None else cfg, 1.0


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


def all_captions(settings: DrawSettings, prompts: Iterable[str], negative: str | None = None, canvas: Canvas | None = None,
                 morph: Morph | None = None) -> list[str]:
    """All captions whose features `draw` needs for these prompts; the arguments are its own. A script that prepares them together uses
    each text encoder once. (draw() itself does not: the last bits of features depend on how many captions are encoded at once.)"""
    shown, end = canvas.shows if canvas else None, [morph.prompt] if morph else []
    return [*([negative or ""] if settings.guided else []), *([shown] if shown else []), *end, *prompts]


class PromptFeatures:
    """The text features of prompts, on the model's device. Each distinct prompt is encoded once, however often it is asked for."""

    def __init__(self, model: Model, weighted: bool = False):
        self.model, self.weighted = model, weighted
        self.known: dict[str, Cond] = {}                # prompt -> its condition, [1, ...]

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode the first 256 distinct ones of these prompts together, so that the text encoders are used once for many batches;
        forget all others (512 tokens of T5-XXL are 4 MB in bfloat16)."""
        kept = [*islice(dict.fromkeys(prompts), CAPTIONS_AT_ONCE)]
        self.known = {prompt: self.known[prompt] for prompt in kept if prompt in self.known}
        self(kept)

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Prompts -> Cond [b, ...]. Padding is masked if it was in training."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]:
            masked = self.model.defaults.get("mask_padding", False)
            encoded = self.model.text.encode(new, self.model.device, masked, self.weighted, self.model.at_work)
            self.known |= zip(new, encoded.tensor_split(len(new)))
        first, *others = (self.known[prompt] for prompt in prompts)
        return first.cat(*others)

    def negative(self, prompt: str | None, count: int) -> Cond:
        """The condition to steer away from, `count` times. None: the empty caption, or zeros where the model was trained on these."""
        cond = self([prompt or ""] * count)
        if prompt is None and self.model.defaults.get("zero_negative"):
            cond = replace(cond, context=torch.zeros_like(cond.context), pooled=torch.zeros_like(cond.pooled))
        return cond


def with_extras(model: Model, cond: Cond, settings: DrawSettings, width: int, height: int) -> Cond:
    """The condition with those that the network takes besides text, for pictures of this size in pixels."""
    values = {name: lookup(EXTRAS, name, "condition")(settings, width, height)
              for name in architecture(model.net).extras(model.net.config)}
    extra = {name: torch.tensor([value] * len(cond.context), dtype=torch.float32, device=cond.context.device)
             for name, value in values.items()}
    return replace(cond, extra=extra)


def remembering(net: nn.Module, cond: Cond) -> Cond:
    """The condition with a memo of its own, so that the network computes what depends on the text alone once, not in every step. A compiled
    network keeps nothing: it would be compiled again for each thing that it finds there."""
    return replace(cond, memo=None if is_compiled(net) else {})


def between(start: Cond, end: Cond, fractions: Tensor) -> Cond:
    """Text conditions at `fractions` [b] between start and end; every token is interpolated spherically. A token that only one of two
    captions has takes part in attention with that fraction as its weight: so a morph begins and ends at the two pictures."""
    arc = lambda a, b: None if a is None else slerp(a.float(), b.float(), fractions.view(-1, *[1] * (a.dim() - 1))).to(a.dtype)
    mask = None if start.mask is None else torch.lerp(start.mask.float(), end.mask.float(), fractions.view(-1, 1))
    return Cond(arc(start.context, end.context), mask, arc(start.pooled, end.pooled))


def conditional_denoisers(model: Model, levels: Sequence[Level], make: Callable[..., Denoiser],
                          shortcut: Shortcut | None = None) -> Callable[..., Denoiser]:
    """condition -> the model's denoiser without guidance. make: guidance.denoiser or denoiser_with_variance."""
    net, dtype = model.net, next(model.net.parameters()).dtype
    told = tell_elapsed(net, levels) if "elapsed" in architecture(net).extras(net.config) else net

    def conditional(cond: Cond, **options: Any) -> Denoiser:
        denoise = make(lambda x, t, cond: told(x.to(dtype), t, cond, **options), remembering(net, cond), model.prediction)
        return denoise if shortcut is None else shortcut.wrap(denoise, net, levels)
    return conditional


def guide(conditional: Callable[..., Denoiser], cond: Cond, negative: Cond | None, settings: DrawSettings, prediction: str,
          levels: Sequence[Level], worse: Callable[..., Denoiser] | None = None) -> Denoiser:
    """A denoiser with the guidance of the settings. conditional: condition -> denoiser without guidance; negative: the condition to
    steer away from, or worse: as `conditional`, of a model to steer away from."""
    def without_layers(denoise: Denoiser, copies: int) -> Denoiser:
        if settings.skip is None:
            return denoise
        return skip_layers(denoise, conditional(cond, skip_layers=settings.skip.layers), settings.skip, levels, copies)

    plain = without_layers(conditional(cond), 1)
    if not settings.guided:
        return plain
    both = conditional(cond.cat(negative)) if worse is None else beside(conditional(cond), worse(cond))
    noise = levels[0] if levels[0].alpha < 0.01 else None       # a grid from noise has 0 or 0.001 there, one that begins at a picture more
    mix = MIXES[settings.guidance](settings.cfg, prediction, noise)
    denoise = guided(without_layers(both, 2), settings.cfg, settings.rescale, prediction, mix)
    return denoise if settings.interval is None else interval(denoise, plain, *settings.interval)


@torch.no_grad()
def draw(model: Model, prompts: Sequence[str], seeds: Sequence[int], settings: DrawSettings, *, negative: str | None = None,
         width: int = 0, height: int = 0, eta: float | None = None, canvas: Canvas | None = None, morph: Morph | None = None,
         features: PromptFeatures | None = None, on_step: Callable[[Tensor], None] = lambda x0: None) -> np.ndarray:
    """Draw one picture per (prompt, seed), as one batch -> uint8 [b, height, width, 3].

    Image i's noise is a function of seeds[i] alone, never of the batch. width and height default to those of the canvas, else of
    the model. negative: see PromptFeatures.negative. on_step: called after every step with the current prediction of the clean
    latents [b, c, h, w]. features: those of earlier calls, so that no prompt is encoded twice.
    morph: interpolate towards another picture. Pass the same seed for all, so that stochastic samplers add the same noise to all.
    """
    width, height = picture_size(model, width, height) if canvas is None else canvas.pixels.shape[:1:-1]
    check_size(model, width, height)
    chosen, f = settings.sampling, model.vae.config.downscale
    options = chosen.options | ({} if eta is None else {"eta": eta})
    levels = grid(at_size(model.process, height * width // model.divisor**2), settings.steps, chosen.schedule,
                  strength=1.0 if canvas is None else canvas.strength, **chosen.grid)
    generators = make_generators(seeds)
    noise = initial_noise((model.vae.config.latent_channels, height // f, width // f), generators).to(model.device)

    features = PromptFeatures(model, settings.weighted) if features is None else features
    cond = features(prompts)
    if morph is not None:
        fractions = torch.tensor(morph.fractions, device=noise.device)                  # [b]
        end = initial_noise(noise.shape[1:], make_generators([morph.seed])).to(noise)
        noise = slerp(noise, end, fractions.view(-1, 1, 1, 1), (1, 2, 3))
        cond = between(cond, features([morph.prompt]), fractions)
    described = lambda cond: with_extras(model, cond, settings, width, height)
    unwanted = described(features.negative(negative, len(seeds))) if settings.guided and settings.worse is None else None

    make = denoiser_with_variance if chosen.sampler == "ddpm" else denoiser     # only ddpm uses a learned variance
    conditional, worse = (None if each is None else conditional_denoisers(each, levels, make, settings.shortcut)
                          for each in (model, settings.worse))
    denoise = guide(conditional, described(cond), unwanted, settings, model.prediction, levels, worse)
    if canvas is None:
        x = levels[0].sigma * noise if chosen.start_at_sigma else noise
    else:
        plain = lambda captions: conditional_denoisers(model, levels, make)(described(features(captions)))
        x, known = start_from(model, canvas, levels, noise, prompts, plain, on_step)
        if canvas.mask is not None:
            cells = torch.nn.functional.max_pool2d(canvas.mask.to(x), f)                # a latent that the mask touches is drawn
            denoise = inpaint(denoise, known, cells)
    with model.at_work("net"):
        for x, x0 in find_sampler(chosen.sampler)(denoise, x, levels, generators=generators, **options):
            on_step(x0)
    with model.at_work("vae"):
        pixels = decode(model.vae, x)
    if canvas is not None and canvas.mask is not None:
        pixels = torch.lerp(canvas.pixels.to(pixels), pixels, canvas.mask.to(pixels))   # outside the mask nothing changes at all
    return to_bytes(pixels)


def start_from(model: Model, canvas: Canvas, levels: Sequence[Level], noise: Tensor, prompts: Sequence[str],
               captioned: Callable[[Sequence[str]], Denoiser], on_step: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
    """The canvas's picture at the first noise level, with the given noise or with its own, found by inversion. -> (noisy latents,
    clean latents)."""
    with model.at_work("vae"):
        known = encode(model.vae, canvas.pixels.to(noise.device))                       # [1, c, h, w]
    if canvas.shows is None:
        return levels[0].alpha * known + levels[0].sigma * noise, known
    captions = [canvas.shows] if canvas.shows else prompts
    known = x = known.expand(len(captions), -1, -1, -1)
    denoise = captioned(captions)
    with model.at_work("net"):
        for x, x0 in invert(denoise, known, levels):
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
    row, downscale, config = architecture(model.net), model.vae.config.downscale, model.net.config
    if row.enlarged(config, max(width, height) // downscale):
        largest = max(side for side in range(f, max(width, height), f) if not row.enlarged(config, side // downscale))
        raise ValueError(f"{width}x{height} pixels have more positions than this network's table: at most {largest} on each side")
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
    z = tiled(means, pixels, 1 / f, tile=TILE * f, overlap=OVERLAP * f) if large else means(pixels)
    return vae.to_latents(z.float())


def decode(vae: nn.Module, x: Tensor) -> Tensor:
    """Standardised latents -> pixels: small pictures in batches (of 4 at 512 px, 16 at 256), which are halved where memory runs out,
    larger ones one by one, the largest in tiles. ValueError where the pixels are not finite (they would be written as black)."""
    pixels = decode_unchecked(vae, x)
    if not pixels.isfinite().all():
        raise ValueError("the pictures are not finite numbers: use --dtype fp32 (float16 overflows in some models) or a lower --cfg")
    return pixels


def decode_unchecked(vae: nn.Module, x: Tensor) -> Tensor:
    """The same with any pixels: on the meta device there are no numbers to check."""
    z = vae.from_latents(x).to(next(vae.parameters()).dtype)
    area, f = z.shape[2] * z.shape[3] * vae.config.downscale**2, vae.config.downscale
    tiles = lambda part: decode_tiled(vae.decode_fine, vae.decode_coarse(part), f)
    return torch.cat([*in_parts(tiles if area > PIXELS_AT_ONCE else vae.decode, z, max(1, PIXELS_AT_ONCE // area))])
