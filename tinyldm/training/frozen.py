"""The networks that a run uses and does not train. Each is written once, to the run's folder, and every checkpoint holds hard links to it
(copies where the disk has no links), so a checkpoint is complete and costs little more than what is trained.

    RUN/vae/     the autoencoder, pretrained or of the first stage
    RUN/text/    pretrained text encoders: text_encoder/, tokenizer/, text_encoder_2/ and so on, as in a model folder

From then on these are what the run uses, whatever becomes of --vae-weights and --text-weights.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tinyldm.config import Config
from tinyldm.files import can_link, replace_folder
from tinyldm.folders.save import save_texts, text_folders
from tinyldm.folders.texts import load_texts
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


def keep_texts(config: Config, context: RunContext, last: Path | None) -> None:
    """Write RUN/text, unless it is there, where the text encoders are pretrained: the main process alone, while the others wait.

    last: the checkpoint that the run continues from. Its text encoders are the run's, where an older version wrote no RUN/text."""
    folder = context.folder / OWN_TEXTS
    while config.text.weights and not folder.is_dir():
        if context.world.main:
            source = last / "model" if last else config.text.weights
            replace_folder(folder, lambda partial: save_texts(partial, read_texts(config, source)))
        else:
            context.check(), time.sleep(0.5)


def read_texts(config: Config, source: str | Path) -> TextEncoders:
    return load_texts(source, config.text.join, partial(token_counts, config))
