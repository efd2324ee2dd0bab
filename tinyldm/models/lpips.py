"""LPIPS: how different two pictures look, measured on the features of a network that recognises objects (arXiv:1801.03924).

The features of several layers are scaled to unit length at every pixel, and their squared differences are summed with one
weight per channel, which was fitted to the judgement of people. As the loss of an autoencoder it is what makes reconstructions
sharp that L1 or MSE would blur.

This is version 0.1 of the published metric, with VGG16 (arXiv:1409.1556) or AlexNet (arXiv:1404.5997) as the trunk. The dropout
in front of the published linear layers serves their own training and is left out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinyldm.lookup import lookup

EPS = 1e-10                                             # added to the length of a feature vector, outside the root
# Means and standard deviations of ImageNet's colours, for pictures in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Conv(NamedTuple):
    """A convolution, followed by a ReLU."""

    kernel: int = 3
    stride: int = 1
    padding: int = 1


class Trunk(NamedTuple):
    """A network as levels of convolutions. Features are taken at the end of each level."""

    widths: tuple[int, ...]                             # published channels per level
    levels: tuple[tuple[Conv, ...], ...]
    pool: tuple[int, int]                               # kernel and stride of the max-pooling ...
    pooled: tuple[int, ...]                             # ... and the levels that begin with one


TRUNKS: dict[str, Trunk] = {
    "vgg16": Trunk((64, 128, 256, 512, 512), tuple((Conv(),) * count for count in (2, 2, 3, 3, 3)), (2, 2), (1, 2, 3, 4)),
    "alexnet": Trunk((64, 192, 384, 256, 256), ((Conv(11, 4, 2),), (Conv(5, 1, 2),), (Conv(),), (Conv(),), (Conv(),)), (3, 2), (1, 2)),
}


@dataclass(frozen=True)
class LPIPSConfig:
    trunk: str = "vgg16"
    widths: tuple[int, ...] = ()                        # channels per level; () are the published ones

    def __post_init__(self):
        levels = lookup(TRUNKS, self.trunk, "trunk of LPIPS").levels
        if len(self.widths) not in (0, len(levels)):
            raise ValueError(f"widths={self.widths} must be {len(levels)} numbers for {self.trunk}")

    @property
    def channels(self) -> tuple[int, ...]:
        return self.widths or TRUNKS[self.trunk].widths


class LPIPS(nn.Module):
    """forward: two batches of pictures [b, 3, h, w] in [-1, 1] -> their distances [b], 0 for equal pictures.

    Its weights are frozen; gradients reach the pictures. Without published weights (folders/lpips.py loads them) the trunk is random
    and all channels count the same. ValueError for pictures that are smaller than `smallest` pixels.
    """

    def __init__(self, config: LPIPSConfig = LPIPSConfig()):
        super().__init__()
        self.config, trunk, widths = config, TRUNKS[config.trunk], config.channels
        layers, self.taps, channels = [], [], 3
        for level, (convs, width) in enumerate(zip(trunk.levels, widths)):
            layers += [nn.MaxPool2d(*trunk.pool)] * (level in trunk.pooled)
            for conv in convs:
                layers += [nn.Conv2d(channels, width, *conv), nn.ReLU()]
                channels = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)          # numbered as torchvision numbers them
        self.linears = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1))
        self.initialise()
        self.requires_grad_(False)

    def initialise(self) -> None:
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        for linear in self.linears:
            nn.init.constant_(linear.weight, 1 / linear.in_channels)

    @property
    def smallest(self) -> int:
        """The smallest height and width of pictures: that of which the last level still has one pixel."""
        size = 1
        for layer in reversed(self.features):
            if not isinstance(layer, nn.ReLU):
                kernel, stride, padding = (number[0] if isinstance(number, tuple) else number
                                           for number in (layer.kernel_size, layer.stride, layer.padding))
                size = (size - 1) * stride + kernel - 2 * padding
        return size

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        if min(one.shape[2:]) < self.smallest:
            raise ValueError(f"pictures of {one.shape[3]} x {one.shape[2]} px are too small for LPIPS with {self.config.trunk}: it takes "
                             f"{self.smallest} px or more")
        return sum(linear((a - b).square()).float().mean((1, 2, 3))
                   for linear, a, b in zip(self.linears, self.directions(one), self.directions(two)))

    def directions(self, pixels: Tensor) -> list[Tensor]:
        """The features of every level, [b, c, h, w], of unit length over the channels."""
        x, found = (pixels - self.shift) / self.scale, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
                found.append(wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + EPS))
        return found
