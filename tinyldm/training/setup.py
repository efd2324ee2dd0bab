"""What the settings of a run become: networks, batches, process and objective; and what is refused before it begins."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyldm.config import Config, build, split_weights, stages
from tinyldm.data import toyworld
from tinyldm.data.cache import Cache, write_tokens
from tinyldm.data.loader import Loader
from tinyldm.data.prepare import adopt, find_shards, network_unit, stage_folders
from tinyldm.data.sources import parse_sources
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.loss import T_SAMPLERS, make_weight, sample_losses
from tinyldm.diffusion.prediction import to_x0
from tinyldm.diffusion.process import PROCESSES, Process, make_process
from tinyldm.diffusion.samplers import find_sampler
from tinyldm.lookup import lookup
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL
from tinyldm.tokenizer import Tokenizer
from tinyldm.training.budget import forwards, meta_networks
from tinyldm.training.distributed import World, launched
from tinyldm.training.ema import to_gamma
from tinyldm.training.schedule import moment
from tinyldm.training.track import find_backend
from tinyldm.vendor_loaders import scheduler
from tinyldm.vendor_loaders.load import Model, load_text, load_tokenizer, load_vae


def build_networks(config: Config, vae: AutoencoderKL, captions: Iterable[str],
                   last: Path | None) -> tuple[nn.Module, CLIPText, Tokenizer]:
    """The network to train, and its text encoder: pretrained and frozen, or new and trained along. last: the checkpoint
    whose vocabulary to keep."""
    if config.text_weights:
        text = load_text(config.text_weights)
        tokenizer = load_tokenizer(config.text_weights, text.config.context_length)
    else:
        length = config.text.get("context_length", 77)
        tokenizer = Tokenizer.load(last / "model" / "tokenizer") if last else Tokenizer.train(captions, config.vocab_size, length)
        text = CLIPText(build(CLIPTextConfig, config.text | dict(
            vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id), "--text"))
    channels = dict(in_channels=vae.config.latent_channels, context_dim=text.config.width,
                    out_channels=vae.config.latent_channels * (1 + config.learned_variance))
    if config.network == "dit":
        net = DiT(build(DiTConfig, config.dit | channels, "--dit"))
    else:
        size = stages(config)[-1].resolution // vae.config.downscale
        net = UNet(build(UNetConfig, config.unet | channels | {"sample_size": size}, "--unet"))
    net.grad_checkpointing = config.grad_checkpointing
    return net, text, tokenizer


def make_loader(config: Config, data: Cache, tokenizer: Tokenizer, device: torch.device, world: World) -> Loader:
    """This process's part of the batches of the cache, mixed as --data and --caption-key say."""
    place = Path(config.out) / f"tokens-{config.resolution}" if config.cache else None
    if world.main and not has_tokens(data, tokenizer):
        write_tokens(data.folder, tokenizer, place)
    world.wait()
    data = data if has_tokens(data, tokenizer) else Cache(data.folder, place)     # of a cache that others use too, the run keeps them
    weights = [source.weight for source in parse_sources(config.data)]
    loader = Loader(data, tokenizer.fingerprint, batch_size=config.batch_size, seed=config.seed, rank=world.rank, world=world.size,
                    weights=weights if len(weights) > 1 and weights[0] else None, pin=device.type == "cuda", hold_out=config.val_samples,
                    caption_weights=tuple(split_weights(config.caption_key).values()) or (1.0,))
    for size, count in loader.order.never_drawn:
        print(f"{count:,} pictures of latent size {size} are never drawn: fewer than one batch of {config.batch_size}")
    return loader


def has_tokens(data: Cache, tokenizer: Tokenizer) -> bool:
    try:
        data.check_tokens(tokenizer.fingerprint)
    except ValueError:
        return False
    return True


def process_options(config: Config) -> dict[str, Any]:
    """What make_process takes: --shift and --zero-terminal-snr where the process has them, and --process-options."""
    takes = inspect.signature(lookup(PROCESSES, config.process, "process")).parameters
    if config.zero_terminal_snr and "zero_snr" not in takes:
        raise ValueError(f"--zero-terminal-snr is for tables, not for {config.process}: leave it out (flow ends in pure noise by itself)")
    if config.process == "betas" and not config.process_options.get("betas"):
        raise ValueError("--process betas needs them: --process-options betas=0.0001,0.0002,... from the cleanest level to the noisiest")
    named = {"shift": config.shift, "zero_snr": config.zero_terminal_snr}
    return {name: value for name, value in named.items() if name in takes} | config.process_options


