"""A stage of a run, as the trainer sees it. Latent diffusion has two: the autoencoder, then the network on its latents.

A stage goes through phases, one per picture size. Trainer (train.py) is the same for both stages; what differs is here:
which networks, which objective, which data, and what is done beside training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tinyldm.config import Config, OptimisationConfig
from tinyldm.objectives import Objective
from tinyldm.random_streams import Stream
from tinyldm.training.distributed import World
from tinyldm.training.ema import EMA, PowerEMA
from tinyldm.training.trained import Trained
from tinyldm.training.validation import Validation


class Phase(NamedTuple):
    """Training at one picture size."""

    config: Config
    loader: Callable[[int], Iterator[Any]]          # position of the first batch -> this process's part of each, without end
    part: slice                                     # which samples of the global batch these are
    networks: dict[str, Any]                        # what the objective calls, by part name; "net" is the compiled handle
    micro_batches: int                              # per process, to begin with
    validation: Validation | None = None


class Stage:
    """Base class of the two stages."""

    name: str                                       # "vae" or "step": of its log rows and its checkpoints
    title: str                                      # on the progress bar
    stream: Stream                                  # of its noise
    config: Config
    settings: OptimisationConfig
    world: World
    phases: list[Config]
    objective: Objective
    trained: Trained
    average = True                                  # whether the weights are averaged
    checkpoint_at_end = True                        # the first stage's result is RUN/vae
    planned = False                                 # whether --dry-run's plan is held against what is measured
    costs: list[float] = [1.0]                      # FLOPs of training on one picture, per phase, where they matter
    peak: float | None = None                       # FLOP/s of all devices together; None: not known

    @property
    def fractions(self) -> list[float]:
        """Of the training, per phase."""
        shares = [float(share) for share in self.config.data.phases.values()][:len(self.phases)] or [1.0]
        return [share / sum(shares) for share in shares]

    def begin_phase(self, index: int) -> Phase:
        """The data and the compiled networks of a phase."""
        raise TypeError(f"{type(self).__name__} does not say what it trains on: give it a method begin_phase()")

    def check_resume(self, state: dict[str, Any]) -> None:
        """ValueError where the run cannot go on from a checkpoint of this state."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint of this stage notes in state.json beside the trainer's own."""
        return {}

    def draw_samples(self, ema: EMA | PowerEMA | None, step: int) -> None:
        """The sample grid after `step` steps; a stage without one draws nothing."""
