"""The second stage of a run: a network is trained on the latents of the frozen autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyldm.cli import best_effort
from tinyldm.config import Config, phases, split_weights
from tinyldm.data import toyworld
from tinyldm.data.cache import Cache, write_tokens
from tinyldm.data.loader import Loader
from tinyldm.data.sources import parse_sources
from tinyldm.data.toyworld_source import all_toyworld
from tinyldm.device import DTYPES, autocast
from tinyldm.lookup import build_dataclass, lookup
from tinyldm.model import NETWORKS, TEXT_ENCODERS, Model, NetworkShapes, architecture, compile_blocks, network_config, new_network, told_too
from tinyldm.objectives import OBJECTIVES
from tinyldm.objectives.denoising import process_of, process_options
from tinyldm.pictures.pixels import write_picture
from tinyldm.pictures.sheet import tile
from tinyldm.pipeline import draw, draw_settings
from tinyldm.planning.base import Tuned, tune
from tinyldm.planning.flops import peak_flops, useful_flops
from tinyldm.planning.texts import OWN_TEXTS
from tinyldm.random_streams import Stream
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.text.base_tokenizer import BaseTokenizer
from tinyldm.text.tokenizer import open_tokenizer
from tinyldm.text.words import words_of
from tinyldm.training.class_pictures import loss_weights
from tinyldm.training.context import RunContext
from tinyldm.training.distributed import World, shard
from tinyldm.training.ema import EMA, PowerEMA
from tinyldm.training.finetune import drawn_as, few_distinct, fingerprint, open_base, open_teacher, put_on, what_is_trained
from tinyldm.training.frozen import Frozen, read_texts
from tinyldm.training.portable import portable_data
from tinyldm.training.stage import Phase, Stage
from tinyldm.training.trained import TrainedModel
from tinyldm.training.validation import Validation, held_out_batch
from tinyldm.vendor_loaders import pipelines, scheduler


BEFORE = "before"           # name of the sample grid of a model before it is trained further: report.html knows it


class LatentStage(Stage):
    """Trains a network, and the text encoders unless they are frozen, on cached latents."""

    name, stream = "step", Stream.NOISE
    reported = planned = draws = True
    loader: Loader              # of the current phase
    words: Sequence[str] = ()   # those of the captions, where text encoders are trained
    base = ""                   # a fingerprint of the model that stays as it is while something is trained beside it; "": there is none

    def __init__(self, config: Config, context: RunContext, vae: nn.Module, caches: list[Cache], last: Path | None,
                 micro_batches: list[int] | None = None):
        """last: the checkpoint to continue from. micro_batches: per phase, at least this number of them (see rehearsal.py)."""
        self.caches, self.micro_batches = caches, micro_batches
        self.cache_digests = [cache.digest for cache in caches]
        trains_text = config.finetune.trains_text if config.finetune.kind else not config.text.weights
        self.words = words_of(caches[0].all_captions()) if trains_text else []
        self.build(config, context, vae, caches[0].all_captions(), last)
        if config.finetune.kind and config.run.sample_every and context.world.main:
            best_effort("the sample grid of the model as it was", self.draw_before)

    def build(self, config: Config, context: RunContext, vae: nn.Module, captions: Iterable[str], last: Path | None) -> None:
        """All networks, on the device, and the objective. captions: a new tokenizer is trained on them."""
        torch.manual_seed(config.run.seed + 1)
        self.config, self.context, self.val_every = config, context, config.run.val_every
        self.settings, self.phases, self.world, self.title = config.optimisation, phases(config), context.world, config.network.name
        sizes = [float(fraction) for fraction in config.data.phases.values()] or [1.0]
        self.fractions = [size / sum(sizes) for size in sizes]
        teacher = open_teacher(config, context) if config.finetune.kind else []
        tuned = tune(config, open_base(config, context, vae, last)) if config.finetune.kind else new_model(
            config, context, vae, captions, last)
        before = tuned.model.defaults.get("words", [])         # of a model that is trained further; [] where it knows too many to list
        if self.words and (before or not config.finetune.kind):
            tuned.model.defaults["words"] = sorted({*before, *self.words})
        self.model, parts = at_phase(tuned.model, self.phases[0]), tuple(tuned.modules)
        if config.finetune.kind:
            read = teacher if config.finetune.whole else [self.model]           # from its source, also when the run is resumed
            self.base = fingerprint(read[0]) if read else ""
            few = few_distinct(captions)
            self.model = put_on(context.device, config, self.model, few)
        for part in (*tuned.modules.values(), *(self.model.modules.values() if self.model.placement is None else ())):
            part.to(context.device)
        if context.device.type == "cpu" and not config.run.fsdp:            # FSDP takes no other memory format
            self.model.net.to(memory_format=architecture(self.model.net).memory_format)
        peak = peak_flops(config.plan, context.device)
        self.peak = peak and peak * self.world.size
        if peak or len(self.phases) > 1:                # counting takes a second, and a single phase needs no comparison
            self.costs = [useful_flops(phase, self.model) for phase in self.phases]
        net, plain = self.model.net, None
        if config.run.fsdp:                             # a sharded state_dict would be gathered while training goes on
            plain = copy.deepcopy(net).to("meta")
            with autocast(context.device, config.run.dtype):
                shard(net, self.world, DTYPES[config.run.reduce_dtype])
        self.trained = (what_is_trained(config, tuned, lambda: self.model, context.folder) if config.finetune.kind else
                        TrainedModel(lambda: self.model, parts, Frozen(context.folder), plain))
        self.objective = lookup(OBJECTIVES, config.objective.name, "objective")(config, self.model, parts, *teacher)
        self.objective.mean = self.world.mean
        for network in self.objective.networks.values():
            network.to(context.device)
        if self.model.placement is not None:
            self.objective.remember(self.model.text.tokenize(["", *few]), context.device)

    def prepare_networks(self, index: int) -> dict[str, Any]:
        """Set the model and the objective to a phase -> what to call in it, by part name: for the network its compiled handle, where
        it is compiled."""
        config = self.phases[index]
        self.model = at_phase(self.model, config)
        self.objective.begin_phase(config, self.model)
        compiled = {"net": compile_network(self.model.net, config)} if config.run.compile else {}
        return self.model.modules | dict(self.objective.networks) | compiled

    def micro_batch_count(self, index: int) -> int:
        """The number of micro-batches per step and process with which a phase begins."""
        world, known = self.world, self.micro_batches[index] if self.micro_batches else 1
        return min(max(known, -(-self.phases[index].optimisation.grad_accum // world.size)), self.settings.batch_size // world.size)

    def begin_phase(self, index: int) -> Phase:
        config, device, objective = self.phases[index], self.context.device, self.objective
        networks, count = self.prepare_networks(index), self.micro_batch_count(index)
        load = lambda world: make_loader(config, self.caches[index], self.model.text.tokenizers, world, needs_sizes(config))
        loader = self.loader = load(self.world)
        with autocast(device, config.run.dtype):
            objective.prepare(self.context, lambda: load(World()).batch)
        most = self.settings.batch_size // self.world.size
        # An adapter beside the model may drop inputs, which validation does not want. The model's networks drop none.
        beside = [module for part, module in self.trained.modules.items() if module is not self.model.modules.get(part)]

        def losses(micro: Any, progress: float) -> torch.Tensor:
            with evaluating(*beside), autocast(device, config.run.dtype):
                return objective.losses(objective.turns[0], networks, micro, progress)

        held_out = held_out_batch(loader, objective, config.run.seed)
        validation = held_out and Validation(held_out, -(-most // count), device, losses, objective.to_device)
        return Phase(config, loader.batch, loader.part, networks, count, validation)

    def state(self) -> dict[str, Any]:
        return {"data": self.cache_digests} | ({"base": self.base} if self.base else {})

    def check_resume(self, state: dict[str, Any]) -> None:
        if state["data"] != self.cache_digests:
            raise ValueError(f"{', '.join(str(cache.folder) for cache in self.caches)} has changed since the checkpoint of step "
                             f"{state['step']}: restore the latents that the run began with, or start another run with --out")
        if state.get("base", "") != self.base:
            raise ValueError(f"{self.config.finetune.model} has other weights than at step {state['step']}: restore the model that the run "
                             "trains beside, or start another run with --out")

    def draw_samples(self, ema: EMA | PowerEMA | None, step: int) -> Path | None:
        """Draw fixed prompts from fixed seeds, so that the grids of different steps and runs are comparable."""
        with ema.applied():
            return self.draw_grid(f"step-{step:06d}")

    def draw_before(self) -> None:
        """Draw what the model draws that --finetune trains, unless that has been done: weights of a checkpoint are not loaded yet. The
        report shows it beside the grids of the training, so that drift is seen."""
        if not (self.context.folder / "samples" / f"{BEFORE}.png").exists():
            self.draw_grid(BEFORE)

    def draw_grid(self, name: str) -> Path | None:
        """Draw the sample grid with the weights as they are -> its file, samples/NAME.png, None in processes that do not write."""
        model, prompts = self.model, fixed_prompts(self.config, self.caches[0])
        repeated = [prompt for prompt in prompts for _ in range(2)]
        with (evaluating(model.net, *model.text.modules.values(), *self.trained.modules.values()),
              autocast(self.context.device, self.config.run.dtype)):
            images = draw(model, repeated, range(len(repeated)), draw_settings(model))
        if not self.world.main:
            return None
        file = self.context.folder / "samples" / f"{name}.png"
        write_picture(file, tile(images, columns=8))
        return file


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Inside, networks are in evaluation mode; afterwards in training mode."""
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for network in networks:
            network.train()


