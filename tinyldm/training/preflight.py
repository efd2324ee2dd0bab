"""Checks of a configuration, before anything is written or trained: what cannot work is refused here."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

from tinyldm.config import Config, change, flatten, phases
from tinyldm.data.cache import Cache
from tinyldm.data.prepare import adopt, find_shards, phase_folders, picture_divisor
from tinyldm.data.sources import parse_sources
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.prediction import to_x0
from tinyldm.diffusion.samplers import find_sampler
from tinyldm.durations import parse_date
from tinyldm.folders.load import load_vae
from tinyldm.lookup import build_dataclass, fit, lookup, type_of
from tinyldm.model import NETWORKS, TEXT_ENCODERS, autoencoder_config, network_config
from tinyldm.models.vae import check_size
from tinyldm.objectives import FIRST_STAGE_OBJECTIVES, OBJECTIVES
from tinyldm.objectives.base import Objective
from tinyldm.objectives.denoising import process_of
from tinyldm.planning.flops import forwards, meta_autoencoder, meta_networks
from tinyldm.planning.texts import OWN_TEXTS, join_of
from tinyldm.text.encoders import JOINS, TextEncoders
from tinyldm.training import checkpoint
from tinyldm.training.distributed import launched
from tinyldm.training.ema import parse_widths
from tinyldm.training.finetune import complete
from tinyldm.training.frozen import base_vae, read_texts
from tinyldm.training.run_folder import find_clip
from tinyldm.training.second_stage import needs_sizes, scheduler_config
from tinyldm.training.track import find_backend
from tinyldm.vendor_loaders.scheduler import sampling


def check_run(config: Config) -> Config:
    """ValueError or OSError, with advice, where the run cannot work. -> the configuration, completed by what --cache decides."""
    config = check_settings(config)
    length = config.optimisation
    parse_widths(length.ema_widths)
    if config.run.track:
        find_backend(config.run.track)
    if length.deadline and config.run.resume == "no" and parse_date(length.deadline) <= time.time():
        raise ValueError(f"--deadline {length.deadline} has passed")
    word, size = ("--vae-batch-size", config.autoencoder.batch_size) if config.run.only else ("--batch-size", length.batch_size)
    if (processes := launched()[1]) > size:
        raise ValueError(f"{word} {size} leaves some of {processes} processes without a picture: start fewer")
    out = Path(config.run.out)
    if any(not (folder / "index.json").exists() for _, folder in phase_folders(config, out / "latents")):
        for spec, _ in parse_sources(config.data.sources):
            if os.path.realpath(os.path.expanduser(spec)) == os.path.realpath(out):
                raise ValueError(f"--out {out} is the folder of --data, where its samples would be taken for data: name another, such as "
                                 f"--out {out / 'run'}")
        find_shards(config.data, config.run.seed)                               # raises where a data source is missing
    pictures = OBJECTIVES[config.objective.name].on_pictures
    for _, folder in phase_folders(config, out / "latents") if not pictures and needs_sizes(config) else []:
        if (folder / "index.json").exists():
            Cache(folder).check_has_sizes()
    return check_parts(config)


def check_plan(config: Config) -> Config:
    """check_settings() for --dry-run, which can do without the model of --finetune."""
    return config if config.finetune.kind and not config.finetune.model else check_settings(config)


def check_settings(config: Config) -> Config:
    """What can be said about the settings alone: names are looked up in their tables; fields, options and combinations that do not
    fit are refused. -> the settings, completed by what the model of --finetune says."""
    objective = lookup(OBJECTIVES, config.objective.name, "objective")
    for name, value in config.objective.options.items():        # first, because complete() asks the objective for what follows from them
        default = lookup(objective.options, name, what := f"{config.objective.name} option")
        fit(value, type_of(default), f"{what} {name}")
    config = complete(config)
    if clip := find_clip(config.text.weights):                  # --text-weights names a run of --objective contrastive
        config = change(config, text_weights=str(clip))
    if objective.on_pictures:
        check_alone(config)
        objective.check(config)
        return config
    row = lookup(NETWORKS, config.network.name, "network")
    text = lookup(TEXT_ENCODERS, config.text.encoder, "text encoder")
    if config.text.join:
        lookup(JOINS, config.text.join, "rule to join text encoders")
    lookup(FIRST_STAGE_OBJECTIVES, config.autoencoder.objective, "objective of the autoencoder").check(config)
    network_config(config.network.name, config.network.settings)
    if not config.autoencoder.weights:
        autoencoder_config(config.autoencoder.name, config.autoencoder.fields)
    if not config.text.weights:
        build_dataclass(text.config, config.text.fields | {"vocab_size": config.text.vocab_size}, "--text")
        text.tokenizer.check_size(config.text.vocab_size)
    if config.run.fsdp and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        raise ValueError(f"--fsdp needs torch 2.8 or newer, this is {torch.__version__}: leave it out")
    find_sampler(config.drawing.sampler)
    check_process(config)
    if config.objective.mask_padding and "mask" not in row.conditions:
        able = [name for name, other in NETWORKS.items() if "mask" in other.conditions]
        raise ValueError(f"--mask-padding is for --network {' or '.join(able)}: the pipelines that a {config.network.name} is exported to "
                         "attend to the padding")
    return config


def check_alone(config: Config) -> None:
    """ValueError for settings of autoencoders and diffusion networks where neither is trained."""
    name = f"--objective {config.objective.name} trains"
    wrong = {f"{name} no autoencoder: leave out --only {config.run.only}": config.run.only,
             f"{name} a new model: leave out --finetune": config.finetune.kind,
             f"{name} a text tower of its own: leave out --text-weights": config.text.weights,
             f"{name} a CLIP's text tower: leave out --text-encoder {config.text.encoder}": config.text.encoder != "clip",
             f"{name} a model that draws nothing: leave out --eval-every {config.run.eval_every}": config.run.eval_every,
             f"{name} both towers with --lr: leave out --text-lr": config.optimisation.text_lr,
             f"{name} in one go and never returns to an older checkpoint: leave out --rollback": config.optimisation.rollback,
             f"{name} on pictures: name them with --data, and leave out --cache": config.data.cache,
             f"{name} on pictures of one size: leave out --stages and --buckets": config.data.phases or config.data.buckets,
             f"{name} networks that are too small to shard: leave out --fsdp": config.run.fsdp}
    for text, given in wrong.items():
        if given:
            raise ValueError(text)


def check_process(config: Config) -> None:
    """Check that the objective can be minimised on this process, and that a model trained so can be saved and drawn with: its
    scheduler config is made and read back."""
    process = process_of(config.objective)
    OBJECTIVES[config.objective.name].check(config)
    level = grid(process, config.drawing.steps)[0]
    to_x0(config.objective.prediction, torch.zeros(1, 1), torch.zeros(1, 1), level)     # raises for eps at pure noise
    if config.finetune.kind:                                    # its scheduler config is that of the model
        return
    found = sampling(scheduler_config(config, join_of(config)), config.drawing.sampler)
    grid(process, config.drawing.steps, found.schedule, **found.grid)


def check_parts(config: Config) -> Config:
    """Check that pretrained parts exist, are undamaged and of the right kind, that picture sizes are divisible, that caches fit. A
    resumed run has its own copies of pretrained parts: their sources may have changed or gone meanwhile."""
    if OBJECTIVES[config.objective.name].on_pictures:           # there are none
        return config
    if config.finetune.kind:                                    # complete() has looked at the model's
        return check_finetuned(config)
    run, resumed = Path(config.run.out), config.run.resume != "no"
    own_vae = resumed and (run / "vae").is_dir()
    own_text = resumed and ((run / OWN_TEXTS).is_dir() or any(folder.name.startswith("step") for folder in checkpoint.names(run)))
    vae = first_vae(config, run, own_vae, resumed)
    if not config.autoencoder.weights and not own_vae:
        downscale = (vae or meta_autoencoder(config)).config.downscale
        side = min(config.autoencoder.crop or config.data.resolution, config.data.resolution)
        check_size(torch.empty(1, 3, side, side, device="meta"), downscale)
        FIRST_STAGE_OBJECTIVES[config.autoencoder.objective].check_sources(config, downscale)
    if config.run.only:
        return config
    if vae:
        for phase in phases(config):
            if phase.data.resolution % (divisor := picture_divisor(phase, vae)) and not phase.data.buckets:
                raise ValueError(f"resolution {phase.data.resolution} is not a multiple of {divisor}, as this VAE and network need")
        config = with_caches(config, vae)
    OBJECTIVES[config.objective.name].check_parts(config, vae)
    texts = None
    if config.text.weights and not own_text:
        texts = read_texts(config, config.text.weights)
    elif config.run.fsdp and not config.text.weights:
        raise ValueError("--fsdp shards only the network, so the text encoder cannot be trained: name a pretrained one with "
                         "--text-weights")
    if not own_text:
        try_shapes(config, vae, texts)
    return config


def check_finetuned(config: Config) -> Config:
    """check_parts() of a run with --finetune: --cache and the objective beside the model's own autoencoder."""
    objective = OBJECTIVES[config.objective.name]
    if config.run.resume != "no" or not config.data.cache and objective.check_parts.__func__ is Objective.check_parts.__func__:
        return config
    vae = base_vae(config, torch.device("cpu"))
    config = with_caches(config, vae)
    objective.check_parts(config, vae)
    return config


