"""Training a model that exists (--finetune): which captions its pictures get, and what a run takes from the model.

What is trained, a table, is in planning/base.py (TUNED), and what a checkpoint holds of it in trained.py. All else is the second stage
of any run (second_stage.py): data, objective, optimizers, averages. Network, process and prediction are those of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tinyldm.config import Config, FinetuneConfig, change, flatten, phases
from tinyldm.config.finetune import check_complete
from tinyldm.lookup import lookup
from tinyldm.model import NETWORKS, Model, architecture, told_too
from tinyldm.objectives import OBJECTIVES
from tinyldm.offload import Offloaded, Whole
from tinyldm.pipeline import check_size, draw_settings, picture_size
from tinyldm.planning.base import Tuned, load_base, tune
from tinyldm.planning.flops import size
from tinyldm.training.class_pictures import add_class_pictures
from tinyldm.training.context import RunContext
from tinyldm.training.frozen import Frozen, keep_model
from tinyldm.training.portable import portable
from tinyldm.training.run_folder import find_model
from tinyldm.training.trained import Trained, TrainedAdapter, TrainedEmbeddings, TrainedModel
from tinyldm.vendor_loaders.scheduler_process import read_process

FEW = 500               # captions of which the features may be kept in the host's memory: 4 MB each, of T5-XXL
OBJECTS = ("a photo of a {}", "a photo of the {}", "a close-up photo of a {}", "a bright photo of the {}", "a dark photo of the {}",
           "a rendering of a {}", "a good photo of a {}", "a picture of one {}", "a cropped picture of the {}", "a nice {}", "a {}")
STYLES = ("a picture in the style of {}", "a painting in the style of {}", "a small picture in the style of {}",
          "a bright picture in the style of {}", "a dark picture in the style of {}", "a detailed picture in the style of {}")


class Wording(NamedTuple):
    """A row of WORDINGS."""

    captions: Callable[[FinetuneConfig], Sequence[str]] = lambda own: own.instance.split("|") if own.instance else ()
    prompts: Callable[[FinetuneConfig], Sequence[str]] = lambda own: ()     # of the sample grids; (): captions of the data


WORDINGS: dict[str, Wording] = {          # by --finetune
    "lora": Wording(),
    "whole": Wording(),
    "dreambooth": Wording(
        prompts=lambda own: [form.format(each) for each in filter(None, [own.instance.split("|")[0], own.class_prompt])
                             for form in ("{}", "{} in the snow", "a painting of {}")]),
    "textual_inversion": Wording(
        lambda own: own.instance.split("|") if own.instance else [form.format(own.token) for form in (STYLES if own.style else OBJECTS)],
        lambda own: [form.format(own.token) for form in (STYLES[0], "a house in the style of {}", "a red fox in the style of {}")
                     if own.style] or [form.format(own.token) for form in ("a photo of a {}", "a {} in the snow", "a painting of a {}")]),
}


def what_is_trained(config: Config, tuned: Tuned, current: Callable[[], Model], run: Path) -> Trained:
    """What a checkpoint holds, as the trainer sees it. current: returns the model of the current phase."""
    own = config.finetune
    if own.whole:
        return TrainedModel(current, tuple(tuned.modules), Frozen(run))
    return (TrainedAdapter if own.adapts else TrainedEmbeddings)(tuned.modules, current, about(own))


def about(own: FinetuneConfig) -> dict[str, str]:
    """What the file of an adapter says about its training."""
    facts = {"base_model": portable(own.model), "method": own.kind, "instance_prompt": own.instance, "class_prompt": own.class_prompt}
    return {name: value for name, value in facts.items() if value}


def open_base(config: Config, context: RunContext, vae: nn.Module, last: Path | None) -> Model:
    """The model that the run trains further, in the host's memory. vae: its autoencoder, which is there already. last: the checkpoint
    that a resumed run continues from; where the whole network is trained, it holds the model."""
    copy = last / "model" if last and config.finetune.whole else None
    objective = OBJECTIVES[config.objective.name]
    model = objective.begins_as(replace(load_base(config, context.device, torch.device("cpu"), copy), vae=vae), config)
    model.net = told_too(model.net, objective.tells(config))
    model.net.grad_checkpointing = config.network.grad_checkpointing
    for network in (model.net, *model.text.modules.values()):
        network.train()                     # gradient checkpointing is for training; nothing else differs
    return model


def open_teacher(config: Config, context: RunContext) -> list[Model]:
    """The model of --teacher as it is, whatever the run has trained since, for objectives that compare with it; [] for others."""
    if not OBJECTIVES[config.objective.name].taught(config):
        return []
    model = load_base(config, context.device, torch.device("cpu"))
    if context.device.type == "cpu":
        model.net.to(memory_format=architecture(model.net).memory_format)
    return [model]


def few_distinct(captions: Iterable[str]) -> list[str]:
    """The distinct ones of the captions; [] where they are not few."""
    found: dict[str, None] = {}
    for caption in captions:
        found[caption] = None
        if len(found) > FEW:
            return []
    return [*found]


def put_on(device: torch.device, config: Config, model: Model, captions: Sequence[str]) -> Model:
    """The same model with its parts on the device. On a GPU, where captions are few, parts that the training itself does not need are
    there only while they work: text encoders encode all captions once, and the autoencoder decodes sample grids. captions: see
    few_distinct()."""
    rest = device.type == "cuda" and captions and not config.finetune.trains_text
    waiting = {part: module for part, module in model.modules.items() if rest and part != "net"}
    for part, module in model.modules.items():
        module.to("cpu" if part in waiting else device)
    if not waiting:
        return model
    return replace(model, placement=Offloaded(device, {part: Whole(module, device) for part, module in waiting.items()}))


def fingerprint(model: Model) -> str:
    """A hash of a model's own weights, of 16 numbers of each tensor, evenly spread: two models that were trained differently have others.
    Numbers are rounded to bfloat16, in which a GPU has them, so that a run may go on on a CPU."""
    digest = hashlib.sha256()
    for part, module in sorted(model.modules.items()):
        for name, tensor in module.state_dict().items():
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 16)][:16].to(torch.bfloat16)
            digest.update(f"{part}.{name} {list(tensor.shape)}".encode() + some.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def prepare_finetune(config: Config, context: RunContext) -> Config:
    """What a run needs before its data are encoded: its own copies of frozen parts, where checkpoints hold whole models, and pictures of
    the class. -> the config, with these among its data. All processes call this."""
    if config.finetune.whole:
        keep_model(config, context)
    return add_class_pictures(config, context)


# ---------------------------------------------------------------- what a run takes from the model


def complete(config: Config) -> Config:
    """The settings of a run with --finetune, completed by what its model says; those of other runs and of resumed ones as they are.

    ValueError or OSError, with the fix, where the model is missing or damaged, and where it cannot be trained so."""
    own = config.finetune
    check_complete(config)
    if not own.kind or config.run.resume != "no":
        return config
    config = change(config, model=str(find_model(own.model)))
    settings, wording = config.objective, lookup(WORDINGS, own.kind, "--finetune")
    objective = lookup(OBJECTIVES, settings.name, "objective")
    model, usual = objective.begins_as(load_base(config), config), objective.usual(config)
    sources = config.data.sources or ([] if config.data.cache else model.defaults.get("data", []))
    if not sources and not config.data.cache:
        raise ValueError(f"--finetune {own.kind} needs pictures: --data FOLDER")
    network = next(name for name, known in NETWORKS.items() if known is architecture(model.net))
    process, options, prediction = read_process(model.scheduler)
    typed = {name: value for name, value in vars(config.drawing).items() if value}
    draw_settings(model, **typed)                               # refuses what the model cannot do
    drawing = drawn_as(model) | {name: usual[name] for name in ("sampler", "steps", "cfg") if name in usual} | typed
    captions = "|".join(wording.captions(own))
    decided = dict(
        network=network, net=different(model.net.config), unet={}, dit={}, vae_weights=config.finetune.model,
        text_weights="" if own.train_text and own.whole else config.finetune.model, text_join=model.text.join,
        process=process, process_options=options, shift=1.0, zero_terminal_snr=False,
        mask_padding=model.defaults.get("mask_padding", False),
        learned_variance=model.net.config.out_channels == 2 * model.vae.config.latent_channels)
    refuse_typed(config, decided)
    config = change(
        config, **decided, prediction=settings.prediction or prediction,
        times=settings.times or usual.get("times") or ("logit_normal" if prediction == "flow" else "uniform"),
        times_mean=usual.get("mean") if settings.times_mean is None and not settings.times else settings.times_mean,
        times_scale=usual.get("scale") if settings.times_scale is None and not settings.times else settings.times_scale,
        resolution=config.data.resolution or min(picture_size(model)),
        sampler=drawing["sampler"], sample_steps=drawing["steps"], cfg=drawing["cfg"],
        data=sources, captions=[captions] * len(sources) if captions else config.data.captions,
        sample_prompts=config.run.sample_prompts or "|".join(wording.prompts(own)))
    if config.objective.prediction != prediction:
        raise ValueError(f"--prediction {config.objective.prediction}: the model predicts {prediction}; leave it out")
    if own.whole and len(model.text.modules) < len(model.text.encoders):
        raise ValueError(f"{config.finetune.model} has no third text encoder here, and a whole model is written with all of its parts: "
                         "train an adapter, with --rank 16")
    for phase in phases(config):
        check_size(model, phase.data.resolution, phase.data.resolution)
    print(describe(config, tune(config, model)))
    return config


def refuse_typed(config: Config, decided: Mapping[str, Any]) -> None:
    """ValueError for a setting that was typed and is the model's to decide. decided: by flat name."""
    typed, usual, plain = flatten(config), flatten(Config()), lambda value: json.dumps(value, sort_keys=True)
    for name, value in decided.items():
        if plain(typed[name]) not in (plain(usual[name]), plain(value)):
            raise ValueError(f"--{name.replace('_', '-')} is decided by the model that is trained further (--model, --teacher): leave it "
                             "out")


