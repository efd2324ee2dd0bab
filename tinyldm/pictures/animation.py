"""From one picture to another: noises and captions in between, and the file that shows the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = (".webp", ".gif")
FRAME, REST = 80, 700                   # milliseconds: a frame, and each end of the way
EXIF, COMMENT = 0x8769, 0x9286          # Exif's own block, and UserComment in it: where AUTOMATIC1111 writes and looks


def even(frames: int) -> list[float]:
    """The shares of so many frames, both ends among them."""
    return [i / (frames - 1) for i in range(frames)]


def write_animation(file: Path, images: Sequence[np.ndarray], text: str = "") -> None:
    """Pictures, uint8 [h, w, 3] each, as an animated WebP or GIF that starts over; `text` goes into its metadata."""
    frames = [Image.fromarray(image) for image in images]
    durations = [REST] + [FRAME] * (len(frames) - 2) + [REST]
    if file.suffix.lower() == ".gif":
        about = {"comment": text.encode()}
    else:
        exif = Image.Exif()
        exif.get_ifd(EXIF)[COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
        about = {"exif": exif, "quality": 90}
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0, **about)