# ---------------------------------------------------------------- the model


def compile_network(net: nn.Module, config: Config) -> Callable[..., torch.Tensor]:
    """A compiled handle of the network, which shares its parameters."""
    torch.compiler.reset()              # forgets the graphs of the last picture size: torch.compile keeps only a few
    # Micro-batches of two sizes get a static graph each. With --mask-padding (captions are cut to the longest one) and with --buckets
    # there may be more shapes than torch.compile keeps graphs, so it may switch to dynamic ones.
    dynamic = None if config.objective.mask_padding or config.data.buckets else False
    if config.run.compile_blocks:
        return compile_blocks(net, dynamic)
    return torch.compile(net, dynamic=dynamic, options=dict(architecture(net).compile_options) or None)


def build_text_encoders(config: Config, run: Path, captions: Iterable[str], last: Path | None) -> TextEncoders:
    """The pretrained frozen text encoders in the run's folder, or a new one that is trained with the network. last: the checkpoint
    that a resumed run continues from, whose tokenizer is used."""
    settings = config.text
    if settings.weights:
        return read_texts(config, run / OWN_TEXTS)
    length = settings.fields.get("context_length", 77)
    row = lookup(TEXT_ENCODERS, settings.encoder, "text encoder")
    tokenizer = (open_tokenizer(last / "model" / "tokenizer") if last else
                 row.tokenizer.train(captions, settings.vocab_size, length))
    known = {field.name for field in fields(row.config)}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id") if name in known}
    module = row.module(build_dataclass(row.config, settings.fields | ids | {"vocab_size": len(tokenizer)}, "--text"))
    return TextEncoders([TextEncoder(module, tokenizer)], settings.join or "single")


