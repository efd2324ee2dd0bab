"""A discriminator on the features of a network that denoises: it needs few parameters, because the network knows what pictures are made of.

The features are the output of a block in the middle of the network (of a U-Net's coarsest part), for a noisy picture, its level and its
condition: the discriminator of DMD2 (arXiv:2405.14867, Sec. 4.3).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tinyldm.diffusion.process import Level, input_scale
from tinyldm.model import Model, architecture
from tinyldm.models.layers import Cond
from tinyldm.objectives.denoising import extra_conditions


class FeatureHead(nn.Module):
    """features [b, n, width] -> a logit for each picture [b], the mean over positions; above 0 is "real"."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).float().mean((1, 2))


def features_of(net: nn.Module, x: Tensor, at: Level, cond: Cond) -> Tensor:
    """The features [b, n, width] of x [b, c, h, w] at a level."""
    blocks, seen = [block for block in getattr(net, "middle", net).modules() if isinstance(block, architecture(net).blocks)], []
    keep = lambda block, inputs, out: seen.append(out if isinstance(out, Tensor) else out[0])          # of two streams, the picture's
    hook = blocks[len(blocks) // 2].register_forward_hook(keep)
    try:
        net(x / input_scale(at), at.t, cond)
    finally:
        hook.remove()
    return seen[0].flatten(2).transpose(1, 2) if seen[0].dim() == 4 else seen[0]


@torch.no_grad()
def make_head(model: Model, empty: Cond) -> FeatureHead:
    """A new head for the features of a model's network. empty: the condition of a caption, [1, ...]."""
    row, config, one = architecture(model.net), model.net.config, torch.ones(1, 1, 1, 1)
    x = torch.zeros(1, config.in_channels, *[4 * row.divisor(config)] * 2)
    extra = extra_conditions(model.net, SimpleNamespace(latents=x, sizes=torch.zeros(1, 6))) or {}
    cond = Cond(empty.context, empty.mask, empty.pooled, {name: value.to(model.device) for name, value in extra.items()})
    at = Level(*(value.to(model.device) for value in (one.flatten(), one, one)))
    return FeatureHead(features_of(model.net, x.to(model.device), at, cond).shape[2]).to(model.device)
