"""Weights that are kept in 8 bits and made whole where they are used: half the memory of bfloat16, at the cost of some time and error.

    store_weights(model, "int8")

A matrix is kept as whole numbers (or float8) and one scale per row, so that a row's largest number is the largest that the format has.
Only the layers inside the repeated blocks are kept so, which hold nearly all weights; first and last layers stay as they are. Arithmetic
stays in the model's own precision. For drawing: such weights cannot be trained or saved, and adapters are merged before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from tinyldm.lookup import lookup
from tinyldm.model import Model, repeated_blocks

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class WholeWeight(nn.Module):
    """A parametrization: numbers [out, ...] in a format, and float32 scales [out, 1, ...] -> the weight, in the precision that it had."""

    def __init__(self, dtype: torch.dtype, format: torch.dtype):
        super().__init__()
        self.dtype, self.format = dtype, format

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight as it is stored, in memory that torch.empty gives (offload.InPinnedMemory watches for it)."""
        limits = torch.finfo(self.format) if self.format.is_floating_point else torch.iinfo(self.format)
        scale = weight.float().abs().amax(tuple(range(1, weight.ndim)), keepdim=True).clamp(min=1e-12) / limits.max
        numbers = weight.float() / scale
        numbers = numbers if self.format.is_floating_point else numbers.round()
        return torch.empty(weight.shape, dtype=self.format, device=weight.device).copy_(numbers), scale

    def forward(self, numbers: Tensor, scale: Tensor) -> Tensor:
        return (numbers.to(scale.dtype) * scale).to(self.dtype)


def store_weights(model: Model, format: str) -> None:
    """Keep the weights of the network and of the text encoders in a format, a key of FORMATS, from now on. ValueError for others."""
    dtype = lookup(FORMATS, format, "format of weights")
    for part, module in model.modules.items():
        for block in repeated_blocks(module) if part != "vae" else ():
            for layer in (layer for layer in block.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))):
                layer.weight.requires_grad_(False)              # whole numbers have no gradient
                register_parametrization(layer, "weight", WholeWeight(layer.weight.dtype, dtype))
