"""Sums up what is measured while training: the loss, in total and by noise level, the gradient norm, and skipped updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BINS = 8                            # equal parts of t in [0, 1): 0 is data, 1 is noise
TOO_MANY = 10                       # updates skipped in a row, after which the run ends


class Meter:
    """Sums since the last row of the log, on the device. The losses of a step stay in `pending` until it is known to be finite.

    The sums are part of a checkpoint, so a resumed run writes the same log as one that was never interrupted.
    """

    def __init__(self, device: torch.device):
        # Both hold: loss, gradient norm, number of steps, summed loss of each bin, number of losses in each bin.
        self.sums, self.pending = torch.zeros(2, 3 + 2 * BINS, device=device)
        self.skipped = self.in_a_row = 0

    def add(self, losses: Tensor, weight: float, t: Tensor | None = None) -> None:
        """Add the losses [b] of a micro-batch at times t [b]. weight: of each of them in the step's loss, 1 / global batch size."""
        losses = losses.detach()
        self.pending[0] += losses.sum() * weight
        if t is not None:
            bins = (t * BINS).long().clamp(max=BINS - 1)
            self.pending[3:3 + BINS].index_add_(0, bins, losses)
            self.pending[3 + BINS:].index_add_(0, bins, torch.ones_like(losses))

    def keep(self, norm: float) -> None:
        """The update was made: add its pending measurements to the sums. norm: its gradient norm."""
        self.pending[1].fill_(norm), self.pending[2].fill_(1.0)         # on a GPU, an assignment would wait for the optimizer
        self.sums += self.pending
        self.pending.zero_()
        self.in_a_row = 0

    def count_skipped(self, position: int, seed: int) -> str:
        """The update on the batch at this position was skipped: drop its measurements. -> a message for the log.

        ValueError after TOO_MANY in a row, which ends the run."""
        self.pending.zero_()
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= TOO_MANY:
            raise ValueError(f"loss or gradient was not finite in {TOO_MANY} updates in a row, up to batch {position} (seed {seed}): the "
                             "run is stopped. Continue from the last checkpoint with --resume yes and lower learning rates (--lr and "
                             "--muon-lr; --vae-lr and --vae-muon-lr), or --dtype fp32")
        return f"the loss or the gradient was not finite: update skipped (--seed {seed}, batch {position})"

    def row(self) -> dict[str, Any]:
        """The means since the last call, for a row of the log. Resets the sums."""
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
