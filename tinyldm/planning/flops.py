"""Counts the FLOPs of networks, and knows the peak FLOP/s of GPUs.

The networks are built on the meta device, as shapes without values: any machine counts a network of any size in seconds.
Matrix products and convolutions are counted, two FLOPs per multiply-add; training counts as three forward passes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinyldm.config import Config, PlanConfig, change, phases
from tinyldm.data.decoding import make_buckets
from tinyldm.folders.hub import is_hub_id
from tinyldm.folders.load import load_vae
from tinyldm.lookup import lookup
from tinyldm.model import (
    AUTOENCODERS,
    NETWORKS,
    Model,
    NetworkShapes,
    architecture,
    autoencoder_config,
    network_config,
    new_network,
    settings_flag,
)
from tinyldm.planning.memory import empty
from tinyldm.planning.texts import condition, encoders, join_of, like, meta_text, run_encoders
from tinyldm.text.encoders import JOINS, TextEncoders

# Dense bf16 with fp32 accumulation, FLOP/s, from NVIDIA's data sheets and white papers; the first pattern found in the name counts.
PEAKS = {
    r"\bRTX 5090$": 209.5e12, r"\bRTX 5080$": 112.6e12, r"\bRTX 4090$": 165.2e12, r"\bRTX 4080$": 97.5e12, r"\bRTX 3090$": 71e12,
    r"\bRTX 6000 Ada\b": 364.2e12, r"\bRTX A6000$": 154.8e12, r"\bL4$": 121e12, r"\bL40S$": 362e12, r"\bA100\b": 312e12,
    r"\bH100 PCIe": 756e12, r"\bH100 NVL": 835e12, r"\bH100\b": 989e12, r"\bG?H200\b": 989e12, r"\bB200\b": 2250e12,
    r"\bGB200\b": 2500e12, r"\bRTX PRO 6000 Blackwell (?!Max-Q)": 503.8e12}

# Of the conditions in Cond.extra, per picture.
EXTRA_SHAPES: dict[str, tuple[int, ...]] = {"sizes": (6,), "guidance": (), "elapsed": ()}


class MetaNetworks(NamedTuple):
    """The networks of a model on the meta device."""

    net: nn.Module
    text: nn.Module         # an nn.ModuleList where there are several text encoders
    vae: nn.Module


def vae_source(config: Config) -> Path | str:
    """Where the VAE of --vae-weights or --vae-init is: in the run's own folder where a resumed run has it, else as it was typed; "": the
    run trains a new one."""
    source, run = config.autoencoder.weights or config.autoencoder.init, Path(config.run.out)
    own = [run / "vae", *sorted(run.glob("checkpoints/vae-*/vae"), reverse=True)] if source and config.run.resume != "no" else []
    return next((folder for folder in own if folder.is_dir()), source)


def assumed_vae(config: Config) -> str:
    """What the plan assumes of a VAE that is not on this machine, in words; "" where it knows it."""
    return "the VAE is not here: one like Stable Diffusion 1's is assumed" if is_hub_id(vae_source(config)) else ""


def meta_autoencoder(config: Config) -> nn.Module:
    """The VAE that train.py would train or load. One of others is as its folder or file says; one on the hub, which plans do not ask, is
    assumed to have Stable Diffusion 1's shapes. ValueError, as in training, for a source that is neither."""
    own, source = config.autoencoder, vae_source(config)
    if source and not is_hub_id(source):
        found = load_vae(source, "meta")
        with torch.device("meta"):                              # anew, because what is loaded has no gradients and is not trained
            return type(found)(found.config)
    name, fields = ("kl", {}) if source else (own.name, own.fields)
    with torch.device("meta"):
        return AUTOENCODERS[name].module(autoencoder_config(name, fields))


