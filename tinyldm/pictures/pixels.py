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

CONTRAST = 4                            # by which `difference` multiplies
SSIM_WINDOW = 11                        # pixels per side of the window of `ssim`


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


def ssim(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Structural similarity of each picture, 1 for equal ones: the mean over colours and over all places of the window in the picture.
    Both uint8 [b, h, w, 3], of SSIM_WINDOW pixels or more -> float64 [b]. (Wang, Bovik, Sheikh, Simoncelli 2004, IEEE Trans. Image
    Process. 13, Eq. 13 to 16. Its pictures are grey.)"""
    if min(images.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"pictures of {images.shape[2]} x {images.shape[1]} px are too small for SSIM: it takes {SSIM_WINDOW} px or more")
    window = torch.exp(-0.5 * ((torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2) / 1.5) ** 2)
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def of_picture(x: Tensor, y: Tensor) -> float:                      # both [3, 1, h, w]
        stack = torch.cat([x, y, x * x, y * y, x * y])
        blurred = torch.conv2d(torch.conv2d(stack, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        mean_x, mean_y, xx, yy, xy = blurred.chunk(5)
        likeness = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
        return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2))).mean())

    pairs = zip(*(torch.from_numpy(np.ascontiguousarray(each)).permute(0, 3, 1, 2).double()[:, :, None] for each in (images, originals)))
    return np.array([of_picture(*pair) for pair in pairs])


def difference(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """How far pictures are apart, times CONTRAST, to look at: two arrays uint8 of one shape -> the same shape."""
    return (CONTRAST * np.abs(images.astype(int) - originals)).clip(0, 255).astype(np.uint8)
