"""Stand-ins for the networks by which evaluate.py measures pictures, and pictures to measure."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from tinyldm.evaluation.towers import TOWERS, Tower
from tinyldm.models.inception import InceptionFeatures

MISSING = "download the weights and name the file"


class Thumbnail(nn.Module):
    """Stands in for a tower: the picture at 2 x 2 pixels [b, 12]."""

    def __init__(self, logits: bool):
        super().__init__()
        self.logits = logits
        self.none = nn.Parameter(torch.empty(0))               # by which the device is found

    def forward(self, x):
        rows = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return InceptionFeatures(rows, 10 * rows[:, :5]) if self.logits else rows


def load(source, device, logits):
    if str(source) != "here":
        raise ValueError(f"{source} does not exist")
    return Thumbnail(logits)


def thumbnail_towers() -> dict[str, Tower]:
    """Every tower is a thumbnail, with weights "here" and nowhere else."""
    made = {}
    for name, row in TOWERS.items():
        inception = name.startswith("inception")
        made[name] = Tower(lambda source, device, logits=inception: load(source, device, logits), row.resize, 8, (0.0,) * 3, (1.0,) * 3,
                           None if inception else "nobody/nothing", MISSING)
    return made


def write(folder, count: int, seed: int, sizes=((16, 16),)):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 120 + 60 * (seed % 3), (3, 3, 3), dtype=np.uint8))
        coarse.resize(sizes[i % len(sizes)]).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"a picture of {i}")
    return folder


class Tokens:
    """Stands in for a tokenizer."""

    def __init__(self, number):
        self.number = number

    def encode(self, captions):
        return np.array([[self.number(caption)] for caption in captions])


class Words(nn.Module):
    """Stands in for a text encoder: a caption's direction follows from its length."""

    def forward(self, ids):
        pooled = torch.sin(ids.float() * torch.arange(1, 13))
        return type("Features", (), {"pooled": pooled})
