"""Residual and resampling blocks of convolutional networks.

GroupNorm + SiLU + 3x3 convolution is the ResNet block of DDPM (arXiv:2006.11239, App. B). Weights keep the shapes of the published
Stable Diffusion checkpoints, as in layers.py.
"""

from __future__ import annotations


import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    """x [b, in, h, w] -> [b, out, h, w]. If emb_dim is given, a projection of the time embedding [b, e] is added inside."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, emb_dim: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_dim, out_channels) if emb_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: [b, c, h, w] -> [b, c, 2h, 2w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(upsample_nearest(x))


def upsample_nearest(x: Tensor) -> Tensor:
    """Repeat every pixel of x [b, c, h, w] in a 2x2 square: [b, c, 2h, 2w]."""
    if not torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    # The same to the last bit. torch.compile takes interpolate apart into an indexing operation, whose backward pass is an
    # index_put that adds: on CUDA the order of its sums, and with it the gradient, changes from run to run.
    b, c, h, w = x.shape
    return x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)


class Downsample(nn.Module):
    """3x3 convolution of stride 2: [b, c, h, w] -> [b, c, h/2, w/2].

    The U-Net pads all four sides; the VAE pads right and bottom only (pad_all=False).
    """

    def __init__(self, channels: int, pad_all: bool = True):
        super().__init__()
        self.pad_all = pad_all
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.pad_all else F.pad(x, (0, 1, 0, 1)))
