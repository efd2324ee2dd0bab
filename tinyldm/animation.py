"""From one picture to another: noises and captions in between, and the file that shows the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FORMATS = (".webp", ".gif")
FRAME, REST = 80, 700                   # milliseconds: a frame, and each end of the way
EXIF, COMMENT = 0x8769, 0x9286          # Exif's own block, and UserComment in it: where AUTOMATIC1111 writes and looks


class Morph(NamedTuple):
    """Where pictures are on their way to, and how far each has come."""

    prompt: str
    seed: int
    shares: Sequence[float]             # one per picture: 0 is still itself, 1 has arrived


def slerp(a: Tensor, b: Tensor, share: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """From a (share 0) to b (1) along the great circle through them, over `dim` (Shoemake, 1985, "Animating rotation
    with quaternion curves"). Between two noises it stays noise of unit variance, which a straight line does not.

    a, b and share broadcast. Where a and b are parallel it is the straight line.
    """
    unit = lambda y: y / torch.linalg.vector_norm(y, dim=dim, keepdim=True).clamp(min=1e-12)
    cosine = (unit(a) * unit(b)).sum(dim, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    bent = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin().clamp(min=1e-12)
    return torch.where(cosine.abs() > 0.9999, torch.lerp(a, b, share.to(a)), bent)


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
