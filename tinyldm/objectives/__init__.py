"""What a training step minimises, one file each, and the tables of them."""

from tinyldm.objectives.autoencoder import AutoencoderObjective
from tinyldm.objectives.base import Objective, Turn, map_tensors, split, turns_at
from tinyldm.objectives.contrastive import Contrastive
from tinyldm.objectives.consistency import Consistency
from tinyldm.objectives.denoising import Denoising
from tinyldm.objectives.diff2flow import Diff2Flow
from tinyldm.objectives.dmd import DMD
from tinyldm.objectives.guided import Guided
from tinyldm.objectives.lcm import LCM
from tinyldm.objectives.mean_flow import MeanFlow
from tinyldm.objectives.progressive import Progressive
from tinyldm.objectives.reflow import Reflow
from tinyldm.objectives.repa import REPA
from tinyldm.objectives.repa_e import REPAE
from tinyldm.objectives.scm import SCM
from tinyldm.objectives.self_corrected import SelfCorrected

# Of the network (--objective), called with (config, model, names of the trained parts; in place of a model, one on pictures gets
# the CLIP that it trains), and of the autoencoder (--vae-objective), called with (settings, vae).
OBJECTIVES: dict[str, type[Objective]] = {
    "denoising": Denoising, "repa": REPA, "repa_e": REPAE, "consistency": Consistency, "lcm": LCM, "scm": SCM, "mean_flow": MeanFlow,
    "progressive": Progressive, "guided": Guided, "reflow": Reflow, "diff2flow": Diff2Flow, "self_corrected": SelfCorrected, "dmd": DMD,
    "contrastive": Contrastive}
FIRST_STAGE_OBJECTIVES: dict[str, type[Objective]] = {"autoencoder": AutoencoderObjective}

__all__ = ["FIRST_STAGE_OBJECTIVES", "OBJECTIVES", "Objective", "Turn", "map_tensors", "split", "turns_at"]
