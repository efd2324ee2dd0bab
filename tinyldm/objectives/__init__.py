"""What a training step minimises, one file each; the table of those that train a model's network (--objective)."""

from tinyldm.objectives.base import Objective, Turn, split, turns_at
from tinyldm.objectives.denoising import Denoising

OBJECTIVES: dict[str, type[Objective]] = {"denoising": Denoising}      # called with (config, model, names of the trained parts)

__all__ = ["OBJECTIVES", "Objective", "Turn", "split", "turns_at"]
