"""The pipeline classes that model_index.json names: what each holds and runs, and what it changes in its parts.

PIPELINES has the classes that are written, READ those of diffusers that are read, and REFUSED the reasons why others are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

STABLE_DIFFUSION, OWN = "StableDiffusionPipeline", "TinyLDMPipeline"


def class_name(config: Mapping) -> str:
    """The class that a part's config.json names: diffusers writes it as _class_name, transformers as architectures."""
    return (config.get("architectures") or [config.get("_class_name")])[0]


class Pipeline(NamedTuple):
    """A pipeline class, published or (OWN) one that only tinyldm opens.

    runs        (scheduler_config.json, the VAE's config.json, the text encoders') -> whether it draws what tinyldm draws with
                such parts
    index       further entries of model_index.json
    flow_match  whether it runs FlowMatchEulerDiscreteScheduler
    join        the rule that joins its text encoders' answers (text/encoders.py); OWN: tinyldm.json says it
    shifts      whether it takes the VAE's shift_factor into account
    """

    runs: Callable[[Mapping, Mapping, list[Mapping]], bool]
    index: Mapping[str, Any]
    flow_match: bool
    join: str
    shifts: bool


def _stable_diffusion_runs(scheduler: Mapping, vae: Mapping, texts: list[Mapping]) -> bool:
    """It ignores the VAE's shift_factor, and takes a text encoder with projection by its outputs in another order."""
    stock = not any(str(config.get("_class_name", "")).startswith("TinyLDM") for config in (scheduler, vae))
    return stock and not vae.get("shift_factor") and [class_name(text) for text in texts] == ["CLIPTextModel"]


PIPELINES: dict[str, Pipeline] = {
    STABLE_DIFFUSION: Pipeline(_stable_diffusion_runs, {
        "safety_checker": [None, None], "requires_safety_checker": False, "feature_extractor": [None, None],
        "image_encoder": [None, None]}, flow_match=False, join="single", shifts=False),
    OWN: Pipeline(lambda *configs: True, {}, flow_match=True, join="single", shifts=True),
}


class Reading(NamedTuple):
    """How the folder of a published pipeline is read."""

    written_as: str                 # the row of PIPELINES with the same parts
    scheduler: Mapping[str, Any]    # fields of scheduler_config.json that its constructor sets, whatever the file says
    without: str = ""               # what the class does in addition, which is left out here


# The constructors of diffusers 0.42. What they change in the U-Net's config is in unet.py.
_FROM_NOISE = {"steps_offset": 1, "clip_sample": False}
READ = {
    STABLE_DIFFUSION: Reading(STABLE_DIFFUSION, _FROM_NOISE),
    "StableDiffusionImg2ImgPipeline": Reading(STABLE_DIFFUSION, _FROM_NOISE),
    "StableDiffusionInpaintPipeline": Reading(STABLE_DIFFUSION, {"steps_offset": 1, "skip_prk_steps": True}),
    "StableDiffusionInpaintPipelineLegacy": Reading(STABLE_DIFFUSION, _FROM_NOISE),
    "StableDiffusionPipelineSafe": Reading(STABLE_DIFFUSION, _FROM_NOISE, "its guidance away from unsafe content"),
}

# Pattern of a class name -> why its folder is not read; the first that fits.
REFUSED = {
    r"Flax.*": "its weights are Flax's, in msgpack: take the branch of the repository for PyTorch (--revision main)",
    r"(Onnx|ORT|OV|Neuron).*|.*Onnx.*": "its weights are programs for another runtime, not tensors: take the folder for PyTorch",
    r".*(ControlNet|Adapter).*": "it draws with a further network that looks at a picture: take the folder of the model without it",
    r".*XL.*": "Stable Diffusion XL has a second text encoder, and a U-Net that is told sizes",
    r".*(Upscale|SuperRes|Depth2Img|Pix2Pix|ImageVariation|UnCLIP|GLIGEN|PaintByExample|LDM3D).*":
        "its U-Net takes more than noise and a caption",
    r"LatentConsistency.*": "its U-Net takes the guidance scale as an input",
    r"(AltDiffusion|LDMTextToImage).*": "its text encoder is not CLIP's",
    r"(StableDiffusion3|Flux|PixArt|Sana|HunyuanDiT|AuraFlow|Lumina|Chroma).*": "its network is a transformer that is not here",
    r"DiTPipeline": "it draws from the number of a class, not from a caption",
}


def find(index: Mapping, source: object) -> Reading:
    """How to read the model folder with this model_index.json. ValueError, with the reason, for one that cannot be read."""
    name = index.get("_class_name")
    if isinstance(name, list):                                  # [module, class]: the folder brings its own code
        name = " ".join(map(str, name))
    if name in READ or name in PIPELINES:
        return READ.get(name, Reading(name, {}))
    reason = next((reason for pattern, reason in REFUSED.items() if re.fullmatch(pattern, str(name))), None)
    if reason is None and {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= index.keys() and "text_encoder_2" not in index:
        reason = (f"it may have the parts of {STABLE_DIFFUSION}; if it does, write that _class_name into its model_index.json "
                  "to draw with them as that class does")
    raise ValueError(f"{source} holds a {name}, which cannot be read: {reason or f'only {STABLE_DIFFUSION} and its like can'}")
