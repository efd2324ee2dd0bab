"""Animations that change one picture into another: the fractions of the frames, and the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = (".webp", ".gif")
FRAME, PAUSE = 80, 700                  # milliseconds that a frame is shown, and that the first and last are
EXIF, COMMENT = 0x8769, 0x9286          # the Exif block and its field UserComment, which AUTOMATIC1111 writes and reads


def even_fractions(frames: int) -> list[float]:
    """Evenly spaced fractions from 0 to 1, one per frame."""
    return [i / (frames - 1) for i in range(frames)]


def write_animation(file: Path, images: Sequence[np.ndarray], text: str = "") -> None:
    """Write pictures, uint8 [h, w, 3] each, as an animated WebP or GIF that loops; `text` goes into its metadata."""
    frames = [Image.fromarray(image) for image in images]
    durations = [PAUSE] + [FRAME] * (len(frames) - 2) + [PAUSE]
    if file.suffix.lower() == ".gif":
        about = {"comment": text.encode()}
    else:
        exif = Image.Exif()
        exif.get_ifd(EXIF)[COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
        about = {"exif": exif, "quality": 90}
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0, **about)