def with_caches(config: Config, vae: nn.Module) -> Config:
    """The config with what the caches of --cache decide. ValueError where they were made with another autoencoder or other settings."""
    for phase in phases(config) if config.data.cache else []:
        adopted = flatten(adopt(phase, Cache(Path(phase.data.cache[0])), vae))
        kept = ("resolution", "stages", "cache", "grad_accum", "shift")     # settings of the run that a phase has changed
        config = change(config, **{name: value for name, value in adopted.items() if name not in kept})
    return config


def first_vae(config: Config, run: Path, own: bool, resumed: bool) -> nn.Module | None:
    """The VAE of others that the run begins with, or what the run has made of it; None: it trains a new one. own: RUN/vae is there."""
    source = config.autoencoder.weights or config.autoencoder.init
    if not source:
        return None
    begun = [folder / "vae" for folder in checkpoint.names(run) if folder.name.startswith("vae")] if resumed else []
    return load_vae(run / "vae" if own else begun[-1] if begun else source)


def try_shapes(config: Config, vae: nn.Module | None, texts: TextEncoders | None) -> None:
    """Run all networks that are trained on shapes without values: widths and sizes that do not fit fail here, in a second. vae, texts:
    those that are pretrained."""
    networks, join = meta_networks(config, vae, texts), texts.join if texts else join_of(config)
    sizes = {phase.data.resolution for phase in phases(config) if not vae or phase.data.resolution % picture_divisor(phase, vae) == 0}
    for size in sizes | (set() if vae else {config.autoencoder.crop or config.data.resolution}):
        for part, forward in forwards(networks, size, join=join).items():
            if size in sizes if part == "net" else part == "text" or not vae:
                forward()