def new_model(config: Config, context: RunContext, vae: nn.Module, captions: Iterable[str], last: Path | None) -> Tuned:
    """A model with a new network and, unless they are pretrained, new text encoders, which are trained. Arguments as in build()."""
    model = build_model(config, vae, build_text_encoders(config, context.folder, captions, last))
    texts = () if config.text.weights else model.text.modules
    parts = ("net", *texts, *lookup(OBJECTIVES, config.objective.name, "objective").trains_too)
    return Tuned(model, {part: model.modules[part] for part in parts})


def build_model(config: Config, vae: nn.Module, text: TextEncoders) -> Model:
    """A model with a newly initialised network, in training mode."""
    channels, size = vae.config.latent_channels, phases(config)[-1].data.resolution // vae.config.downscale
    widths = text.widths([architecture(module).widths(module.config) for module in text.modules.values()])
    shapes = NetworkShapes(channels, channels * (1 + config.objective.learned_variance), widths, size)
    net = told_too(new_network(config.network.name, config.network.settings, shapes), OBJECTIVES[config.objective.name].tells(config))
    net.grad_checkpointing = config.network.grad_checkpointing
    return Model(net, vae, text, process_of(config.objective), config.objective.prediction, {}, {})


def at_phase(model: Model, config: Config) -> Model:
    """The same model with the process, scheduler config and defaults of one phase; its networks stay the same objects."""
    objective, drawing = config.objective, config.drawing
    if config.finetune.kind:                            # all else is as the model says
        usual, typed = drawn_as(model), dict(sampler=drawing.sampler, steps=drawing.steps, cfg=drawing.cfg)
        changed = {name: value for name, value in typed.items() if value != usual[name]}
        return replace(model, defaults=model.defaults | changed | dict(resolution=config.data.resolution))
    defaults = dict(preset=config.run.preset, resolution=config.data.resolution, sampler=drawing.sampler, steps=drawing.steps,
                    cfg=drawing.cfg, data=[*map(portable_data, config.data.sources)], mask_padding=objective.mask_padding)
    if words := model.defaults.get("words"):
        defaults["words"] = words
    if model.text.join != "single":
        defaults["text_join"] = model.text.join
    return replace(model, process=process_of(objective), scheduler=scheduler_config(config, model.text.join), defaults=defaults)


