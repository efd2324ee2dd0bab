"""The networks that a run uses and does not train. Each is written once, to the run's folder, and every checkpoint holds hard links to it
(copies where the disk has no links), so a checkpoint is complete and costs little more than what is trained.

    RUN/vae/     the autoencoder, pretrained or of the first stage
    RUN/text/    pretrained text encoders: text_encoder/, tokenizer/, text_encoder_2/ and so on, as in a model folder

From then on these are what the run uses, whatever becomes of --vae-weights and --text-weights. A run that trains an adapter or an
embedding beside a model has neither: it reads the model of --model, which has to stay where it is.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tinyldm.config import Config
from tinyldm.files import can_link, replace_folder
from tinyldm.folders.load import load_vae
from tinyldm.folders.save import save_texts, save_part, text_folders
from tinyldm.folders.texts import load_texts
from tinyldm.planning.base import load_base
from tinyldm.planning.texts import OWN_TEXTS, token_counts
from tinyldm.text.encoders import TextEncoders
from tinyldm.training.context import RunContext


class Frozen(NamedTuple):
    """The folders of a run's frozen networks."""

    run: Path

    @property
    def vae(self) -> Path:
        return self.run / "vae"

    def text(self, i: int) -> tuple[Path, Path]:
        """Of the i-th text encoder, counted from 0, and its tokenizer."""
        encoder, tokenizer = text_folders(i)
        return self.run / OWN_TEXTS / encoder, self.run / OWN_TEXTS / tokenizer

    def bytes_in_checkpoint(self) -> int:
        """What they take in each checkpoint: nothing where it can hold links. (RUN/checkpoints may be a link to another disk.)"""
        files, checkpoints = [file for part in (self.vae, self.run / OWN_TEXTS) for file in part.rglob("*")], self.run / "checkpoints"
        files = [file for file in files if file.is_file()]
        checkpoints.mkdir(exist_ok=True)
        return 0 if files and can_link(files[0], checkpoints) else sum(file.stat().st_size for file in files)


def keep_model(config: Config, context: RunContext) -> None:
    """Write RUN/vae and, unless the text encoders are trained, RUN/text, from the model that --finetune trains as a whole: the main
    process alone, while the others wait."""
    folders = [context.folder / "vae", *[context.folder / OWN_TEXTS] * bool(config.text.weights)]
    while not all(folder.is_dir() for folder in folders):
        if not context.world.main:
            context.check(), time.sleep(0.5)
            continue
        model = load_base(config, torch.device("cpu"))
        write = {"vae": lambda folder: save_part(folder, model.vae), OWN_TEXTS: lambda folder: save_texts(folder, model.text)}
        for folder in folders:
            if not folder.is_dir():
                replace_folder(folder, write[folder.name])


def open_vae(config: Config, context: RunContext) -> nn.Module:
    """The run's autoencoder, on the device."""
    own = context.folder / "vae"
    if own.is_dir() or not config.finetune.kind:
        return load_vae(own, context.device)
    return base_vae(config, context.device)


def base_vae(config: Config, device: torch.device) -> nn.Module:
    """The autoencoder of the model of --finetune."""
    if config.finetune.parts or config.finetune.variant:        # which load_vae does not know
        return load_base(config, torch.device("cpu")).vae.to(device)
    return load_vae(config.finetune.model, device)


def keep_texts(config: Config, context: RunContext, last: Path | None) -> None:
    """Write RUN/text, unless it is there, where the text encoders are pretrained: the main process alone, while the others wait.

    last: the checkpoint that the run continues from. Its text encoders are the run's, where an older version wrote no RUN/text."""
    folder = context.folder / OWN_TEXTS
    while config.text.weights and not config.finetune.kind and not folder.is_dir():
        if context.world.main:
            source = last / "model" if last else config.text.weights
            replace_folder(folder, lambda partial: save_texts(partial, read_texts(config, source)))
        else:
            context.check(), time.sleep(0.5)


def read_texts(config: Config, source: str | Path) -> TextEncoders:
    return load_texts(source, config.text.join, partial(token_counts, config))
