"""What a training step minimises, one file each, and the tables of them."""

from tinyldm.objectives.autoencoder import AutoencoderObjective
from tinyldm.objectives.base import Objective, Turn, map_tensors, split, turns_at
from tinyldm.objectives.denoising import Denoising
from tinyldm.objectives.repa import REPA
from tinyldm.objectives.repa_e import REPAE

# Of the network (--objective), called with (config, model, names of the trained parts), and of the autoencoder
# (--vae-objective), called with (settings, vae).
OBJECTIVES: dict[str, type[Objective]] = {"denoising": Denoising, "repa": REPA, "repa_e": REPAE}
FIRST_STAGE_OBJECTIVES: dict[str, type[Objective]] = {"autoencoder": AutoencoderObjective}

__all__ = ["FIRST_STAGE_OBJECTIVES", "OBJECTIVES", "Objective", "Turn", "map_tensors", "split", "turns_at"]