def scheduler_config(config: Config, join: str) -> dict[str, Any]:
    """The scheduler_config.json of a model trained with this config. join: the rule that joins its text encoders."""
    objective = config.objective
    network = lookup(NETWORKS, config.network.name, "network").classes[0]
    pipeline = pipelines.PIPELINES[pipelines.written_as(network, join)]
    return scheduler.to_config(objective.process, process_options(objective), objective.prediction, config.drawing.sampler,
                               flow_match=pipeline.flow_match, learned_variance=objective.learned_variance)


# ---------------------------------------------------------------- the data


def needs_sizes(config: Config) -> bool:
    """Whether the network is told the sizes of pictures, which the data then must know."""
    return "sizes" in NETWORKS[config.network.name].extras(network_config(config.network.name, config.network.settings))


def make_loader(config: Config, data: Cache, tokenizers: Sequence[BaseTokenizer], world: World, sizes: bool = False) -> Loader:
    """A loader of this process's part of every batch, with sources and captions mixed as --data and --caption-key say."""
    own_tokens = Path(config.run.out) / f"tokens-{config.data.resolution}" if config.data.cache else None
    missing = [tokenizer for tokenizer in tokenizers if not has_tokens(data, tokenizer)]
    for tokenizer in missing if world.main else []:
        write_tokens(data.folder, tokenizer, own_tokens)
    world.barrier()
    if not all(has_tokens(data, tokenizer) for tokenizer in tokenizers):
        data = Cache(data.folder, own_tokens)           # a --cache may be shared by several runs, so tokens go into the run folder
    weights = [source.weight for source in parse_sources(config.data.sources)]
    loader = Loader(data, [tokenizer.fingerprint for tokenizer in tokenizers], batch_size=config.optimisation.batch_size,
                    seed=config.run.seed, rank=world.rank, world=world.size,
                    weights=weights if len(weights) > 1 and weights[0] else None, sizes=sizes, loss_weights=loss_weights(config),
                    hold_out=config.run.val_samples, caption_weights=tuple(split_weights(config.data.caption_key).values()) or (1.0,))
    for size, count in loader.order.never_drawn:
        print(f"{count:,} pictures of latent size {size} are never drawn: fewer than one batch of {config.optimisation.batch_size}")
    return loader


def has_tokens(data: Cache, tokenizer: BaseTokenizer) -> bool:
    try:
        data.check_tokens(tokenizer.fingerprint)
    except ValueError:
        return False
    return True


def fixed_prompts(config: Config, data: Cache) -> list[str]:
    """The prompts of the sample grids: --sample-prompts, else the toy world's own, else about 8 captions spread over the data."""
    if config.run.sample_prompts:
        return config.run.sample_prompts.split("|")
    if all_toyworld(config.data.sources):
        return toyworld.PROMPTS
    return list(dict.fromkeys(data.captions(i)[0][1] for i in range(0, len(data), -(-len(data) // 8))))
