"""The base class of objectives. An objective is what a training step minimises.

    draw        samples of the data -> a batch on the CPU, with everything random in it: noise, times, dropped captions
    to_device   the batch -> the batch on the device, with what is computed once per step
    losses      networks and a micro-batch -> one loss per sample [b]

The trainer (train.py) does the rest: micro-batches, autocast, gradients summed over processes, clipping, optimizers, averages,
checkpoints. An objective names the networks that it trains, and holds further networks that are not part of the model: a teacher,
a discriminator, a critic, a frozen feature extractor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyldm.config import Config, OptimisationConfig
from tinyldm.device import upload

Networks = Mapping[str, Any]        # by part name: what to call (for "net" the compiled handle, where there is one)


class Turn(NamedTuple):
    """One update within a training step. An objective of several turns (generator and discriminator, student and critic) takes
    them one after the other; each has parameters, optimizers and a loss of its own."""

    name: str
    trains: tuple[str, ...]                             # part names, the model's or the objective's own, or parts of these: vae.decoder
    every: int = 1                                      # 5 means: it takes part in every fifth step
    optimisation: OptimisationConfig | None = None      # its optimizer, learning rates and weight decay; None: the run's
    start: float = 0.0                                  # the fraction of the training that is over when it begins to take part
    betas: tuple[float, float] = (0.9, 0.95)            # AdamW's


class Objective:
    """Base class of all rows of OBJECTIVES. A subclass defines `turns`, `draw` and `losses`.

    networks    part name -> further network, which is not part of the model. The trainer moves them to the device; whether they are
                in training mode and require gradients is the objective's to decide
    saved       the names of those networks that a checkpoint holds; a frozen teacher is loaded from its source instead
    on_pictures whether it trains networks of its own on pictures and captions: then there is neither autoencoder nor diffusion network
    compares    whether `losses` and `collect` wait for the other processes, so that none can take a step again by itself
    trains_too  the names of parts of the model that it trains besides the network and text encoders
    """

    turns: Sequence[Turn] = ()
    options: Mapping[str, Any] = {}             # the names that --objective-options takes, and their defaults: 1 is a count, 1.0 any number
    networks: Mapping[str, nn.Module] = {}
    saved: Sequence[str] = ()
    on_pictures: bool = False
    compares: bool = False
    trains_too: Sequence[str] = ()
    mean: Callable[[Tensor], Tensor] = staticmethod(lambda tensor: tensor)      # over processes; the stage sets it
    settled: float = 0.0                        # the fraction of the training after which it minimises the same to the end

    @classmethod
    def check(cls, config: Config) -> None:
        """ValueError, before anything is loaded, for settings that cannot work."""

    @classmethod
    def usual(cls, config: Config) -> dict[str, Any]:
        """Settings that a run with --finetune takes where they are not typed: times with their mean and scale, and sampler, steps and cfg,
        by which its model is drawn with."""
        return {}

    @classmethod
    def tells(cls, config: Config) -> tuple[str, ...]:
        """Names of numbers in Cond.extra that its network is told, in addition to those that the network asks for (model.told_too)."""
        return ()

    @classmethod
    def taught(cls, config: Config) -> bool:
        """Whether its constructor takes a teacher, as the last argument: the model of --teacher as it is, beside the trained one."""
        return False

    @classmethod
    def begins_as(cls, model: Any, config: Config) -> Any:
        """The Model that a run with --finetune loads, in the form in which it is trained and written: another network of its parts, for
        example, or a scheduler whose grid has the times that are trained. Of a model that has this form already, the same."""
        return model

    @classmethod
    def check_sources(cls, config: Config, downscale: int) -> None:
        """ValueError, before the run begins, where files that it needs are missing, damaged or do not fit, or where pictures are too
        small. Of objectives of the first stage. downscale: pixels per latent on each side."""

    @classmethod
    def check_parts(cls, config: Config, vae: nn.Module | None) -> None:
        """The same for objectives of the network. config: completed by what --cache decides. vae: the run's
        autoencoder; None: it is trained first."""

    def draw(self, samples: Any, generator: torch.Generator, batch_size: int, part: slice) -> NamedTuple:
        """A batch, as a NamedTuple of tensors [b, ...] on the CPU. A field may be None.

        samples: this process's part of a global batch of `batch_size`. Random numbers are drawn for the whole global batch, then
        cut to `part`, so that they depend neither on the number of processes nor on that of micro-batches.

        It is called in another thread, some steps ahead, so that no GPU waits for random numbers: it must not depend on the weights,
        nor on anything else that training changes."""
        raise TypeError(f"{type(self).__name__} does not say how a batch is drawn: give it a method draw()")

    def to_device(self, batch: NamedTuple, device: torch.device) -> NamedTuple:
        """A drawn batch on the device, without waiting for the copies. An objective may leave tensors on the CPU that it only needs
        there, and adds what is computed once per step rather than in every micro-batch."""
        return map_tensors(batch, lambda tensor: upload(tensor, device))

    def collect(self, turn: Turn, networks: Networks, micro_batches: Sequence[NamedTuple]) -> None:
        """Called before the first call of `losses` in a turn, with all micro-batches of this process, under autocast: for losses that
        compare the samples of a batch with each other."""

    def losses(self, turn: Turn, networks: Networks, batch: NamedTuple, progress: float) -> Tensor:
        """The loss of every sample of a micro-batch, float32 [b], under autocast.

        progress: the fraction of the training that is over, in [0, 1], for terms that stop at some point."""
        raise TypeError(f"{type(self).__name__} does not say what it minimises: give it a method losses()")

    def validation_batch(self, samples: Any, seed: int) -> NamedTuple | None:
        """A batch of all held-out samples on the CPU with fixed noise at fixed times; None: this objective has none."""
        return None

    def begin_phase(self, config: Config, model: Any) -> None:
        """Called before each phase (picture size), with the config and the model of that phase."""

    def prepare(self, context: Any, batches: Callable[[], Callable[[int], Any]]) -> None:
        """Called at the start of each phase, after begin_phase, by all processes, before its first batch is drawn: for what is computed
        once, ahead of the training, and kept in the run's folder. context: the run's (training/context.py). batches: makes a function
        that returns the samples of a whole global batch at a position."""

    def after_step(self, step: int) -> None:
        """Called after every optimizer step, on all processes; a moving target network is updated here, for example."""

    def start_over(self) -> None:
        """Called where memory has run out and a turn is taken again in smaller micro-batches: what `losses` has kept is out of date."""

    def log_row(self) -> Mapping[str, Any]:
        """Numbers of its own for a row of log.jsonl."""
        return {}

    def notes(self) -> Sequence[str]:
        """Texts that are to be noted in the log, asked for with every row of it."""
        return ()


def map_tensors(batch: NamedTuple, function: Callable[[Tensor], Tensor]) -> NamedTuple:
    """The same batch with function(tensor) in place of each tensor. Fields that are None stay None; one may map names to tensors."""
    each = lambda field: {name: function(tensor) for name, tensor in field.items()} if isinstance(field, Mapping) else function(field)
    return type(batch)(*(None if field is None else each(field) for field in batch))


def split(batch: NamedTuple, parts: int) -> list[NamedTuple]:
    """Cut a batch into micro-batches of nearly equal sizes: of one size, or of two that differ by one sample."""
    return [type(batch)(*micro) for micro in zip(*(_cut(field, parts) for field in batch))]


def _cut(field: Any, parts: int) -> Sequence[Any]:
    if isinstance(field, Mapping):
        return [dict(zip(field, pieces)) for pieces in zip(*(tensor.tensor_split(parts) for tensor in field.values()))]
    return [None] * parts if field is None else field.tensor_split(parts)


def turns_at(objective: Objective, step: int, progress: float = 1.0) -> list[Turn]:
    """The turns that take part in optimizer step `step` (0-based), when this fraction of the training is over."""
    return [turn for turn in objective.turns if step % turn.every == 0 and progress >= turn.start]
