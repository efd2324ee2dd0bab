"""The Inception-v3 of the FID and of the Inception score (arXiv:1512.00567), which is not the usual one.

Both scores rest on one set of weights, Google's inception-2015-12-05, whose graph differs from the later published networks: average
pools leave out the padding, the last block has a maximum instead of an average, there are 1008 classes, and pictures are resized by
TensorFlow 1's bilinear rule. The names of the blocks are those of pytorch-fid's and torch-fidelity's weights.

Each convolution is followed by a norm with fixed statistics, which is multiplied into its weights. There is no training mode.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 299                              # pixels per side
CLASSES = 1008
EPS = 1e-3                              # of the norms


class InceptionFeatures(NamedTuple):
    pool: Tensor                        # [b, 2048], the mean over the last feature map: for FID and KID
    logits: Tensor                      # [b, 1008], without the bias of the last layer: for the Inception score


class Conv(NamedTuple):
    """A convolution: its name, output channels, kernel (rows, columns), stride, and whether the size is kept by padding."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True


class Branch(NamedTuple):
    """A chain of convolutions over a block's input, or over the pooled input. A tuple in the chain is a fork: its convolutions read the
    same input, and their outputs are concatenated."""

    chain: tuple[Conv | tuple[Conv, ...], ...]
    pool: str = ""                      # a row of POOLS


POOLS = {
    "": lambda x: x,
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "halve": lambda x: F.max_pool2d(x, 3, 2),
}

STEM = (Conv("Conv2d_1a_3x3", 32, (3, 3), 2, False), Conv("Conv2d_2a_3x3", 32, (3, 3), 1, False), Conv("Conv2d_2b_3x3", 64, (3, 3)),
        "halve", Conv("Conv2d_3b_1x1", 80), Conv("Conv2d_4a_3x3", 192, (3, 3), 1, False), "halve")


def block_a(pooled: int) -> tuple[Branch, ...]:
    """35 x 35. pooled: output channels of the branch behind the pool."""
    return (Branch((Conv("branch1x1", 64),)),
            Branch((Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5)))),
            Branch((Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3)))),
            Branch((Conv("branch_pool", pooled),), "average"))


def block_b() -> tuple[Branch, ...]:
    """35 x 35 to 17 x 17."""
    return (Branch((Conv("branch3x3", 384, (3, 3), 2, False),)),
            Branch((Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3), 2, False))),
            Branch((), "halve"))


def block_c(width: int) -> tuple[Branch, ...]:
    """17 x 17, with 7 x 7 kernels as products of rows and columns. width: channels inside the branches."""
    row, column = (1, 7), (7, 1)
    return (Branch((Conv("branch1x1", 192),)),
            Branch((Conv("branch7x7_1", width), Conv("branch7x7_2", width, row), Conv("branch7x7_3", 192, column))),
            Branch((Conv("branch7x7dbl_1", width), Conv("branch7x7dbl_2", width, column), Conv("branch7x7dbl_3", width, row),
                    Conv("branch7x7dbl_4", width, column), Conv("branch7x7dbl_5", 192, row))),
            Branch((Conv("branch_pool", 192),), "average"))


def block_d() -> tuple[Branch, ...]:
    """17 x 17 to 8 x 8."""
    return (Branch((Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, False))),
            Branch((Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)), Conv("branch7x7x3_3", 192, (7, 1)),
                    Conv("branch7x7x3_4", 192, (3, 3), 2, False))),
            Branch((), "halve"))


