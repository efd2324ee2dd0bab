"""Animations that change one picture into another: the fractions of the frames, and the file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tinyldm.files import write_file
from tinyldm.pictures.metadata import exif_comment
from tinyldm.unicode import shown

FRAME, PAUSE = 80, 700                  # milliseconds that a frame is shown, and that the first and last are


def even_fractions(frames: int) -> list[float]:
    """Evenly spaced fractions from 0 to 1, one per frame."""
    return [i / (frames - 1) for i in range(frames)]


def write_animation(file: Path, images: Sequence[np.ndarray], text: str = "") -> None:
    """Write pictures, uint8 [h, w, 3] each, as an animated WebP or GIF that loops, atomically; `text` goes into its metadata."""
    frames = [Image.fromarray(image) for image in images]
    durations = [PAUSE] + [FRAME] * (len(frames) - 2) + [PAUSE]
    text = shown(text)
    if file.suffix.lower() == ".gif":
        about = {"comment": text.encode()}
    else:
        about = {"exif": exif_comment(text), "quality": 90}
    animation = io.BytesIO()
    frames[0].save(animation, format=file.suffix[1:].upper(), save_all=True, append_images=frames[1:], duration=durations, loop=0, **about)
    write_file(file, animation.getvalue())