def objective(config: Config, process: Process) -> dict[str, Any]:
    """How sample_losses measures: prediction, weight, loss."""
    name = "min_snr" if config.min_snr_gamma and config.loss_weight == "none" else config.loss_weight
    gamma = config.p2_gamma if name == "p2" else config.min_snr_gamma or None
    return dict(prediction=config.prediction, weight=make_weight(name, config.prediction, gamma, process), loss=config.loss,
                huber_c=config.huber_c)


def at_stage(model: Model, config: Config) -> Model:
    """The model as it is in one stage, whose process and picture size are its own."""
    options = process_options(config)
    return replace(
        model, process=make_process(config.process, **options),
        scheduler=scheduler.to_config(config.process, options, config.prediction, config.network, config.sampler, config.learned_variance),
        defaults=dict(preset=config.preset, resolution=config.resolution, sampler=config.sampler, steps=config.sample_steps,
                      cfg=config.cfg, data=" ".join(config.data), mask_padding=config.mask_padding))


def fixed_prompts(config: Config, data: Cache) -> list[str]:
    """What the sample grids show: --sample-prompts, the toy world's own, else some captions from all over the data."""
    if config.sample_prompts:
        return config.sample_prompts.split("|")
    spread = dict.fromkeys(data.captions(i)[0][1] for i in range(0, len(data), -(-len(data) // 8)))
    return toyworld.PROMPTS if config.data == ["toyworld"] else list(spread)


def refuse_early(config: Config) -> Config:
    """Whatever cannot work is refused here, before anything is written or trained. -> config, with what --cache decides in it."""
    find_sampler(config.sampler)
    lookup(T_SAMPLERS, config.times, "--times")
    for width in widths(config):
        to_gamma(width)
    if config.track:
        find_backend(config.track)
    if config.deadline and config.resume == "no" and moment(config.deadline) <= time.time():
        raise ValueError(f"--deadline {config.deadline} has passed")
    if (processes := launched()[1]) > config.batch_size:
        raise ValueError(f"--batch-size {config.batch_size} leaves some of {processes} processes without a picture: start fewer")
    process, pixel = make_process(config.process, **process_options(config)), torch.zeros(1, 1, 1, 1)
    for first in (grid(process, config.sample_steps)[0], process(torch.ones(1))):
        to_x0(config.prediction, pixel, pixel, first)                           # eps from pure noise
    answer = torch.zeros(1, 1 + config.learned_variance, 1, 1)
    sample_losses(lambda *told: answer, pixel, pixel, torch.ones(1), None, process, **objective(config, process))
    if any(not (folder / "index.json").exists() for _, folder in stage_folders(config, Path(config.out) / "latents")):
        find_shards(config)                                                     # the sources are there
    if config.vae_weights:
        vae = load_vae(config.vae_weights)                                      # downloaded, whole and of the right kind
        for stage in stages(config):
            if stage.resolution % (unit := network_unit(stage, vae)) and not stage.buckets:
                raise ValueError(f"resolution {stage.resolution} is not a multiple of {unit}, which this VAE and network divide by")
        for stage in stages(config) if config.cache else []:
            adopted = adopt(stage, Cache(Path(stage.cache[0])), vae)
            config = replace(adopted, resolution=config.resolution, **{name: getattr(config, name) for name in (
                "stages", "cache", "grad_accum", "shift")})
    if config.text_weights:
        load_text(config.text_weights), load_tokenizer(config.text_weights)
    elif config.fsdp:
        raise ValueError("--fsdp shares out the network, and not a text encoder that is trained along: name one with --text-weights")
    if not config.vae_weights:
        networks = meta_networks(config)                                        # shapes without values: sizes that do
        sizes = {stage.resolution for stage in stages(config)}                  # not divide fail here, in a second
        for size in sizes | {config.vae_crop or config.resolution}:
            for part, forward in forwards(networks, size).items():
                if part != "net" or size in sizes:
                    forward()
    return config


def widths(config: Config) -> list[float]:
    """--ema-widths as numbers."""
    try:
        return [float(width) for width in config.ema_widths]
    except ValueError:
        raise ValueError(f"--ema-widths {' '.join(map(str, config.ema_widths))}: numbers between 0 and 0.288, as in 0.05 0.1") from None
