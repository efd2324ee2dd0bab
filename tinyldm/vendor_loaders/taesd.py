"""TAESD's published layouts: diffusers' AutoencoderTiny (config.json and one file) and the original (two files, no config).

The original files name layers by their index in an nn.Sequential, and so do we: once the loader has put the prefixes
"encoder." and "decoder." before the names in the two files, no rule is left, and ORIGINAL_RULES is empty. diffusers does
not count the clamp with which the decoder begins: its decoder.layers.0 is our decoder.1. taef2.safetensors on the hub has
the names of diffusers and comes without a config.json, so `infer` reads both layouts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.vendor_loaders.layout import Layout, Rules, apply
from tinyldm.vendor_loaders.unet import check, sample_size, scalar

CLASS = "AutoencoderTiny"
OWN_CLASS = "TinyLDMAutoencoderTiny"        # for networks like taef2, which AutoencoderTiny would open and compute wrongly
CLASSES = (CLASS, OWN_CLASS)

RULES: Rules = [
    (r"^encoder\.(\d)", r"encoder.layers.\1"),
    *((rf"^decoder\.{n}\.", f"decoder.layers.{n - 1}.") for n in range(1, 100)),
]
ORIGINAL_RULES: Rules = []

FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}

# Fields that from_config accepts. Some say nothing about the network: force_upcast is about float16 arithmetic,
# latent_magnitude and latent_shift are for storing latents as 8-bit pictures, block_out_channels repeats
# decoder_block_out_channels. sample_size and normed_middle are not fields of diffusers but of tinyldm.
KNOWN = {"block_out_channels", "decoder_block_out_channels", "encoder_block_out_channels", "force_upcast",
         "latent_channels", "latent_magnitude", "latent_shift", "normed_middle", "num_decoder_blocks",
         "num_encoder_blocks", "sample_size", "scaling_factor", "shift_factor"}

DEFAULT = TAESDConfig()


def to_config(config: TAESDConfig) -> dict:
    """The config.json with which diffusers' AutoencoderTiny opens the network. Where that class cannot compute it, the
    config names OWN_CLASS."""
    blocks, widths = list(config.blocks), [config.width] * len(config.blocks)
    published = FIXED | {
        "_class_name": CLASS,
        "latent_channels": config.latent_channels,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "num_encoder_blocks": blocks,
        "num_decoder_blocks": blocks[::-1],
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "force_upcast": False,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
    }
    if config.normed_middle:
        published |= {"_class_name": OWN_CLASS, "normed_middle": True}
    if config.sample_size != DEFAULT.sample_size:       # only where needed: diffusers warns about a field that it does not know
        published["sample_size"] = config.sample_size
    return published


def from_config(config: dict) -> TAESDConfig:
    """A config.json, published or written by to_config -> TAESDConfig. ValueError for what TAESDConfig cannot express."""
    normed = config.get("normed_middle", False)
    check(config, OWN_CLASS if normed or config.get("_class_name") == OWN_CLASS else CLASS, FIXED, KNOWN)
    blocks = tuple(config.get("num_encoder_blocks", (1, 3, 3, 3)))
    if (other := tuple(config.get("num_decoder_blocks", (3, 3, 3, 1)))) != blocks[::-1]:
        raise ValueError(f"{CLASS} config has num_decoder_blocks={list(other)}: only the reverse of num_encoder_blocks, "
                         f"{list(blocks[::-1])}, can be expressed here")
    width = scalar(config.get("encoder_block_out_channels", [64] * 4))
    for name in ("encoder_block_out_channels", "decoder_block_out_channels"):
        widths = config.get(name, [64] * 4)
        if not isinstance(width, int) or list(widths) != [width] * len(blocks):
            raise ValueError(f"{CLASS} config has {name}={widths}: only one width for all {len(blocks)} levels "
                             f"can be expressed here")
    return TAESDConfig(
        latent_channels=config.get("latent_channels", 4),
        width=width,
        blocks=blocks,
        normed_middle=normed,
        scaling_factor=config.get("scaling_factor", 1.0),
        shift_factor=config.get("shift_factor") or 0.0,
        sample_size=sample_size(config, DEFAULT.sample_size),
    )


def infer(shapes: Mapping[str, tuple]) -> TAESDConfig:
    """The config of a whole autoencoder, from the shapes of its tensors under diffusers' names or the prefixed original ones.

    ValueError for the shapes of another network, for instance of taesana, which downscales 32 times with other blocks.
    """
    tensors: dict[int, set[str]] = {}           # index of a layer of the encoder -> the names of its tensors
    for name in shapes:
        if match := re.match(r"encoder\.(?:layers\.)?(\d+)\.(.+)", name):
            tensors.setdefault(int(match[1]), set()).add(match[2])
    if not tensors:
        raise ValueError("no tensor name starts with 'encoder.': join the encoder's and the decoder's file, with the prefixes "
                         "'encoder.' and 'decoder.' before the names")
    blocks, normed = [0], False
    for index in sorted(tensors):
        if "conv.0.weight" in tensors[index]:
            blocks[-1] += 1
            normed = "pool.0.weight" in tensors[index]
        elif index > 0 and "bias" not in tensors[index]:        # only the strided convolution before each level has no bias
            blocks.append(0)
    weight = lambda index: shapes.get(f"encoder.layers.{index}.weight", shapes.get(f"encoder.{index}.weight", (0, 0)))
    config = replace(DEFAULT, latent_channels=weight(max(tensors))[0], width=weight(0)[0], blocks=tuple(blocks),
                     normed_middle=normed)
    with torch.device("meta"):
        own = TAESD(config).state_dict()
    rules = RULES if "encoder.layers.0.weight" in shapes else ORIGINAL_RULES
    expected = {apply(rules, key): tuple(tensor.shape) for key, tensor in own.items()}
    if wrong := sorted(name for name in expected.keys() | shapes.keys()
                       if expected.get(name) != tuple(shapes.get(name, ()))):
        raise ValueError(f"the tensors are not those of an autoencoder of the TAESD family that can be expressed here: "
                         f"{len(wrong)} are missing, unexpected or of another shape, first {wrong[0]}")
    return config


LAYOUTS = {
    "diffusers": Layout(r"(|.*\.)encoder\.layers\.0\.weight", lambda config: RULES, infer=infer),
    "original": Layout(r"(|.*\.)encoder\.0\.weight", lambda config: ORIGINAL_RULES, infer=infer),
}
