"""Where a script writes the pictures that it draws."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyldm.pictures.pixels import write_picture


class Output(NamedTuple):
    folder: Path
    file: Path | None                   # for the only picture, or a grid of all; None: numbered files in the folder
    written: list[Path]                 # the files so far

    def write(self, image: np.ndarray, text: str, caption: str, seed: int) -> None:
        """Write uint8 [h, w, 3] with the text `parameters`."""
        file = self.file or claim(self.folder, caption, seed)
        try:
            write_picture(file, image, text)
        except BaseException:
            if not self.file:
                file.unlink(missing_ok=True)
            raise
        self.written.append(file)


def claim(folder: Path, caption: str, seed: int) -> Path:
    """The file of the next number in a folder, 0003-42-a-red-fox.png, made empty, so that no other process takes it too."""
    slug = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60]
    taken = [int(found[1]) for file in folder.iterdir() if (found := re.match(r"([0-9]{4,})-", file.name))]
    number = max(taken, default=0) + 1
    while True:
        file = folder / f"{number:04d}-{seed}-{slug}.png"
        try:
            file.touch(exist_ok=False)
            return file
        except FileExistsError:                 # another process was faster
            number += 1
