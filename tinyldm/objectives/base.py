"""What an objective is: the thing that a training step minimises.

    draw      what the loader read -> a batch with all that is random in it: noise, times, dropped captions
    losses    networks and a micro-batch -> one loss per sample [b]

The trainer (train.py) does the rest: micro-batches, autocast, gradients summed over processes, clipping, optimizers, averages,
checkpoints. An objective names the networks that it trains, and brings along those that stand beside the model's: a teacher,
a discriminator, a critic, a frozen feature tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyldm.config import Config, OptimisationConfig

Networks = Mapping[str, Any]        # by part name: what to call (for "net" the compiled handle, where there is one)


class Turn(NamedTuple):
    """One update within a training step. An objective of several turns (generator and discriminator, student and critic) takes
    them one after the other; each has parameters, optimizers and a loss of its own."""

    name: str
    trains: tuple[str, ...]                             # part names: the model's, or the objective's own
    every: int = 1                                      # it is taken in every so-manyth step
    optimisation: OptimisationConfig | None = None      # its learning rates; None: the run's


class Objective:
    """Base class of all rows of OBJECTIVES. A subclass defines `turns`, `draw` and `losses`.

    networks    networks beside the model's, by part name: moved to the device, in training mode where a turn trains them
    saved       the names of those that a checkpoint holds; a frozen teacher is loaded anew instead
    """

    turns: Sequence[Turn] = ()
    networks: Mapping[str, nn.Module] = {}
    saved: Sequence[str] = ()

    @classmethod
    def check(cls, config: Config) -> None:
        """ValueError, before anything is loaded, for settings that cannot work."""

    def draw(self, samples: Any, generator: torch.Generator, batch_size: int, part: slice, device: torch.device) -> NamedTuple:
        """samples, this process's part of a global batch of `batch_size`, as the loader gives them -> a batch: a NamedTuple of
        tensors [b, ...]. Random numbers are drawn for the whole global batch, then cut to `part`, so that neither the number
        of processes nor that of micro-batches changes them."""
        raise TypeError(f"{type(self).__name__} does not say how a batch is drawn: give it a method draw()")

    def to_device(self, batch: NamedTuple, device: torch.device) -> NamedTuple:
        """A batch on the device; an objective may leave on the CPU what it only needs there."""
        return type(batch)(*(tensor.to(device, non_blocking=True) for tensor in batch))

    def losses(self, turn: Turn, networks: Networks, batch: NamedTuple, progress: float) -> Tensor:
        """The loss of every sample of a micro-batch, float32 [b], under autocast.

        progress: the fraction of the training that is over, in [0, 1], for terms that stop at some point."""
        raise TypeError(f"{type(self).__name__} does not say what it minimises: give it a method losses()")

    def validation_batch(self, latents: Tensor, tokens: Tensor, seed: int) -> NamedTuple | None:
        """A batch of held-out samples [n, ...] on the CPU with fixed noise at fixed times; None: this objective has none."""
        return None

    def begin_phase(self, config: Config, model: Any) -> None:
        """Training begins at a picture size (anew): `config` and `model` are those of this phase."""

    def after_step(self, step: int) -> None:
        """After every optimizer step, on all processes: where a moving target follows the network, for example."""


def split(batch: NamedTuple, parts: int) -> list[NamedTuple]:
    """Micro-batches, of nearly equal sizes."""
    return [type(batch)(*micro) for micro in zip(*(tensor.tensor_split(parts) for tensor in batch))]


def turns_at(objective: Objective, step: int) -> list[Turn]:
    """The turns of optimizer step `step` (0-based)."""
    return [turn for turn in objective.turns if step % turn.every == 0]
