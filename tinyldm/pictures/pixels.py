"""Converts pictures between bytes and a network's pixel values, writes them, and compares them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tinyldm.files import write_file
from tinyldm.unicode import shown


def to_bytes(pixels: Tensor) -> np.ndarray:
    """[b, 3, h, w] in [-1, 1] -> uint8 [b, h, w, 3]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_pixels(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [b, h, w, 3] -> float32 [b, 3, h, w] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).to(torch.float32, copy=True).div_(127.5).sub_(1)


def write_picture(file: Path, image: np.ndarray, parameters: str = "") -> None:
    """Write uint8 [h, w, 3] as a PNG, whatever the file's name, atomically. parameters: its text of that name (metadata.py)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    png, about = io.BytesIO(), PngInfo()
    if parameters:
        about.add_text("parameters", shown(parameters))
    Image.fromarray(image).save(png, format="PNG", pnginfo=about)
    write_file(file, png.getvalue())


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB, 100 at most. Both uint8 [b, h, w, 3] -> float64 [b]."""
    error = (((images.astype(float) - originals) / 255) ** 2).mean((1, 2, 3))
    return -10 * np.log10(error.clip(1e-10))
