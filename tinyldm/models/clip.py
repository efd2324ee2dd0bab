"""CLIP (arXiv:2103.00020): a tower for pictures and one for captions, whose features of a picture and of its caption point the same way.

The towers are vit.py and clip_text.py. What is added here is the temperature that training needs, and for SigLIP's loss
(arXiv:2303.15343) a bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.vit import ViT, ViTConfig

MOST_LOG_SCALE = math.log(100)          # larger ones made OpenAI's training unstable (arXiv:2103.00020, Sec. 2.5)


@dataclass(frozen=True)
class CLIPConfig:
    vision: ViTConfig
    text: CLIPTextConfig
    log_scale: float = math.log(1 / 0.07)       # initial logarithm of the factor of cosines
    bias: float | None = None                   # initial value of what is added to them then; None: nothing is

    def __post_init__(self):
        if not self.vision.projection_dim or self.vision.projection_dim != self.text.projection_dim:
            raise ValueError(f"the towers' features have {self.vision.projection_dim} and {self.text.projection_dim} channels: both need "
                             "the same projection_dim")


class CLIPFeatures(NamedTuple):
    images: Tensor          # [b, projection_dim], of length 1
    texts: Tensor           # [b, projection_dim], of length 1


class CLIP(nn.Module):
    """forward: pixels [b, 3, h, w], normalised, and token ids [b, n] -> CLIPFeatures."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config, self.vision, self.text = config, ViT(config.vision), CLIPText(config.text)
        self.log_scale = nn.Parameter(torch.tensor(config.log_scale))
        self.bias = None if config.bias is None else nn.Parameter(torch.tensor(config.bias))

    def forward(self, pixels: Tensor, ids: Tensor) -> CLIPFeatures:
        return CLIPFeatures(unit(self.vision(pixels)), unit(self.text(ids).pooled))

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Clamp the factor of cosines to 1..100."""
        self.log_scale.clamp_(0, MOST_LOG_SCALE)


def unit(features: Tensor) -> Tensor:
    """[b, d] -> vectors of length 1, in float32 or more."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
