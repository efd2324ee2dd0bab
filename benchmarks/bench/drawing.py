"""Cases of `sample`: whole drawings from a caption to a picture, with guidance. All sides load one folder of random weights.

Stable Diffusion 1.5's shapes are beside diffusers' pipeline. Our DiT is in no other library: it is beside a plain loop over the same
network, written here as in a textbook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench.compare import TOLERANCE, Case, Options, Side, Work, with_compiled
from benchmarks.bench.pairs import (
    CLIP_L,
    CLIP_SMALL,
    CLIP_TINY,
    KL8,
    KL8_SMALL,
    KL8_TINY,
    PAIRS,
    SD1,
    SD1_SMALL,
    SD1_TINY,
    Row,
    our_network,
)
from tinyldm.cpu_layouts import lay_out
from tinyldm.device import DTYPES
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model
from tinyldm.model import Model, compile_blocks
from tinyldm.models.dit import DiTConfig
from tinyldm.pipeline import DrawSettings, draw, draw_settings
from tinyldm.planning.flops import MetaNetworks, count_flops, forwards
from tinyldm.shortcuts import find_shortcut
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.vendor_loaders.scheduler import to_config

PROMPT, SEED, SCALE = "a red square on the left of a blue circle", 3, 7.5
# By which pictures may differ, relative to their norm: float32 rounds differently in two libraries, and a byte here and there with it.
EIGHT_BITS = 2e-3
# The output of a random network has nothing to do with the noise in the picture. Where it is small, numbers stay near unit scale.
OUTPUT_SCALE = 0.1


class Approximation(NamedTuple):
    """A way to draw that changes the picture: its error is shown."""

    kinds: tuple[str, ...]                                      # of networks that it is for
    change: Callable[[Model, DrawSettings], DrawSettings]


def fewer_steps(model: Model, settings: DrawSettings) -> DrawSettings:
    return draw_settings(model, steps=max(1, settings.steps - 5), cfg=SCALE)


def shortened(name: str, value: float) -> Callable[[Model, DrawSettings], DrawSettings]:
    return lambda model, settings: settings._replace(shortcut=find_shortcut({name: value}, model.net))


APPROXIMATIONS = {
    "5 steps fewer": Approximation(("unet", "dit"), fewer_steps),
    "--deep-cache 3": Approximation(("unet",), shortened("deep_cache", 3)),
    "--deep-cache 5": Approximation(("unet",), shortened("deep_cache", 5)),
    "--first-block-cache 0.1": Approximation(("dit",), shortened("first_block_cache", 0.1)),
}


class Drawing(NamedTuple):
    """A kind of model, beside another way to draw with it."""

    name: str
    net: Row
    last: str                                                   # the network's last layer
    scheduler: dict
    peer: str
    theirs: Callable[[Path, Options, bool], Callable[[], np.ndarray]]       # folder, options, whether to compile -> draws [1, h, w, 3]


TEXT = Row("text", "clip", CLIP_L, {"full": ({}, 1, 77), "small": (CLIP_SMALL, 1, 77), "tiny": (CLIP_TINY, 1, 77)})
# Its side is the picture's.
VAE = Row("VAE", "decode", KL8, {"full": ({}, 1, 256), "small": (KL8_SMALL, 1, 128), "tiny": (KL8_TINY, 1, 64)})


def write_model(drawing: Drawing, options: Options) -> Path:
    """A whole model with random weights in the dtype in which it is drawn -> its folder."""
    folder = Path(options.folder) / f"{drawing.name}, {options.dtype}"
    if folder.exists():
        return folder
    dtype, scale = DTYPES[options.dtype], options.scale
    tokenizer = Tokenizer.train([PROMPT] * 3, 600, TEXT.config.context_length)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text = TEXT._replace(config=replace(TEXT.config, **ids))
    text, vae, net = (our_network(row, scale, torch.device("cpu"), dtype) for row in (text, VAE, drawing.net))
    with torch.no_grad():
        net.get_submodule(drawing.last).weight.mul_(OUTPUT_SCALE)
        vae.decoder.conv_out.weight.mul_(0.35)                  # little of a random picture is clipped
    save_model(folder, net=net, vae=vae, texts=[text], tokenizers=[tokenizer], scheduler=drawing.scheduler, defaults={})
    return folder


def ours(drawing: Drawing, options: Options, change: Callable[[Model, DrawSettings], DrawSettings], compiled: bool) -> Work:
    model = load_model(write_model(drawing, options), options.device, DTYPES[options.dtype])
    settings, side = change(model, draw_settings(model, steps=options.steps, cfg=SCALE)), VAE.at(options.scale)[2]
    if compiled:                                                # as sample.py does
        compile_blocks(model.net)
    elif options.device == "cpu":
        lay_out(model.net, model.vae)
    return picture(lambda: draw(model, [PROMPT], [SEED], settings, width=side, height=side), options)


def theirs(drawing: Drawing, options: Options, compiled: bool) -> Work:
    return picture(drawing.theirs(write_model(drawing, options), options, compiled), options)


def picture(call: Callable[[], np.ndarray], options: Options) -> Work:
    """call: draws uint8 [1, h, w, 3]. Pictures are compared with grey as 0."""
    call = torch.inference_mode()(call)
    return Work(call, torch.device(options.device), lambda: torch.from_numpy(call() / 127.5 - 1))


def noise(options: Options, channels: int) -> Tensor:
    """What draw() starts from."""
    side = VAE.at(options.scale)[2] // VAE.config.downscale
    return initial_noise((channels, side, side), make_generators([SEED])).to(options.device)


def diffusers_pipeline(folder: Path, options: Options, compiled: bool) -> Callable[[], np.ndarray]:
    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=DTYPES[options.dtype], safety_checker=None)
    pipeline.to(options.device).set_progress_bar_config(disable=True)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet)
    x, side = noise(options, pipeline.unet.config.in_channels).to(DTYPES[options.dtype]), VAE.at(options.scale)[2]
    drawn = lambda: pipeline(PROMPT, num_inference_steps=options.steps, guidance_scale=SCALE, latents=x, height=side, width=side,
                             output_type="np").images
    return lambda: (drawn() * 255).round().astype(np.uint8)


def plain_loop(folder: Path, options: Options, compiled: bool) -> Callable[[], np.ndarray]:
    """Euler's method on the flow's velocity, with classifier-free guidance (arXiv:2207.12598, Eq. 6) on a doubled batch."""
    model = load_model(folder, options.device, DTYPES[options.dtype])
    net = torch.compile(model.net) if compiled else model.net
    dtype, settings = DTYPES[options.dtype], draw_settings(model, steps=options.steps, cfg=SCALE)
    levels = grid(model.process, settings.steps, settings.schedule, **settings.sampling.grid)

    def drawn() -> np.ndarray:
        x, cond = noise(options, model.net.config.in_channels), model.text.encode([PROMPT, ""], model.device)
        for now, after in pairwise(levels):
            both = net(torch.cat([x, x]).to(dtype), x.new_full((2,), now.t), cond).float()
            conditional, unconditional = both.chunk(2)
            x = x + (after.sigma - now.sigma) * (unconditional + SCALE * (conditional - unconditional))
        pixels = model.vae.decode(model.vae.from_latents(x).to(dtype)).float()
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    return drawn


DRAWINGS = [
    Drawing("SD 1.5, a picture", Row("net", "unet", SD1, {
        "full": ({}, 2, 32), "small": (SD1_SMALL | dict(context_dim=CLIP_SMALL["width"]), 2, 16),
        "tiny": (SD1_TINY | dict(context_dim=CLIP_TINY["width"]), 2, 8)}),
        "conv_out", to_config("scaled_linear", {}, "eps", "ddim"), "diffusers", diffusers_pipeline),
    Drawing("DiT 16 x 1024, a picture", Row("net", "dit", DiTConfig(), {
        "full": ({}, 2, 32), "small": (dict(width=256, layers=8, heads=4, mlp_width=1024, context_dim=CLIP_SMALL["width"]), 2, 16),
        "tiny": (dict(width=64, layers=2, heads=2, mlp_width=128, context_dim=CLIP_TINY["width"]), 2, 8)}),
        "patch_out", to_config("flow", {}, "flow", "euler"), "plain loop", plain_loop),
]


def useful_flops(drawing: Drawing, options: Options) -> int:
    """Of two calls of the network in every step, the encoding of two captions, and decoding."""
    with torch.device("meta"):
        net, text, vae = (PAIRS[row.kind].module(row.at(options.scale)[0]) for row in (drawing.net, TEXT, VAE))
    calls = forwards(MetaNetworks(net, text, vae), VAE.at(options.scale)[2])
    of = {part: count_flops(calls[part]) for part in ("net", "text", "decode")}
    return 2 * options.steps * of["net"] + 2 * of["text"] + of["decode"]


def cases(options: Options) -> list[Case]:
    made, same = [], lambda model, settings: settings
    for drawing in DRAWINGS:
        sides = with_compiled(options, "tinyldm", partial(ours, drawing, options, same))
        if options.approximate:
            sides += [Side(f"tinyldm, {name}", partial(ours, drawing, options, row.change, False), exact=False)
                      for name, row in APPROXIMATIONS.items() if drawing.net.kind in row.kinds]
        if options.peer != "none":
            sides += with_compiled(options, drawing.peer, partial(theirs, drawing, options), peer=True)
        made.append(Case(f"{drawing.name}, {options.dtype}", sides, partial(useful_flops, drawing, options),
                         max(TOLERANCE[options.dtype], EIGHT_BITS),
                         partial(write_model, drawing, options)))
    return made
