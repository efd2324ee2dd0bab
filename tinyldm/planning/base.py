"""The model that --finetune trains further, and what is trained of it or beside it: for plans as shapes without values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tinyldm.adapters.embedding import new_embeddings, train_tokens
from tinyldm.adapters.lora import LoRA, LoRAConfig
from tinyldm.adapters.targets import adapted_parts
from tinyldm.config import Config, FinetuneConfig
from tinyldm.device import native_bf16
from tinyldm.folders.load import load_model
from tinyldm.lookup import lookup
from tinyldm.model import Model

META = torch.device("meta")


def load_base(config: Config, device: torch.device = META, place: torch.device | None = None, copy: Path | None = None) -> Model:
    """The model of --model, none of whose weights needs gradients yet. Errors as of load_model.

    device  where it computes, which decides about the precision; "meta": shapes without values, in float32
    place   where its weights are loaded to; None: to the device
    copy    a model folder to read instead, which this run has written"""
    own, place = config.finetune, place or device
    dtype = torch.float32 if device == META else frozen_dtype(config, device)
    if copy:
        return load_model(copy, place, dtype, ema=False)
    return load_model(own.model, place, dtype, variant=own.variant or None, tokenizer=own.tokenizer or None, parts=own.parts,
                      without={"text_encoder_3"} if own.without_t5 else ())


def frozen_dtype(config: Config, device: torch.device = META) -> torch.dtype:
    """The precision of weights that are not trained: bfloat16 on GPUs where autocast multiplies in it, and in plans. (Autocast rounds
    weights to it anyway, but for norms and tables.) Beside a network that is trained as a whole they are in float32: the model is
    written again."""
    half = device.type == "meta" or device.type == "cuda" and (config.run.dtype == "bf16" or native_bf16(device))
    return torch.bfloat16 if half and config.run.dtype != "fp32" and not config.finetune.whole else torch.float32


# ---------------------------------------------------------------- what is trained of it


class Tuned(NamedTuple):
    model: Model                            # as it is trained: with adapters attached, or with tokenizers that know a new token
    modules: dict[str, nn.Module]           # part name -> what is trained of it, or beside it


def tune_adapter(own: FinetuneConfig, model: Model) -> Tuned:
    """A low-rank adapter beside the network and, where that is asked for, the text encoders."""
    adapters = {part: LoRA(network, lora_config(own)) for part, network in adapted_parts(model, own.groups).items()}
    for adapter in adapters.values():
        adapter.attach()
    return Tuned(model, adapters)


def lora_config(own: FinetuneConfig) -> LoRAConfig:
    return LoRAConfig(own.rank, own.alpha, tuple(own.groups), own.conv_rank, own.rank_stabilised, own.lora_dropout, own.ranks)


def tune_whole(own: FinetuneConfig, model: Model) -> Tuned:
    """The network itself and, where that is asked for, the text encoders."""
    parts = {"net": model.net, **(model.text.modules if own.train_text else {})}
    for network in parts.values():
        network.requires_grad_(True)
    return Tuned(model, parts)


def tune_embeddings(own: FinetuneConfig, model: Model) -> Tuned:
    """The vectors of a new token."""
    embeddings = new_embeddings(model, own.token, own.initial or None, own.vectors)
    return Tuned(train_tokens(model, embeddings), embeddings)


TUNED: dict[str, Callable[[FinetuneConfig, Model], Tuned]] = {      # by --finetune
    "lora": tune_adapter,
    "dreambooth": lambda own, model: (tune_adapter if own.rank else tune_whole)(own, model),
    "textual_inversion": tune_embeddings,
    "whole": tune_whole,
}


def tune(config: Config, model: Model) -> Tuned:
    """A model as --finetune trains it. ValueError where it cannot be trained so."""
    return lookup(TUNED, config.finetune.kind, "--finetune")(config.finetune, model)
