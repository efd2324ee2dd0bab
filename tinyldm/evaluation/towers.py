"""Towers: the networks whose features the metrics compare, each with the way in which its metric prepares pictures.

A number is only comparable with others of the same tower, weights and resize: metrics print all three. Features are computed in float32
and in eval mode, whatever the rest of a run does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinyldm.folders.rename import recognise
from tinyldm.folders.towers import HALF, IMAGENET_MEAN, IMAGENET_STD, filled, load_vit, weights_of
from tinyldm.folders.weights import errors_about
from tinyldm.lookup import lookup
from tinyldm.models.inception import FIDInception, InceptionFeatures
from tinyldm.pictures.resizing import RESIZES
from tinyldm.vendor_loaders import clip_model, inception

Colours = tuple[float, float, float]
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
GET_INCEPTION = f"download {INCEPTION} (91 MB) and name the file"


class Tower(NamedTuple):
    """A row of TOWERS."""

    load: Callable[[str | Path, str | torch.device], nn.Module]     # a hub id, folder or file, and the device -> the network
    resize: str                     # the name in RESIZES of how pictures come to its size
    size: int | None                # height and width in pixels; None: those that the network was trained at
    mean: Colours                   # what is subtracted from colours in 0..1 ...
    std: Colours                    # ... and what they are then divided by
    source: str | None              # the hub id of the usual weights; None: they are on no hub
    get: str                        # how to get the weights, in one line


@dataclass(frozen=True)
class OpenTower:
    """A tower with its weights."""

    name: str
    row: Tower
    module: nn.Module
    source: str                     # where the weights are from, as typed
    size: int                       # height and width of the pictures that the network sees

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, for a metric's record."""
        return {"tower": self.name, "weights": self.source, "resize": self.row.resize, "size": self.size}


def load_inception(source: str | Path, device: str | torch.device = "cpu") -> FIDInception:
    file, weights = weights_of(source)
    with errors_about(file):
        layout, weights = recognise(weights, inception.LAYOUTS)
        return filled(FIDInception, None, layout, weights, device)


def _inception(resize: str, std: float) -> Tower:
    return Tower(load_inception, resize, 299, (0.0,) * 3, (std,) * 3, None, GET_INCEPTION)


def _vit(resize: str, size: int | None, mean: Colours, std: Colours, source: str) -> Tower:
    return Tower(load_vit, resize, size, mean, std, source,
                 f"name {source}, which is downloaded once, or a folder or file of such weights")


# FIDInception takes 0..255 and centres them as TensorFlow's graph does, by (x - 128) / 128. pytorch-fid centres by x / 127.5 - 1,
# which is the same of x * 256 / 255.
TOWERS: dict[str, Tower] = {
    "inception": _inception("tensorflow1", 1 / 255),                # torch-fidelity, OpenAI's guided-diffusion, TTUR
    "inception-clean": _inception("clean", 1 / 255),                # clean-fid
    "inception-pytorch": _inception("pytorch", 1 / 256),            # pytorch-fid
    "clip": _vit("bicubic_crop", None, clip_model.MEAN, clip_model.STD, "openai/clip-vit-base-patch32"),
    "cmmd": _vit("crop_bicubic", None, clip_model.MEAN, clip_model.STD, "openai/clip-vit-large-patch14-336"),
    "dinov2": _vit("bicubic", 224, IMAGENET_MEAN, IMAGENET_STD, "facebook/dinov2-large"),
    "siglip": _vit("bicubic", None, HALF, HALF, "google/siglip-base-patch16-224"),
}


def open_tower(name: str, source: str | Path | None = None, device: str | torch.device = "cpu") -> OpenTower:
    """A tower of TOWERS with weights from a hub id, a folder or a file; None: from its usual hub id. ValueError, with a line on how to
    get the weights, where there are none."""
    row = lookup(TOWERS, name, "tower")
    if source is None and row.source is None:
        raise ValueError(f"the tower {name} needs weights: {row.get}")
    try:
        module = row.load(source or row.source, device)
    except ValueError as error:
        raise ValueError(f"no weights for the tower {name}: {error}. To get them: {row.get}") from error
    return OpenTower(name, row, module, str(source or row.source), row.size or module.config.image_size)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, nothing is computed in bfloat16 or in TensorFloat-32, which convolutions on CUDA use by default."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


@torch.no_grad()
def outputs(tower: OpenTower, images: np.ndarray) -> Tensor | InceptionFeatures:
    """uint8 [n, h, w, 3] of any size -> what the network answers, on its device: features [n, d], and of Inception the logits, too."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"pictures must be uint8 [n, h, w, 3], not {images.dtype} {list(images.shape)}")
    device = next(tower.module.parameters()).device
    pixels = RESIZES[tower.row.resize](images, tower.size).to(device)
    mean, std = (torch.tensor(values, dtype=torch.float64).mul(255).to(pixels).view(3, 1, 1) for values in (tower.row.mean, tower.row.std))
    with full_float32(device):
        return tower.module((pixels - mean) / std)


def features(tower: OpenTower, images: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] of any size -> float32 [n, d], on the tower's device."""
    found = outputs(tower, images)
    return found.pool if isinstance(found, InceptionFeatures) else found
