"""Our own DiT in a model folder (`transformer/`): published nowhere else, it keeps our tensor names and config fields.

diffusers has no class for it. The name of the class in config.json begins with TinyLDM, so that nothing else opens it.
"""

from __future__ import annotations

from tinyldm.models.dit import DiTConfig
from tinyldm.vendor_loaders.layout import Layout, own_config

CLASS = "TinyLDMDiT"

LAYOUTS = {"tinyldm": Layout(r"()patch_in\.weight", lambda config: [])}

to_config, from_config = own_config(CLASS, DiTConfig)
