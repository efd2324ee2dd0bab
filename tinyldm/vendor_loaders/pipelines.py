"""The pipeline classes that model_index.json names: what each holds and runs."""

from __future__ import annotations

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
    """

    runs: Callable[[Mapping, Mapping, list[Mapping]], bool]
    index: Mapping[str, Any]
    flow_match: bool
    join: str


def _stable_diffusion_runs(scheduler: Mapping, vae: Mapping, texts: list[Mapping]) -> bool:
    """It ignores the VAE's shift_factor, and takes a text encoder with projection by its outputs in another order."""
    stock = not any(str(config.get("_class_name", "")).startswith("TinyLDM") for config in (scheduler, vae))
    return stock and not vae.get("shift_factor") and [class_name(text) for text in texts] == ["CLIPTextModel"]


PIPELINES: dict[str, Pipeline] = {
    STABLE_DIFFUSION: Pipeline(_stable_diffusion_runs, {
        "safety_checker": [None, None], "requires_safety_checker": False, "feature_extractor": [None, None],
        "image_encoder": [None, None]}, flow_match=False, join="single"),
    OWN: Pipeline(lambda *configs: True, {}, flow_match=True, join="single"),
}
