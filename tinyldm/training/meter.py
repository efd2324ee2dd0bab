"""What is measured while training: losses and their levels, gradients, steps that had to be left out, a validation loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BINS = 8                            # equal parts of t in [0, 1): 0 is data, 1 is noise
TOO_MANY = 10                       # steps in a row that are not finite, after which a run is not worth its electricity


class Meter:
    """Sums since the last line of the log, kept on the device. A step's losses wait until it is known to be finite.

    What is summed is part of a checkpoint, so that the log of a resumed run is that of an undisturbed one.
    """

    def __init__(self, device: torch.device):
        self.sums, self.pending = torch.zeros(2, 3 + 2 * BINS, device=device)       # loss, gradient norm, steps, bins, their counts
        self.skipped = self.in_a_row = 0

    def add(self, losses: Tensor, share: float, t: Tensor | None = None) -> None:
        """Losses [b] of a micro-batch at times t [b], each of which is `share` of the step's loss."""
        losses = losses.detach()
        self.pending[0] += losses.sum() * share
        if t is not None:
            bins = (t * BINS).long().clamp(max=BINS - 1)
            self.pending[3:3 + BINS].index_add_(0, bins, losses)
            self.pending[3 + BINS:].index_add_(0, bins, torch.ones_like(losses))

    def keep(self, norm: float) -> None:
        """The step was taken."""
        self.pending[1:3] = torch.tensor([norm, 1.0])
        self.sums += self.pending
        self.pending.zero_()
        self.in_a_row = 0

    def skip(self, step: int, seed: int) -> str:
        """The step was left out -> what to say of it. ValueError after too many in a row."""
        self.pending.zero_()
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= TOO_MANY:
            raise ValueError(f"loss or gradient was not finite in {TOO_MANY} steps in a row, up to step {step} (seed {seed}): the run is "
                             "stopped. Go on from the last checkpoint with --resume auto and lower learning rates (--lr and "
                             "--muon-lr; --vae-lr and --vae-muon-lr), or --dtype fp32")
        return f"loss or gradient not finite: left out (--seed {seed}, step {step})"

    def row(self) -> dict[str, Any]:
        """Means for a line of the log, which end the summing."""
        loss, norm, steps, *bins = self.sums.tolist()
        row = {"loss": loss / steps, "grad_norm": norm / steps} if steps else {"loss": None}
        if any(bins[BINS:]):
            row["t_bins"] = [float(f"{total / count:.6g}") if count else None for total, count in zip(bins, bins[BINS:])]
        self.sums.zero_()
        return row | ({"skipped": self.skipped} if self.skipped else {})

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums.tolist(), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        self.sums.copy_(torch.tensor(state["sums"]))
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
