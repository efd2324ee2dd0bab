"""What the header of a safetensors file says about the model, by the names of Stability AI's ModelSpec 1.0.1, which programs show."""

from __future__ import annotations

from typing import Any

IMPLEMENTATION = "tinyldm"


def modelspec(architecture: str, title: str, resolution: int | None = None, prediction: str | None = None, **more: Any) -> dict[str, str]:
    """architecture: one of ModelSpec's ids where the model is of a published kind, as in "stable-diffusion-v1" or "flux-1-dev/lora", else
    "tinyldm/..."; resolution: of the pictures, in pixels; prediction: eps, v or another of ours. Facts that are None are left out."""
    told = {"eps": "epsilon", "v": "v"}.get(prediction or "")           # the two that the standard knows
    facts = {"sai_model_spec": "1.0.1", "architecture": architecture, "implementation": IMPLEMENTATION, "title": title,
             "resolution": f"{resolution}x{resolution}" if resolution else None, "prediction_type": told, **more}
    return {f"modelspec.{name}": str(value) for name, value in facts.items() if value not in (None, "")}