def meta_networks(config: Config, loaded: nn.Module | None = None, texts: TextEncoders | None = None) -> MetaNetworks:
    """The networks that train.py would build or load. loaded, texts: the pretrained VAE and text encoders; None: see meta_autoencoder
    and meta_text."""
    loaded = loaded or meta_autoencoder(config)
    vae = loaded.config
    text, join = (like(texts), texts.join) if texts else (meta_text(config), join_of(config))
    widths = [architecture(module).widths(module.config) for module in encoders(text)]
    shapes = NetworkShapes(vae.latent_channels, vae.latent_channels * (1 + config.objective.learned_variance),
                           lookup(JOINS, join, "rule to join text encoders").widths(widths),
                           phases(config)[-1].data.resolution // vae.downscale)
    check_sides(config, vae.downscale)
    with torch.device("meta"):
        net = new_network(config.network.name, config.network.settings, shapes)
        return MetaNetworks(net, text, loaded)


def check_sides(config: Config, downscale: int) -> None:
    """ValueError, with the flags to change, where a phase has pictures that are larger than the network takes. downscale: the VAE's."""
    name = config.network.name
    row, network = lookup(NETWORKS, name, "network"), network_config(name, config.network.settings)
    for phase in phases(config):
        side, buckets = phase.data.resolution, phase.data.buckets
        longest = max(map(max, make_buckets(side, downscale * row.divisor(network), buckets))) if buckets else side
        if changes := row.enlarged(network, longest // downscale):
            flag = "--buckets" if not row.enlarged(network, side // downscale) else "--stages" if config.data.phases else "--resolution"
            fields = " ".join(f"{field}={value}" for field, value in changes.items())
            raise ValueError(f"pictures with a side of {longest} pixels are larger than this {name} takes: set {settings_flag(name)} "
                             f"{fields} or more, or lower {flag}")


def forwards(networks: MetaNetworks, resolution: int, batch: int = 1, join: str = "single") -> dict[str, Callable[[], object]]:
    """For each part, a function that runs its forward pass on pictures of this size. join: the rule for text encoders."""
    (net, text, vae), f = networks, networks.vae.config.downscale
    if resolution % f:
        raise ValueError(f"resolution {resolution} is not a multiple of the VAE's {f}: use {-(-resolution // f) * f}")
    x = empty(batch, vae.config.latent_channels, resolution // f, resolution // f)
    extra = {name: empty(batch, *lookup(EXTRA_SHAPES, name, "condition")) for name in architecture(net).extras(net.config)}
    cond = replace(condition(text, join, batch), extra=extra)
    return {"net": lambda: net(x, empty(batch), cond), "text": lambda: run_encoders(text, join, batch),
            **vae_forwards(vae, resolution, batch)}


def vae_forwards(vae: nn.Module, resolution: int, batch: int = 1) -> dict[str, Callable[[], object]]:
    """The same for the encoder and the decoder of a VAE."""
    size = resolution // vae.config.downscale
    return {"encode": lambda: vae.encode(empty(batch, 3, resolution, resolution)),
            "decode": lambda: vae.decode(empty(batch, vae.config.latent_channels, size, size))}


def size(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@torch.no_grad()
def count_flops(forward: Callable[[], object]) -> int:
    """FLOPs of a forward pass on the meta device, where attention runs as two matrix products and is counted.
    (On the CPU attention is one fused operation, which the counter does not know and would count as 0.)"""
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def vae_flops(vae: nn.Module, resolution: int) -> int:
    """FLOPs of training a VAE on one picture, discriminators and the like aside. Only the config of vae matters."""
    with torch.device("meta"):
        same = type(vae)(vae.config)
    return 3 * sum(map(count_flops, vae_forwards(same, resolution).values()))


def passes(config: Config) -> dict[str, int]:
    """Forward passes that a training step costs, by part: three of what is trained (backward takes two), two of what only gradients pass
    through to what is small, an adapter or a word; one of a frozen text encoder, none where captions are encoded once."""
    own = config.finetune
    if not own.kind:
        return {"net": 3, "text": 1 if config.text.weights else 3}
    trained = 3 if own.whole else 2
    return {"net": trained, "text": trained * own.trains_text}


def useful_flops(config: Config, model: Model | None = None) -> int:
    """FLOPs of training on one picture in a phase: see passes(). What gradient checkpointing computes twice counts once.

    model: the run's own, on any device (default: the networks that the config describes)"""
    join = model.text.join if model else join_of(config)
    if model:
        with torch.device("meta"):
            net, vae = (type(module)(module.config) for module in (model.net, model.vae))
    calls = forwards(MetaNetworks(net, like(model.text), vae) if model else meta_networks(config), config.data.resolution, join=join)
    return sum(count_flops(calls[part]) * count for part, count in passes(config).items() if count)


def on_this_gpu(config: Config, device: torch.device) -> Config:
    """The config with the plan's GPU replaced by this machine's, if it has one."""
    peak = peak_flops(config.plan, device)
    return change(config, gpu_tflops=peak / 1e12) if peak else config


def peak_flops(plan: PlanConfig, device: torch.device) -> float | None:
    """Peak FLOP/s of a GPU in bf16, or --gpu-tflops where the GPU is not in PEAKS; None for devices other than CUDA."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), plan.gpu_tflops * 1e12)
