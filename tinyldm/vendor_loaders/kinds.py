"""The kinds of network that a model is made of, and how each is stored: one table that saving and loading share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor, nn

from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.taesd import TAESD
from tinyldm.models.unet import UNet
from tinyldm.models.vae import AutoencoderKL
from tinyldm.vendor_loaders import clip, taesd
from tinyldm.vendor_loaders import unet as unets
from tinyldm.vendor_loaders import vae as vaes
from tinyldm.vendor_loaders.rename import Layout

StateDict = Mapping[str, Tensor]
VAE = AutoencoderKL | TAESD

OWN_DIT = "TinyLDMDiT"
NON_EMA = "non_ema"
WEIGHTS = "diffusion_pytorch_model"


class Kind(NamedTuple):
    """How one class of network is stored. What is written has the first of its layouts."""

    folder: str
    stem: str                                   # of the weights file
    classes: tuple[str, ...]                    # its published names in config.json; () where that is not asked
    layouts: Mapping[str, Layout]
    to_config: Callable[[Any], dict]
    from_config: Callable[[dict], Any]


def _dit_to_config(config: DiTConfig) -> dict:
    return {"_class_name": OWN_DIT} | asdict(config)


def _dit_from_config(config: dict) -> DiTConfig:
    if config.get("_class_name") != OWN_DIT:
        raise ValueError(f"config.json describes a {config.get('_class_name')}: the only network read from transformer/ is {OWN_DIT}")
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := fields.keys() - asdict(DiTConfig()).keys():
        raise ValueError(f"{OWN_DIT} config has unknown fields ({', '.join(sorted(unknown))}): is it of a newer version?")
    return DiTConfig(**fields)


DIT_LAYOUTS = {"tinyldm": Layout(r"()patch_in\.weight", lambda config: [])}
KINDS: dict[type[nn.Module], Kind] = {
    UNet: Kind("unet", WEIGHTS, (unets.CLASS,), unets.LAYOUTS, unets.to_config, unets.from_config),
    DiT: Kind("transformer", WEIGHTS, (OWN_DIT,), DIT_LAYOUTS, _dit_to_config, _dit_from_config),
    AutoencoderKL: Kind("vae", WEIGHTS, (vaes.CLASS,), vaes.LAYOUTS, vaes.to_config, vaes.from_config),
    TAESD: Kind("vae", WEIGHTS, taesd.CLASSES, taesd.LAYOUTS, taesd.to_config, taesd.from_config),
    CLIPText: Kind("text_encoder", "model", (), clip.LAYOUTS, clip.to_config, clip.from_config),
}


def first_layout(module: nn.Module) -> Layout:
    return next(iter(KINDS[type(module)].layouts.values()))
