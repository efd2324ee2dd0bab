"""A small residual CNN that tells what a picture of 64 px shows, or gives features of its patches.

(evaluation/recogniser.py says what it is trained on and how its answers are read.)
"""

import torch
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """A convolution that halves the resolution, then a residual one: [b, channels_in, h, w] -> [b, channels, h/2, w/2]."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(channels_in, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.inner(x)


class RecogniserNet(nn.Module):
    """Pixels [b, 3, 64, 64] in [-1, 1] -> logits [b, outputs]. width: channels at half resolution."""

    patch = 8           # pixels per position of `patch_features`, along each side

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(ConvBlock(width, 2 * width), ConvBlock(2 * width, 4 * width), ConvBlock(4 * width, 6 * width))
        self.head = nn.Linear(12 * width, outputs)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.blocks(self.stem(pixels))                                  # [b, 6 * width, 4, 4]
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1).float())

    def patch_features(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> features of each patch of 8 x 8 pixels [b, 4 * width, h/8, w/8]."""
        return self.blocks[:2](self.stem(pixels))