def drawn_as(model: Model) -> dict[str, Any]:
    """Sampler, steps and guidance scale by which a model is drawn with where none are typed."""
    settings = draw_settings(model)
    return dict(sampler=settings.sampler, steps=settings.steps, cfg=model.defaults.get("cfg", 7.5))


def different(config: Any) -> dict[str, Any]:
    """The fields of a network's config that are not the defaults."""
    return {each.name: getattr(config, each.name) for each in fields(config) if getattr(config, each.name) != each.default}


def describe(config: Config, tuned: Tuned) -> str:
    """What is trained, and how: one line."""
    own, length = config.finetune, config.optimisation
    what = (f"adapters of rank {own.rank}" if own.adapts else "the weights themselves" if own.whole else
            f"{own.vectors} new vector{'s' * (own.vectors > 1)}")
    steps = f"{length.max_steps:,} steps" if length.max_steps else f"until {length.budget or length.deadline} is over"
    pictures = f"{length.batch_size} picture{'s' * (length.batch_size > 1)}"
    count, whole = size(*tuned.modules.values()), size(tuned.model.net, *tuned.model.text.modules.values())
    return (f"{own.kind}: {what} in {', '.join(tuned.modules)} ({count:,} numbers beside {whole:,}), learning rate {length.lr:g}, {steps} "
            f"of {pictures} of {config.data.resolution} px")