def block_e(pool: str) -> tuple[Branch, ...]:
    """8 x 8."""
    fork = lambda name: (Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1)))
    return (Branch((Conv("branch1x1", 320),)),
            Branch((Conv("branch3x3_1", 384), fork("branch3x3_2"))),
            Branch((Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3"))),
            Branch((Conv("branch_pool", 192),), pool))


BLOCKS = {
    "Mixed_5b": block_a(32), "Mixed_5c": block_a(64), "Mixed_5d": block_a(64), "Mixed_6a": block_b(),
    "Mixed_6b": block_c(128), "Mixed_6c": block_c(160), "Mixed_6d": block_c(160), "Mixed_6e": block_c(192),
    "Mixed_7a": block_d(), "Mixed_7b": block_e("average"), "Mixed_7c": block_e("max"),
}


class FIDInception(nn.Module):
    """forward: pixels [b, 3, h, w], uint8 or float, in 0..255 -> InceptionFeatures in float32. Pictures of another size than 299 are
    resized by `resize_tensorflow1`. Its weights are frozen; gradients reach the pixels."""

    def __init__(self):
        super().__init__()
        channels = 3
        for conv in (conv for conv in STEM if isinstance(conv, Conv)):
            self.add_module(conv.name, NormedConv(conv, channels))
            channels = conv.width
        for name, branches in BLOCKS.items():
            block = InceptionBlock(branches, channels)
            self.add_module(name, block)
            channels = block.width
        self.fc = nn.Linear(channels, CLASSES)
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> InceptionFeatures:
        x = resize_tensorflow1(pixels.float(), SIZE)
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)    # [b, 3, 299, 299]; convolutions are faster in this order
        for step in STEM:
            x = POOLS[step](x) if isinstance(step, str) else self.get_submodule(step.name)(x)
        for name in BLOCKS:                                                    # [b, 192, 35, 35] -> [b, 2048, 8, 8]
            x = self.get_submodule(name)(x)
        pool = x.mean((2, 3))
        return InceptionFeatures(pool, pool @ self.fc.weight.T)


class InceptionBlock(nn.Module):
    """x [b, c, h, w] -> the branches' outputs, concatenated: [b, width, h', w']."""

    def __init__(self, branches: tuple[Branch, ...], channels: int):
        super().__init__()
        self.branches, self.width = branches, 0
        for branch in branches:
            width = channels
            for step in branch.chain:
                convs = step if isinstance(step[0], Conv) else (step,)
                for conv in convs:
                    self.add_module(conv.name, NormedConv(conv, width))
                width = sum(conv.width for conv in convs)
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.run(branch, x) for branch in self.branches], 1)

    def run(self, branch: Branch, x: Tensor) -> Tensor:
        x = POOLS[branch.pool](x)
        for step in branch.chain:
            x = (torch.cat([self.get_submodule(conv.name)(x) for conv in step], 1) if isinstance(step[0], Conv)
                 else self.get_submodule(step.name)(x))
        return x


class NormedConv(nn.Module):
    """A convolution, a norm with fixed statistics and a ReLU."""

    def __init__(self, conv: Conv, channels: int):
        super().__init__()
        padding = tuple(side // 2 for side in conv.kernel) if conv.same else 0
        self.conv = nn.Conv2d(channels, conv.width, conv.kernel, conv.stride, padding, bias=False)
        self.bn = FixedNorm(conv.width)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.bn.weight * (self.bn.running_var + EPS).rsqrt()
        weight, bias = self.conv.weight * scale[:, None, None, None], self.bn.bias - self.bn.running_mean * scale
        return F.relu(F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding), inplace=True)


class FixedNorm(nn.Module):
    """The tensors of a batch norm in eval mode, [width] each."""

    def __init__(self, width: int):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))


def resize_tensorflow1(x: Tensor, size: int) -> Tensor:
    """x [b, c, h, w], float -> [b, c, size, size], as tf.image.resize_bilinear of TensorFlow 1 did it: output i lies at i * h / size of the
    input, half a pixel off, and nothing is averaged where pictures shrink (tensorflow/core/kernels/resize_bilinear_op.cc). Positions are
    rounded to float32 there, as here."""
    return _interpolate(_interpolate(x, size, 3), size, 2)


def _interpolate(x: Tensor, size: int, dim: int) -> Tensor:
    length = x.shape[dim]
    if length == size:
        return x
    place = torch.arange(size, dtype=torch.float32) * torch.tensor(length / size, dtype=torch.float32)
    index = place.long()
    part = (place - index).to(x).view([-1 if axis == dim else 1 for axis in range(4)])
    low, high = (x.index_select(dim, each.clamp(max=length - 1).to(x.device)) for each in (index, index + 1))
    return low + (high - low) * part
