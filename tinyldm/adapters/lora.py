"""LoRA: low-rank branches beside the frozen layers of a network (arXiv:2106.09685).

A layer with weight W [out, in] computes W x + s B A x, with A [rank, in] and B [out, rank]; of a convolution, A is a convolution of
the same kernel, stride and padding to `rank` channels, and B one of 1x1. The scale s is alpha / rank, or alpha / sqrt(rank)
(rank-stabilised, arXiv:2312.03732, Eq. 4). B starts at zero, so that the network computes at first exactly what it computed without.

Branches are added by forward hooks: names, modules and state dict of the network stay as they are, the adapter is another module. It
stays in float32 whatever the network's precision is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinyldm.adapters.low_rank import LowRank
from tinyldm.adapters.targets import GROUPS, target_layers
from tinyldm.lookup import lookup


@dataclass(frozen=True)
class LoRAConfig:
    """rank: of all adapted layers, but for convolutions with a kernel above 1x1 where conv_rank is given (0: not given), and for blocks
    in `ranks`, which maps the beginning of layer names ("down.0", "up.2.attentions") to a rank; the longest one counts, and rank 0
    leaves its layers out. alpha: None means each layer's own rank, a scale of 1. dropout: fraction of the inputs of A that training
    drops. targets: keys of targets.GROUPS."""

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("attention",)
    conv_rank: int = 0
    rank_stabilised: bool = False
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} of an adapter must be 1 or more: 4 to 64 are usual")
        if self.conv_rank < 0 or min(self.ranks.values(), default=0) < 0:
            raise ValueError(f"conv_rank {self.conv_rank} and the ranks of blocks {dict(self.ranks)} must be 0 or more")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha {self.alpha} of an adapter must be above 0: its rank, or half of it, is usual")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} of an adapter must be at least 0 and below 1")
        if not self.targets:
            raise ValueError(f"an adapter needs targets: some of {', '.join(GROUPS)}")
        for group in self.targets:
            lookup(GROUPS, group, "target of an adapter")

    def rank_of(self, name: str, layer: nn.Module) -> int:
        """The rank beside the layer of this name; 0: none."""
        fitting = [prefix for prefix in self.ranks if name == prefix or name.startswith(f"{prefix}.")]
        if fitting:
            return self.ranks[max(fitting, key=len)]
        return self.conv_rank if self.conv_rank and max(layer.weight.shape[2:], default=1) > 1 else self.rank

    def scale(self, rank: int) -> float:
        """The factor of B A."""
        alpha = rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


class Branch(nn.Module):
    """The branch beside one layer: x -> s B A x."""

    def __init__(self, layer: nn.Module, rank: int, scale: float, dropout: float):
        super().__init__()
        out, *ins = layer.weight.shape                                      # [out, in], or [out, in, k, k] of a convolution
        self.scale, self.dropout = scale, dropout
        # What a convolution does with its kernel; None for a linear layer.
        self.window = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        make = lambda *shape: nn.Parameter(torch.empty(shape, dtype=torch.float32, device=layer.weight.device))
        self.down, self.up = make(rank, *ins), make(out, rank, *[1] * (len(ins) - 1))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5)), nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):       # otherwise autocast chooses the precision
            x = x.to(self.down.dtype)
        x = F.dropout(x, self.dropout, self.training)
        if self.window is None:
            return F.linear(F.linear(x, self.down), self.up)
        return F.conv2d(F.conv2d(x, self.down, None, *self.window), self.up)


class LoRA(nn.Module):
    """The adapter of one network (one part of a model). Its parameters are all that training changes: freeze the network itself.

    strength: factor of the whole adapter, 1 when it is trained. It may be set at any time.
    ValueError for targets that the network does not have and for a rank above a layer's width."""

    def __init__(self, network: nn.Module, config: LoRAConfig):
        super().__init__()
        self.config, self.strength = config, 1.0
        self.network = (network,)                   # in a tuple, or the network would become a part of this module
        self.hooks: list[RemovableHandle] = []
        self.branches = nn.ModuleDict()             # by the layer's name with / for the dots, which a module's name cannot have
        for name, layer in target_layers(network, config.targets).items():
            rank, (out, *ins) = config.rank_of(name, layer), layer.weight.shape
            if rank > (width := min(out, math.prod(ins))):
                raise ValueError(f"rank {rank} is above the width of the layer {name}, {width}: a smaller rank can express as much")
            if rank:
                self.branches[name.replace(".", "/")] = Branch(layer, rank, config.scale(rank), config.dropout)
        if not self.branches:
            raise ValueError(f"the ranks {dict(config.ranks)} of blocks leave no layer of {type(network).__name__} to adapt")

    def attach(self) -> None:
        """From now on the network computes with the adapter. (torch.compile does not look for new hooks: attach before the compiled
        network is first called.)"""
        if self.hooks:
            return
        self.network[0].draws_random_numbers = self.config.dropout > 0      # models.layers.runner repeats them where it runs a block again
        for name, branch in self.branches.items():
            self.hooks.append(self.network[0].get_submodule(name.replace("/", ".")).register_forward_hook(self._hook(branch)))

    def _hook(self, branch: Branch):
        return lambda layer, inputs, output: output + (self.strength * branch.scale * branch(inputs[0])).to(output.dtype)

    def detach(self) -> None:
        """From now on the network computes without the adapter."""
        self.network[0].draws_random_numbers = False
        while self.hooks:
            self.hooks.pop().remove()

    def changes(self) -> dict[str, LowRank]:
        """What the adapter adds at strength 1, by the name of the network's weight."""
        return {f"{name.replace('/', '.')}.weight": LowRank(branch.down.detach(), branch.up.detach(), branch.scale)
                for name, branch in self.branches.items()}

    def deltas(self) -> dict[str, Tensor]:
        """What the adapter adds to the network's weights at its present strength: name of the weight -> float32 of its shape."""
        return {name: self.strength * change.delta() for name, change in self.changes().items()}
