"""Representation alignment, REPA (arXiv:2410.06940): beside the diffusion loss, the hidden features of one block learn to predict the
features that a frozen network, DINOv2 for example, has of the clean picture.

    loss = diffusion loss + weight * mean over positions of distance(projector(hidden features of x_t), features of the picture)

Latents do not show the teacher what it was trained on, so the pictures lie in the cache too (--keep-pictures) and the teacher looks at
them while the network trains. docs/training.md compares that with features in the cache.

    projector=conv spatial_norm=true    iREPA (arXiv:2512.10794): a 3 x 3 convolution, and features without what all positions share
    stop=0.2                            HASTE (arXiv:2505.16792): alignment helps early and holds back later

Differences from the paper's code: its loss is -cos, here it is 1 - cos, whose gradients are the same and which is 0 at best. Pictures
are resized with antialiasing before colours are normalised, not after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.config import Config
from tinyldm.lookup import lookup
from tinyldm.model import NETWORKS, Model, architecture, network_config, repeated_blocks
from tinyldm.models.layers import Tap
from tinyldm.objectives.base import Networks, Turn
from tinyldm.objectives.denoising import Denoising, DenoisingBatch
from tinyldm.objectives.alignment_teachers import TEACHERS, Teacher

USUAL = 8 / 28              # the paper's block, the eighth of SiT-XL's 28, as a fraction of the depth

# [b, d, h, w] of the network and of the teacher -> [b, h, w]
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda found, wanted: 1 - F.cosine_similarity(found, wanted, dim=1),
    "mse": lambda found, wanted: (found - wanted).square().mean(1),
}
# channels of the block, of the hidden layers, of the teacher -> the projector, [b, c, h, w] -> [b, d, h, w]
PROJECTORS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mlp": lambda width, hidden, out: nn.Sequential(nn.Conv2d(width, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, hidden, 1), nn.SiLU(),
                                                    nn.Conv2d(hidden, out, 1)),
    "conv": lambda width, hidden, out: nn.Conv2d(width, out, 3, padding=1),
}


class REPA(Denoising):
    """Denoising and alignment. The projector is trained with the network, and saved in checkpoints, but not part of the model."""

    options: Mapping[str, Any] = {
        "teacher": "dinov2",        # a row of TEACHERS
        "weights": "",              # where its weights are: a hub id, folder or file; "": at the row's usual hub id
        "block": 0,                 # which of the network's blocks, counted from 1; 0: at 8/28 of the depth
        "weight": 0.5,
        "stop": 1.0,                # the fraction of the training after which there is no alignment
        "distance": "cosine",
        "projector": "mlp",
        "hidden": 2048,             # channels of the hidden layers of the MLP
        "spatial_norm": False,      # each channel of the teacher's features gets mean 0 and standard deviation 1 over the positions
    }

    def __init__(self, config: Config, model: Model, trained: tuple[str, ...]):
        super().__init__(config, model, trained)
        self.own = own = self.settings_of(config)
        self.turns, self.settled = (Turn("denoising", (*trained, "projector")),), own["stop"] if own["stop"] < 1 else 0.0
        teacher, block = Teacher(own["teacher"], own["weights"]), chosen_block(model.net, own["block"])
        self.tap = Tap(block)
        projector = PROJECTORS[own["projector"]](width_of(model.net, block), own["hidden"], teacher.width)
        self.networks, self.saved = {"teacher": teacher, "projector": projector}, ("projector",)
        self.over, self.alignment = False, None             # whether it has stopped; the last micro-batch's mean distance

    @classmethod
    def settings_of(cls, config: Config) -> dict[str, Any]:
        return {**cls.options, **config.objective.options}

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        own, row = cls.settings_of(config), lookup(NETWORKS, config.network.name, "network")
        lookup(TEACHERS, own["teacher"], "teacher"), lookup(DISTANCES, own["distance"], "distance")
        lookup(PROJECTORS, own["projector"], "projector")
        if not 0 <= own["stop"] <= 1:
            raise ValueError(f"stop={own['stop']} must lie between 0 and 1: it is a fraction of the training")
        if not own["weight"] > 0 or own["hidden"] < 1:
            raise ValueError(f"weight={own['weight']} and hidden={own['hidden']} must be positive")
        with torch.device("meta"):
            chosen_block(row.module(network_config(config.network.name, config.network.settings)), own["block"])

    @classmethod
    def check_parts(cls, config: Config, vae: nn.Module | None) -> None:
        if not config.data.keep_pictures:
            where = f"{config.data.cache[0]} has no pictures: make it again with" if config.data.cache else "add"
            raise ValueError(f"--objective {config.objective.name} compares pictures with what the network makes of their latents; {where} "
                             "--keep-pictures 8, or fewer pixels per latent (docs/training.md)")
        Teacher(*(cls.settings_of(config)[name] for name in ("teacher", "weights")))

    def draw(self, samples: Any, generator: torch.Generator, batch_size: int, part: slice) -> DenoisingBatch:
        batch = super().draw(samples, generator, batch_size, part)
        return batch._replace(pictures=samples.pictures()) if self.wants_pictures() else batch

    def wants_pictures(self) -> bool:
        """Whether pictures are to be read."""
        return not self.over

    def losses(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> Tensor:
        self.over = progress >= self.own["stop"]
        if self.over or batch.pictures is None:             # validation measures the diffusion loss alone
            self.alignment = None if self.over else self.alignment
            return Denoising.losses(self, turn, networks, batch, progress)
        losses, apart = self.both(turn, networks, batch, progress)
        return losses + self.own["weight"] * apart

    def both(self, turn: Turn, networks: Networks, batch: DenoisingBatch, progress: float) -> tuple[Tensor, Tensor]:
        """The diffusion loss and the distance of every sample, each [b]."""
        self.model.net.tap = self.tap
        try:
            losses = Denoising.losses(self, turn, networks, batch, progress)
        finally:
            self.model.net.tap = None
        apart = self.distances(networks, as_map(self.tap.take(), self.model.net, batch.x0), batch.pictures)
        self.alignment = apart.detach().mean()
        return losses, batch.weighted(apart)

    def distances(self, networks: Networks, hidden: Tensor, pictures: Tensor) -> Tensor:
        """hidden: features of a block [b, c, rows, columns] -> mean distance of each sample [b], float32."""
        wanted, found = networks["teacher"](pictures, hidden.shape[2:]).float(), networks["projector"](hidden).float()
        if self.own["spatial_norm"]:
            wanted = (wanted - wanted.mean((2, 3), keepdim=True)) / (wanted.std((2, 3), keepdim=True) + 1e-6)
        return DISTANCES[self.own["distance"]](found, wanted).flatten(1).mean(1)

    def log_row(self) -> dict[str, float]:
        return {} if self.alignment is None else {"alignment": float(self.alignment)}


def chosen_block(net: nn.Module, number: int) -> nn.Module:
    """One of the network's repeated blocks, counted from 1; 0: the usual one. ValueError for a number that none has."""
    blocks = repeated_blocks(net)
    if not 0 <= number <= len(blocks):
        raise ValueError(f"block={number}: the network has blocks 1 to {len(blocks)}")
    return blocks[(number or max(1, round(USUAL * len(blocks)))) - 1]


def width_of(net: nn.Module, block: nn.Module) -> int:
    """The channels of what a block answers. Those of a U-Net differ, and all end with the bias of a layer that adds to the output."""
    return getattr(net.config, "width", None) or [*block.parameters()][-1].shape[0]


def as_map(out: Any, net: nn.Module, x0: Tensor) -> Tensor:
    """What a block answers -> its features of the picture [b, c, rows, columns]. Transformers answer with tokens [b, n, c], those of a
    caption in front, or beside them in a tuple."""
    out = out[0] if isinstance(out, tuple) else out
    if out.ndim == 4:
        return out
    rows, columns = (side // architecture(net).divisor(net.config) for side in x0.shape[2:])
    return out[:, -rows * columns:].mT.unflatten(2, (rows, columns))
