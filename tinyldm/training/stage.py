"""A stage of a run, as the trainer sees it. Latent diffusion has two: the autoencoder, then the network on its latents. A CLIP has one.

A stage goes through phases, one per picture size. Trainer (train.py) is the same for all stages; what differs is here:
which networks, which objective, which data, and what is done beside training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tinyldm.config import Config, OptimisationConfig
from tinyldm.objectives import Objective
from tinyldm.random_streams import Stream
from tinyldm.training.context import RunContext
from tinyldm.training.distributed import World
from tinyldm.training.ema import EMA, PowerEMA
from tinyldm.training.learner import Learner
from tinyldm.training.trained import Trained
from tinyldm.training.validation import Validation


class Phase(NamedTuple):
    """The training of a stage at one picture size."""

    config: Config
    samples: Callable[[int], Any]                   # position of a batch -> this process's samples of it, for Objective.draw
    part: slice                                     # the indices of those samples in the global batch
    networks: dict[str, Any]                        # part name -> network; "net" is the compiled handle
    micro_batches: int                              # per step and process, at first
    validation: Validation | None = None


class Stage:
    """Base class of the stages."""

    name: str                                       # "vae" or "step", in the names of checkpoints and in log rows
    title: str                                      # the label of the progress bar
    stream: Stream                                  # the random stream that the objective draws from
    config: Config
    settings: OptimisationConfig
    world: World
    phases: list[Config]
    objective: Objective
    trained: Trained
    average = True                                  # whether the weights are averaged
    val_every = 0                                   # steps per validation
    patience = 0                                    # of early stopping; 0: there is none
    checkpoint_at_end = True                        # False for the first stage: its result is RUN/vae instead
    reported = False                                # whether it is sent to --track
    draws = False                                   # whether it trains a model that draws, which --eval-every measures
    planned = False                                 # whether it is compared with --dry-run's plan
    fractions: list[float] = [1.0]                  # the fraction of the training that each phase has; they sum to 1
    costs: list[float] = [1.0]                      # FLOPs of training on one picture, for each phase; [1.0]: not needed
    peak: float | None = None                       # FLOP/s of all devices together; None: not known

    def begin_phase(self, index: int) -> Phase:
        """The data and the compiled networks of a phase."""
        raise TypeError(f"{type(self).__name__} does not say what it trains on: give it a method begin_phase()")

    def check_resume(self, state: dict[str, Any]) -> None:
        """ValueError where the run cannot continue from a checkpoint with this state."""

    def state(self) -> dict[str, Any]:
        """The entries that this stage adds to a checkpoint's state.json."""
        return {}

    def draw_progress(self) -> None:
        """Write a picture that shows how far the stage is, for the report, once a minute. Most draw none."""

    def draw_samples(self, ema: EMA | PowerEMA | None, step: int) -> Path | None:
        """Draw the sample grid after `step` steps -> its file, None in processes that do not write. A stage without one draws nothing."""


Train = Callable[[Stage, RunContext, Path | None], Learner]     # (stage, context, the checkpoint to continue from): trains it to its end
