"""Small models with random weights, for tests of what happens around them, and the pictures that they draw."""

from pathlib import Path

import numpy as np
import torch
from helpers import PROMPT, randomise, small_text
from safetensors.torch import save_file

from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.lpips import LPIPS, LPIPSConfig
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.pipeline import PromptFeatures, draw, draw_settings
from tinyldm.text.absent import AbsentText, AbsentTokenizer
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.vendor_loaders.families import FLOW
from tinyldm.vendor_loaders.scheduler import from_config, to_config

SEEDS = (3, 8)


def unet_model() -> Model:
    """A small Stable Diffusion 1, whose blocks are called in another order than they are defined in."""
    tokenizer, text = small_text()
    net = UNet(UNetConfig(widths=(16, 32), depth=1, attention=(True, True), heads=(4, 4), context_dim=32, groups=8, sample_size=8))
    config = to_config("scaled_linear", {}, "v", "ddim")
    return Model(randomise(net, 1), small_vae(4), TextEncoders([TextEncoder(randomise(CLIPText(text), 2), tokenizer)]),
                 *from_config(config), config, {"steps": 3, "cfg": 3.0})


def mmdit_model() -> Model:
    """A small Stable Diffusion 3 without its T5."""
    tokenizer, text = small_text()
    projected = CLIPTextConfig(**vars(text) | {"projection_dim": 16})
    encoders = [TextEncoder(randomise(CLIPText(projected), seed), tokenizer) for seed in (2, 4)]
    net = MMDiT(MMDiTConfig(in_channels=16, width=32, layers=4, heads=2, context_dim=64, pooled_dim=32, max_positions=12, sample_size=8))
    config = FLOW | {"shift": 3.0}
    text = TextEncoders([*encoders, TextEncoder(AbsentText(64, 8), AbsentTokenizer())], "sd3")
    return Model(randomise(net, 1), small_vae(16), text, *from_config(config), config, {"steps": 3, "cfg": 3.0})


def small_vae(channels: int) -> AutoencoderKL:
    return randomise(AutoencoderKL(VAEConfig(widths=(16, 32), depth=1, groups=8, latent_channels=channels)), 3)


def write_lpips(file: Path, seed: int = 0) -> str:
    """A small LPIPS of random weights under published names, trunk and linear layers in one file -> its path."""
    made = randomise(LPIPS(LPIPSConfig("vgg16", (4,) * 5)), seed)
    save_file({f"lin{name.split('.')[1]}.model.1.weight" if name.startswith("linears") else name: p.abs() if "linears" in name else p
               for name, p in made.named_parameters()}, file)
    return str(file)


MODELS = {"unet": unet_model, "mmdit": mmdit_model}


@torch.no_grad()
def drawn(model: Model, **options) -> np.ndarray:
    """Two pictures, as sample.py draws them: it has all prompts encoded first."""
    prompts, features = [PROMPT, "a small green triangle"], PromptFeatures(model)
    features.prepare(["", *prompts])
    return draw(model, prompts, SEEDS, draw_settings(model)._replace(**options), features=features)
