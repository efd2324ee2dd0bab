"""Early stopping: training ends where the validation loss has not become smaller for some time, with the weights of its minimum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class EarlyStopping:
    """patience: the number of validations without a smaller loss after which training is over; 0: never.

    The best weights are part of a checkpoint, so that a run which is resumed anywhere ends with the same ones."""

    def __init__(self, patience: int = 0):
        self.patience = patience
        self.loss, self.step = math.inf, 0                      # of the best validation
        self.since = 0                                          # validations since then
        self.weights: Mapping[str, Tensor] = {}                 # the weights then, by "part.name"; replaced as a whole, never changed

    @property
    def over(self) -> bool:
        return 0 < self.patience <= self.since

    def better(self, step: int, loss: float) -> bool:
        """Count a validation. -> whether its loss is the smallest so far; then `weights` must be replaced. One that is not finite never
        is."""
        if loss < self.loss:
            self.loss, self.step, self.since = loss, step, 0
            return True
        self.since += 1
        return False

    def state(self) -> dict[str, Any]:
        """For JSON, which has no infinity. The weights are stored elsewhere."""
        return {"loss": self.loss if self.step else None, "step": self.step, "since": self.since}

    def load(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self.loss = math.inf if state["loss"] is None else state["loss"]
        self.step, self.since, self.weights = state["step"], state["since"], weights
