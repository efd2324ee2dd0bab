"""Runs that train a model that exists (--finetune): their defaults by kind, and what is refused at once.

The defaults are those of the published scripts (diffusers, examples/dreambooth, examples/text_to_image, examples/textual_inversion),
but for the learning rate's decay at the end, and for averaged weights, which those do not have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinyldm.config.fields import Config
from tinyldm.config.finetune_fields import FinetuneConfig

# "" and 0 stand for what the model says: its picture size, prediction, times, sampler.
SHARED: dict[str, Any] = dict(
    data=[], resolution=0, prediction="", times="", sampler="", sample_steps=0, cfg=0.0, optimizer="adamw", weight_decay=0.01,
    caption_dropout=0.0, warmup_steps=0, decay=0.2, ema_decay=0.98, val_samples=0, log_every=10, save_every=100, sample_every=100)
FINETUNES: dict[str, dict[str, Any]] = {        # rows of settings, as PRESETS are
    "lora": SHARED | dict(rank=16, lr=1e-4, max_steps=1000, batch_size=1),
    "dreambooth": SHARED | dict(lr=5e-6, max_steps=400, batch_size=1),
    "textual_inversion": SHARED | dict(lr=2e-3, max_steps=3000, batch_size=4, grad_accum=4, weight_decay=0.0),
    "whole": SHARED | dict(lr=1e-4, max_steps=1000, batch_size=32, weight_decay=0.0),
}
# Laid over a row, in this order, where these settings are typed.
WITH: dict[str, dict[str, dict[str, Any]]] = {
    "dreambooth": {"class": dict(batch_size=2, max_steps=800), "train_text": dict(lr=2e-6), "rank": dict(lr=1e-4)},
}


def finetune_kind(typed: Mapping[str, Any]) -> str:
    """How a model that exists is trained, "" where none is: --objective with a --teacher trains all of its network."""
    return typed.get("finetune") or ("whole" if typed.get("objective") and typed.get("model") else "")


def finetune_row(typed: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to start from where a model is trained further: those of its kind, and what follows from others that are typed."""
    kind = finetune_kind(typed)
    row = {"finetune": kind, "preset": kind, **FINETUNES[kind]}
    for name, changes in WITH.get(kind, {}).items():
        row |= changes if typed.get(name) else {}
    return row


def check_complete(config: Config) -> None:
    """ValueError, with what to add, where --finetune lacks what it cannot do without. (A plan can do without a model.)"""
    own = config.finetune
    dreambooth, inversion = own.kind == "dreambooth", own.kind == "textual_inversion"
    wrong = {
        "--model names a model to train further: say how, with --finetune lora, dreambooth, textual_inversion or whole":
            own.model and not own.kind,
        f"--finetune {own.kind} needs the model to train: --model with a run, a model folder, a file or a hub id":
            own.kind and not own.model,
        f"--finetune {own.kind} needs pictures: --data FOLDER":         # whole: else those of the model
            own.kind not in ("", "whole") and not (config.data.sources or config.data.cache),
        '--finetune dreambooth needs the caption of the pictures: --instance "a photo of a sks dog"': dreambooth and not own.instance,
        '--finetune textual_inversion needs the new word: --token "<my-dog>" --initial dog': inversion and not own.token,
    }
    for text, given in wrong.items():
        if given:
            raise ValueError(text)


def check_finetune(config: Config) -> None:
    """ValueError, in one line with the fix, for settings of --finetune that exclude each other, or cannot work."""
    own = config.finetune
    if not own.kind:
        return
    lora, dreambooth, inversion = (own.kind == kind for kind in ("lora", "dreambooth", "textual_inversion"))
    plain = FinetuneConfig()
    def typed(*names: str) -> str:
        """The first of these flags that a new run is begun with; ""."""
        found = (name for name in names if config.run.resume == "no" and getattr(own, name) != getattr(plain, name))
        return "".join(f"--{name.replace('_', '-')}" for name in [*found][:1])

    of_adapters = typed("rank", "alpha", "rank_stabilised", "targets", "conv_rank", "ranks", "lora_dropout")
    of_words, of_class = typed("vectors", "initial", "style"), typed("class_pictures", "prior_weight")
    wrong = {
        f"{of_adapters} is a setting of adapters: train one, with --finetune lora or with --finetune dreambooth --rank 16":
            of_adapters and not own.adapts and not lora and own.rank >= 0,
        f"{of_words} is for --finetune textual_inversion, not for {own.kind}: leave it out": of_words and not inversion,
        f"{of_class} is a setting of pictures of a class: name it, with --class \"a photo of a dog\"": of_class and not own.class_prompt,
        "--only vae trains an autoencoder: leave out --finetune": config.run.only,
        "--fsdp shards a network that is trained from the start: leave it out with --finetune": config.run.fsdp,
        f"--rank {own.rank} of an adapter must be 1 or more: 4 to 64 are usual": lora and own.rank < 1 or own.rank < 0,
        f"--instance {own.instance} does not contain the token {own.token}, which would not be trained then: add it":
            inversion and own.token and own.instance and not all(own.token in each for each in own.instance.split("|")),
        f"--vectors {own.vectors} must be at least 1": own.vectors < 1,
        f"--class-pictures {own.class_pictures} must be at least 1": own.class_pictures < 1,
        f"--prior-weight {own.prior_weight} must be a positive number": not 0 < own.prior_weight < math.inf,
        f"--lora-dropout {own.lora_dropout} must be at least 0 and below 1": not 0 <= own.lora_dropout < 1,
        f"--class is for --finetune dreambooth, not for {own.kind}: leave it out": own.class_prompt and not dreambooth,
        f"--token is for --finetune textual_inversion, not for {own.kind}: leave it out": own.token and not inversion,
        f"--train-text is for lora and dreambooth: {own.kind} trains nothing but the vectors of its token": own.train_text and inversion,
        f"--batch-size {config.optimisation.batch_size} leaves no room for pictures of the --class beside those of --data: use 2 or more":
            own.class_prompt and config.optimisation.batch_size < 2,
        "--captions and --instance both say what the captions are: leave one out":      # in a run, the first follow from the second
            own.instance and {*config.data.captions} - {own.instance},
        "--instance goes with --data: the captions of --cache are in it": config.data.cache and (own.instance or own.token),
    }
    for text, given in wrong.items():
        if given:
            raise ValueError(text)
