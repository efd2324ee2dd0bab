"""Stable Diffusion's autoencoder in diffusers' layout (`vae/` of a model folder): names and config.json.

Files published before 2023 (SD 1 among them) name the middle attention's layers query, key, value and
proj_attn: `modernise` gives them the names in use since. Their config.json lacks scaling_factor (0.18215).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from tinyldm.models.vae import VAEConfig
from tinyldm.vendor_loaders.unet import check, scalar

CLASS = "AutoencoderKL"

VAE_RULES = [
    (r"\.(down|up)\.", r".\1_blocks."),
    (r"\.middle\.", ".mid_block."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.(down|up)(_blocks\.\d+)\.resample\.", r".\1\2.\1samplers.0."),
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attention\.", "."),
    (r"\.to_out\.", ".to_out.0."),
]

OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "latents_mean": None, "latents_std": None}

# force_upcast is about float16 arithmetic, not about the network.
KNOWN = {"block_out_channels", "down_block_types", "force_upcast", "latent_channels", "layers_per_block",
         "mid_block_add_attention", "norm_num_groups", "sample_size", "scaling_factor", "shift_factor",
         "up_block_types", "use_post_quant_conv", "use_quant_conv"}


def to_config(config: VAEConfig) -> dict:
    """The config.json with which diffusers' AutoencoderKL opens the network."""
    levels = len(config.widths)
    return FIXED | {
        "_class_name": CLASS,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.depth,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.middle_attention,
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor or None,
        "sample_size": config.sample_size,
        "force_upcast": True,
    }


def from_config(config: dict) -> VAEConfig:
    """A published config.json -> ours. ValueError for what VAEConfig cannot express."""
    check(config, CLASS, FIXED, KNOWN)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if scalar(config.get(name, kind)) != kind:
            raise ValueError(f"autoencoder config has {name}={config[name]}: only {kind} can be expressed here")
    quant, post_quant = config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)
    if quant != post_quant:
        raise ValueError(f"autoencoder config has use_quant_conv={quant} but use_post_quant_conv={post_quant}: "
                         f"only both or neither can be expressed here")
    return VAEConfig(
        latent_channels=config.get("latent_channels", 4),
        widths=tuple(config.get("block_out_channels", (64,))),
        depth=config.get("layers_per_block", 1),
        groups=config.get("norm_num_groups", 32),
        middle_attention=config.get("mid_block_add_attention", True),
        quant_convs=quant,
        scaling_factor=config.get("scaling_factor", 0.18215),
        shift_factor=config.get("shift_factor") or 0.0,
        sample_size=config.get("sample_size", 32),
    )


def modernise(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors, with the old names of the middle attention replaced."""
    new = lambda match: f".attentions.0.{OLD_NAMES[match[1]]}."
    return {re.sub(r"\.attentions\.0\.(query|key|value|proj_attn)\.", new, name): tensor
            for name, tensor in tensors.items()}
