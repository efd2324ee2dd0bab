"""Exponential moving average of weights, with warm-up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages of the parameters of several named modules, in float32 on their devices.

    After update n (from 1) the decay is min(decay, n / (n + 9)): early averages forget the initial weights,
    so they are usable from the first sample grid on.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float):
        self.decay = decay
        self.parameters = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, n: int) -> None:
        decay = min(self.decay, n / (n + 9))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def state_dict(self, part: str) -> dict[str, Tensor]:
        """The averages of one module, under its own names."""
        return {name.removeprefix(part + "."): tensor for name, tensor in self.shadow.items() if name.startswith(part + ".")}

    @torch.no_grad()
    def load_state_dict(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.shadow[f"{part}.{name}"].copy_(tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the modules carry the averages; afterwards their own weights again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self.parameters.items():
            p.data, self.shadow[name] = self.shadow[name], p.data
