"""Resizes for measuring, by name. Published numbers depend on them: the FID of the same pictures differs by several points between two
of these rules (arXiv:2104.11222), so that every number is printed with the name of its rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

BICUBIC = Image.Resampling.BICUBIC

Resize = Callable[[np.ndarray, int], Tensor]        # uint8 [n, h, w, 3], size -> float32 [n, 3, size, size] in 0..255


def unchanged(images: np.ndarray, size: int) -> Tensor:
    """[n, 3, h, w]: FIDInception itself resizes by TensorFlow 1's rule."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()


def pytorch(images: np.ndarray, size: int) -> Tensor:
    """Bilinear with half-pixel centres and no averaging where pictures shrink, as pytorch-fid does it. (It is cut to 0..255 as
    clean-fid's copy of this rule is: white can be rounded to a little more than 255.)"""
    return F.interpolate(unchanged(images, size), (size, size), mode="bilinear", align_corners=False).clamp(0, 255)


def clean(images: np.ndarray, size: int) -> Tensor:
    """Pillow's bicubic of each channel in float32, cut to 0..255 and not rounded, as clean-fid does it."""
    channels = [Image.fromarray(channel).resize((size, size), BICUBIC)
                for image in images for channel in image.transpose(2, 0, 1).astype(np.float32)]
    return torch.from_numpy(np.stack([np.asarray(each) for each in channels])).clamp(0, 255).unflatten(0, (-1, 3))


def bicubic(images: np.ndarray, size: int) -> Tensor:
    """Pillow's bicubic of the whole picture, rounded to bytes; other sides than square are distorted. As dgm-eval does for DINOv2, and
    SigLIP's own preparation."""
    return _by_pillow(images, lambda image: image.resize((size, size), BICUBIC))


def bicubic_crop(images: np.ndarray, size: int) -> Tensor:
    """Pillow's bicubic of the shorter side to `size`, rounded to bytes, then the centre: CLIP's own preparation. (The longer side and
    the corner are rounded as torchvision's Resize and CenterCrop do. transformers' processor rounds the corner down.)"""
    def fit(image: Image.Image) -> Image.Image:
        short, long = min(image.size), int(size * max(image.size) / min(image.size))
        width, height = (size if side == short else long for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image.resize((width, height), BICUBIC).crop((left, top, left + size, top + size))

    return _by_pillow(images, fit)


def crop_bicubic(images: np.ndarray, size: int) -> Tensor:
    """The largest square at the centre, then Pillow's bicubic, rounded to bytes: as the code of CMMD does it."""
    def fit(image: Image.Image) -> Image.Image:
        side, left, top = min(image.size), (image.width - min(image.size)) // 2, (image.height - min(image.size)) // 2
        return image.crop((left, top, left + side, top + side)).resize((size, size), BICUBIC)

    return _by_pillow(images, fit)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3], by Pillow's bicubic; one that has this size stays as it is."""
    return image if image.shape[:2] == (height, width) else np.asarray(Image.fromarray(image).resize((width, height), BICUBIC))


def _by_pillow(images: np.ndarray, fit: Callable[[Image.Image], Image.Image]) -> Tensor:
    return unchanged(np.stack([np.asarray(fit(Image.fromarray(image))) for image in images]), 0)


RESIZES: dict[str, Resize] = {
    "tensorflow1": unchanged,
    "pytorch": pytorch,
    "clean": clean,
    "bicubic": bicubic,
    "bicubic_crop": bicubic_crop,
    "crop_bicubic": crop_bicubic,
}
