"""The pictures with captions that a CLIP is trained on. They lie in a file of the run's folder, as those of an autoencoder do."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyldm.config import Config
from tinyldm.data.encoding import Item, make_recipe
from tinyldm.data.prepare import usable_pictures
from tinyldm.data.report import listed
from tinyldm.files import replace_folder
from tinyldm.training.context import RunContext
from tinyldm.training.vae_pictures import PICTURES, POLL, forget_pictures, read_pictures, write_pictures


class CaptionedPictures(NamedTuple):
    images: np.ndarray                          # uint8 [n, h, w, 3]
    captions: list[list[tuple[int, str]]]       # of every picture: (index into --caption-key, caption), at least one


def captioned_pictures(config: Config, context: RunContext) -> CaptionedPictures:
    """--vae-pictures of the run's data, cropped square, in a file that need not fit into memory. A resumed run goes on with the same ones.
    All processes call this; the main one writes the file. OSError where it does not fit on the disk."""
    folder = context.folder / f"{PICTURES}-{config.autoencoder.pictures}-captioned"
    while (found := read(folder)) is None:
        if context.world.main:
            forget_pictures(context.folder)                     # another number of them
            replace_folder(folder, lambda partial: write(partial, config, context))
        else:
            context.check(), time.sleep(POLL)
    print(f"the CLIP trains on {len(found.images):,} pictures")
    return found


def write(folder: Path, config: Config, context: RunContext) -> None:
    faults: Counter = Counter()
    captions: list[list[tuple[int, str]]] = []

    def noted(items: Iterator[Item]) -> Iterator[np.ndarray]:
        for item in items:
            captions.append(item.captions)
            yield item.image

    wanted = config.autoencoder.pictures
    write_pictures(folder / "pictures.npy", noted(usable_pictures(make_recipe(config.data), config, wanted, faults, context.signals.check)))
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    if faults := +faults:
        print(f"left out as unusable: {listed(faults)}")


def read(folder: Path) -> CaptionedPictures | None:
    """None where the folder is missing or damaged."""
    images = read_pictures(folder / "pictures.npy")
    if images is None:
        return None
    try:
        return CaptionedPictures(images, json.loads((folder / "captions.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
