"""Frozen networks whose features of a picture another one learns to predict: the teachers of repa.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.folders.towers import HALF, IMAGENET_MEAN, IMAGENET_STD, load_recogniser, load_vit
from tinyldm.lookup import lookup
from tinyldm.vendor_loaders import clip_model

Colours = tuple[float, float, float]


class TeacherRow(NamedTuple):
    """A row of TEACHERS. Its network has `patch_features`: pixels [b, 3, h, w] -> [b, d, h / patch, w / patch], and `patch`."""

    load: Callable[[str], nn.Module]        # a hub id, folder or file -> the network
    mean: Colours                           # what is subtracted from colours in 0..1 ...
    std: Colours                            # ... and what they are then divided by
    source: str                             # the hub id of the usual weights; "": they are on no hub


TEACHERS: dict[str, TeacherRow] = {
    "dinov2": TeacherRow(load_vit, IMAGENET_MEAN, IMAGENET_STD, "facebook/dinov2-base"),
    "clip": TeacherRow(load_vit, clip_model.MEAN, clip_model.STD, "openai/clip-vit-base-patch16"),
    "siglip": TeacherRow(load_vit, HALF, HALF, "google/siglip-base-patch16-224"),
    "recogniser": TeacherRow(load_recogniser, HALF, HALF, ""),          # of toyworld's pictures
}


class Teacher(nn.Module):
    """forward: pictures uint8 [b, 3, h, w] of any size, grid (rows, columns) -> features [b, width, rows, columns]."""

    def __init__(self, name: str, source: str = ""):
        """source: where the weights are; "": at the usual hub id. ValueError where there are none."""
        super().__init__()
        row = lookup(TEACHERS, name, "teacher")
        if not (source or row.source):
            raise ValueError(f"the teacher {name} needs weights: name its file, as in --objective-options teacher={name} "
                             f"weights=~/.cache/tinyldm/{name}.safetensors")
        self.net = row.load(os.path.expanduser(source or row.source))       # a shell leaves the ~ in weights=~/... as it is
        self.register_buffer("mean", torch.tensor(row.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(row.std).view(3, 1, 1))
        self.width = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (1, 1)).shape[1]

    @torch.no_grad()
    def forward(self, pictures: Tensor, grid: tuple[int, int]) -> Tensor:
        """The picture is resized so that each position of the grid is one patch, as in REPA's code: DINOv2 sees 224 px for 16 x 16
        tokens of 256 px. For a grid much coarser than the picture it is a block of patches, and their features are averaged."""
        patch, sides = self.net.patch, pictures.shape[2:]
        ratio = max(1, round(min(side / (patch * count) for side, count in zip(sides, grid))))
        size, pixels = tuple(ratio * patch * count for count in grid), pictures.float() / 255
        if sides != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        return F.avg_pool2d(self.net.patch_features((pixels - self.mean) / self.std), ratio)
