"""A whole CLIP in transformers' layout (CLIPModel): both towers in one file, each under the names that it has alone, and one config.json.

The readers of a single tower (vit.py, clip.py) take theirs from such a file. CLIPModel has no bias of SigLIP's loss: open_clip's name
for it is used, which transformers reports as unexpected. It is the same for all pairs, so no order of them depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinyldm.models.clip import CLIPConfig
from tinyldm.vendor_loaders import clip, vit
from tinyldm.vendor_loaders.layout import Layout, Rules, apply

CLASS = "CLIPModel"
# What is subtracted from colours in 0..1, and what they are then divided by (openai/CLIP, clip/clip.py).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

RULES: Rules = [
    (r"^vision\.(.*)$", lambda found: apply(vit.TRANSFORMERS, found[1])),
    (r"^text\.(.*)$", lambda found: apply(clip.CLIP_RULES, found[1])),
    (r"^log_scale$", "logit_scale"),
    (r"^bias$", "logit_bias"),
]
LAYOUTS = {"transformers": Layout(r"()logit_scale", lambda config: RULES, lambda config: [(r".*position_ids$", "")])}


def to_config(config: CLIPConfig) -> dict[str, Any]:
    return {
        "architectures": [CLASS],
        "model_type": "clip",
        "projection_dim": config.text.projection_dim,
        "logit_scale_init_value": config.log_scale,
        **({} if config.bias is None else {"logit_bias_init_value": config.bias}),
        "text_config": clip.to_config(config.text),
        "vision_config": vit.to_config(config.vision),
    }


def from_config(config: Mapping[str, Any]) -> CLIPConfig:
    return CLIPConfig(vit.from_config(config["vision_config"] | {"projection_dim": config["projection_dim"]}), clip.from_config(config),
                      config.get("logit_scale_init_value", math.log(1 / 0.07)), config.get("logit_bias_init_value"))


def preprocessor_config(config: CLIPConfig) -> dict[str, Any]:
    """preprocessor_config.json: how transformers' CLIPImageProcessor prepares pictures, which is what training did."""
    size = config.vision.image_size
    return {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD), "do_convert_rgb": True}
