"""The text encoders of a planned run, as shapes without values, and the condition that they give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tinyldm.config import Config
from tinyldm.folders.hub import is_hub_id, missing
from tinyldm.folders.load import load_text
from tinyldm.folders.parts import config_in
from tinyldm.folders.texts import join_in
from tinyldm.lookup import build_dataclass, lookup
from tinyldm.model import NETWORKS, TEXT_ENCODERS, architecture, network_config
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.layers import Cond
from tinyldm.models.t5 import T5, T5Config
from tinyldm.planning.memory import empty
from tinyldm.text.encoders import JOINS, Encoded, TextEncoders
from tinyldm.vendor_loaders import pipelines

OWN_TEXTS = "text"                      # the folder of a run with its pretrained text encoders: training/frozen.py
CLIP_L = CLIPTextConfig(activation="gelu")
BIG_G = CLIPTextConfig(activation="gelu", width=1280, layers=32, heads=20, mlp_width=5120, projection_dim=1280)
# Published text encoders by the rule that joins them, for pretrained ones that are not on this machine.
PUBLISHED = {"single": (CLIP_L,), "sdxl": (CLIP_L, BIG_G), "sd3": (replace(CLIP_L, projection_dim=768), BIG_G, T5Config()),
             "flux": (CLIP_L, T5Config())}
MODULES = {CLIPTextConfig: CLIPText, T5Config: T5}


def text_source(config: Config) -> Path:
    """Where a run's pretrained text encoders are: in its own folder where a resumed run has them, else in --text-weights, which may be a
    hub id. Plans do not ask the hub."""
    own = Path(config.run.out) / OWN_TEXTS
    return own if config.run.resume != "no" and own.is_dir() else Path(config.text.weights)


def join_of(config: Config) -> str:
    """The rule that joins a run's text encoders: --text-join, else that of the model folder in --text-weights. Where no such folder is on
    this machine, it is the rule of published models with such a network."""
    if config.text.join or not config.text.weights:
        return config.text.join or "single"
    source = text_source(config)
    return join_in(source) if source.exists() else usual_join(config)


def usual_join(config: Config) -> str:
    row = lookup(NETWORKS, config.network.name, "network")
    if "sizes" in row.extras(network_config(config.network.name, config.network.settings)):         # the other U-Nets are not told any
        return pipelines.PIPELINES[pipelines.SDXL].join
    return next(pipeline.join for pipeline in pipelines.PIPELINES.values() if pipeline.network in (row.classes[0], ""))


def assumed(config: Config) -> str:
    """What the plan assumes of text encoders that are not on this machine, in words; "" where it knows them."""
    if not config.text.weights or text_source(config).exists():
        return ""
    return f"the text encoder is not here: published ones are assumed, joined by --text-join {join_of(config)}"


def token_counts(config: Config, join: str) -> Sequence[int | None]:
    """How many tokens each text encoder reads in a published model of such a network; None or too few: as its tokenizer says."""
    row = lookup(NETWORKS, config.network.name, "network")
    network = row.to_config(network_config(config.network.name, config.network.settings))
    return pipelines.PIPELINES[pipelines.written_as(row.classes[0], join)].lengths(network)


def meta_text(config: Config) -> nn.Module:
    """The text encoder that a run would build or load, on the meta device; several in an nn.ModuleList. Pretrained ones are those of
    text_source(); of a hub id that is not here yet, the published ones are assumed that are joined by the same rule. ValueError for any
    other path."""
    if not config.text.weights:
        row = lookup(TEXT_ENCODERS, config.text.encoder, "text encoder")
        with torch.device("meta"):
            return row.module(build_dataclass(row.config, config.text.fields | {"vocab_size": config.text.vocab_size}, "--text"))
    join, path = join_of(config), text_source(config)
    if path.is_dir():
        folders = sorted(path.glob("text_encoder*"))[:1 if join == "single" else None] or [path]
        found = [config_in(folder, TEXT_ENCODERS.values()) for folder in folders]
    elif path.is_file():
        found = [(architecture(module), module.config) for module in [load_text(path, "meta")]]
    elif not is_hub_id(config.text.weights):
        raise missing(config.text.weights)
    else:
        found = [(None, published) for published in lookup(PUBLISHED, join, "rule to join text encoders")]
    counts = [*token_counts(config, join), *[None] * len(found)]
    kinds = [row.module if row else MODULES[type(own)] for row, own in found]
    return on_meta(zip(kinds, (replace(own, context_length=count) if count else own for (_, own), count in zip(found, counts))))


def on_meta(kinds: Iterable[tuple[type[nn.Module], object]]) -> nn.Module:
    with torch.device("meta"):
        made = [kind(own) for kind, own in kinds]
    return made[0] if len(made) == 1 else nn.ModuleList(made)


def like(texts: TextEncoders) -> nn.Module:
    """The same text encoders on the meta device, for captions of as many tokens."""
    return on_meta((type(module), replace(module.config, context_length=tokenizer.context_length)) for module, tokenizer in texts.encoders)


def encoders(text: nn.Module) -> list[nn.Module]:
    return [*text] if isinstance(text, nn.ModuleList) else [text]


def run_encoders(text: nn.Module, join: str, batch: int) -> list:
    """Forward passes of all text encoders on `batch` captions."""
    modules = encoders(text)
    calls = JOINS[join].calls or [{}] * len(modules)
    return [module(empty(batch, module.config.context_length, dtype=torch.long), **call) for module, call in zip(modules, calls)]


def condition(text: nn.Module, join: str, batch: int = 1) -> Cond:
    """What a network gets of `batch` captions: shapes on the meta device."""
    def features(module: nn.Module) -> Encoded:
        widths = architecture(module).widths(module.config)
        return Encoded(empty(batch, module.config.context_length, widths.context), None, empty(batch, widths.pooled))

    return JOINS[join].conds([features(module) for module in encoders(text)])


def caption_tokens(text: nn.Module) -> int:
    """The number of token ids of a caption, for all text encoders together."""
    return sum(module.config.context_length for module in encoders(text))
