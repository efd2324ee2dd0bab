"""The configuration of a run: fields in groups, presets as rows of data, and the command line made from both.

Nothing here imports torch, so that `--help` answers at once.
"""

from tinyldm.config.check import split_weights
from tinyldm.config.command_line import PATHS, pairs, parse
from tinyldm.config.fields import (
                                   AutoencoderConfig,
                                   Config,
                                   DataConfig,
                                   DrawingConfig,
                                   NetworkConfig,
                                   ObjectiveConfig,
                                   OptimisationConfig,
                                   PlanConfig,
                                   RunConfig,
                                   TextConfig,
                                   change,
                                   flatten,
                                   make_config,
                                   phases,
)
from tinyldm.config.finetune import FINETUNES
from tinyldm.config.finetune_fields import FinetuneConfig
from tinyldm.config.presets import PRESETS, preset_config

__all__ = ["AutoencoderConfig", "Config", "DataConfig", "DrawingConfig", "FINETUNES", "FinetuneConfig", "NetworkConfig",
           "ObjectiveConfig", "OptimisationConfig", "PATHS", "PRESETS", "PlanConfig", "RunConfig", "TextConfig", "change", "flatten",
           "make_config", "pairs", "parse", "phases", "preset_config", "split_weights"]
