"""PatchGAN: a discriminator that judges every patch of a picture by itself (arXiv:1611.07004, Sec. 3.2.2 and App. 6.1.2).

It is fully convolutional: with three layers, each of its outputs sees 70 x 70 pixels. So it attends to texture and sharp edges and
leaves the arrangement to the reconstruction loss. Autoencoders are trained with it as in arXiv:2012.09841.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyldm.lookup import check_counts, lookup

# Batch norm always uses the statistics of its batch (nobody asks a discriminator in evaluation mode), so it keeps no others.
NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "batch": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "group": lambda channels: nn.GroupNorm(min(32, channels), channels),
    "none": None,
}


@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    width: int = 64                     # channels of the first layer; the next ones have twice as many each, eight times at most
    layers: int = 3                     # convolutions of stride 2
    norm: str = "batch"                 # batch is the published one; with group or none, pictures do not depend on their batch
    channels: int = 3                   # of the pictures; of latents, their number

    def __post_init__(self):
        check_counts(self, "width", "layers", "channels")
        lookup(NORMS, self.norm, "norm of the discriminator")
        if self.norm == "group" and self.width > 32 and self.width % 32:
            raise ValueError(f"width={self.width} must be a multiple of 32, or less, for norm=group")


class PatchDiscriminator(nn.Module):
    """forward: pictures [b, channels, H, W], of three in [-1, 1], -> one logit per patch [b, 1, h, w]; above 0 is "real".

    With three layers h = H / 8 - 2. ValueError for pictures smaller than `smallest` pixels.
    """

    def __init__(self, config: PatchDiscriminatorConfig = PatchDiscriminatorConfig()):
        super().__init__()
        norm, channels = NORMS[config.norm], config.width
        layers: list[nn.Module] = [nn.Conv2d(config.channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, config.layers + 1):
            out, stride = config.width * min(2**index, 8), 2 if index < config.layers else 1
            layers += [nn.Conv2d(channels, out, 4, stride, padding=1, bias=norm is None),     # a norm has a bias of its own
                       *([norm(out)] if norm else []), nn.LeakyReLU(0.2)]
            channels = out
        self.main = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))
        self.initialise()

    def initialise(self) -> None:
        """Standard deviations of 0.02, as published; biases of convolutions keep PyTorch's."""
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.normal_(layer.weight, 1.0, 0.02)
                nn.init.zeros_(layer.bias)

    @property
    def smallest(self) -> int:
        """The smallest height and width of pictures: that for which there is one logit."""
        size = 1
        for layer in reversed(self.main):
            if isinstance(layer, nn.Conv2d):
                size = (size - 1) * layer.stride[0] + 4 - 2
        return size

    def forward(self, pixels: Tensor) -> Tensor:
        if min(pixels.shape[2:]) < self.smallest:
            raise ValueError(f"pictures of {pixels.shape[3]} x {pixels.shape[2]} px are too small for the discriminator: it takes "
                             f"{self.smallest} px or more; fewer layers take smaller ones")
        logits = self.main(pixels)
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
