"""Builds networks with the weights of a file, and reads weights into existing networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tinyldm.folders.rename import apply, load_renamed, recognise
from tinyldm.folders.weights import Weights, errors_about, open_weights
from tinyldm.lookup import check_types
from tinyldm.model import architecture


class WithoutInitialWeights(TorchFunctionMode):
    """Inside, torch.nn.init draws no random weights: on the meta device that has no effect but to import torch's compiler (1 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawing = getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_")
        return (args or (kwargs["tensor"],))[0] if drawing else func(*args, **(kwargs or {}))


def load_network(network: type[nn.Module], config: Any, weights: Weights | None, device: str | torch.device,
                  dtype: torch.dtype) -> Any:
    """A network with these weights, on this device in this dtype; in eval mode, without gradients. On the meta device they are not read,
    and may be None. ValueError for a config with a value of a wrong type."""
    check_types(config)
    with torch.device("meta"), WithoutInitialWeights():       # spends no memory or time on initial weights
        module = network(config)
    if weights is None:
        module.to(dtype)
    else:
        _fill(module, weights, device, dtype)
    return module.eval().requires_grad_(False)


def _fill(module: nn.Module, weights: Weights, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
    layout, weights = recognise(weights, architecture(module).layouts)
    tidy = layout.tidy(module.config)
    load_renamed(module, weights.renamed(lambda name: apply(tidy, name)), layout.rules(module.config), device, dtype)


def load_weights(module: nn.Module, file: str | Path) -> None:
    """Read one weights file, in any published layout, into module; strict. A module on the meta device is moved to the CPU."""
    with errors_about(Path(file)):
        _fill(module, open_weights(file))
