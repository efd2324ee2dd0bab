"""What is added to a model for drawing: what was learned beside it (--lora and --embedding of all scripts), or worse than it
(--autoguidance)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from tinyldm.adapters.embedding import apply_embeddings
from tinyldm.adapters.merge import apply_adapters
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.process import at_size
from tinyldm.folders.load import load_model
from tinyldm.model import Model, architecture
from tinyldm.training.portable import portable
from tinyldm.training.run_folder import find_learned, find_model


def apply_learned(model: Model, args: Namespace, captions: Sequence[str] | None = None) -> list[str]:
    """Add the adapters and words that the flags name to a loaded model, in place -> the words. captions: all that will be drawn.
    ValueError for the first that does not fit, and for a word that no caption has."""
    apply_adapters(model, [each._replace(path=find_learned(each.path)) for each in args.lora])
    return apply_embeddings(model, [*map(find_learned, args.embedding)], captions)


def learned_facts(args: Namespace) -> dict[str, str]:
    """What was added, as a picture's settings name it."""
    return {"LoRA": " ".join(str(each._replace(path=portable(each.path))) for each in args.lora),
            "Embeddings": " ".join(map(portable, args.embedding))}


def load_worse(path: str | None, model: Model, ema: bool = True) -> Model | None:
    """The model that --autoguidance names, with the other's text encoders and autoencoder, on its device and in its precision. None: there
    is none. ValueError where its network would not draw the same kind of latents from the same noise and text."""
    if path is None:
        return None
    worse = load_model(find_model(path), "cpu", next(model.net.parameters()).dtype, ema)
    told = {"its kind of network": lambda each: type(each.net), "its noise process": lambda each: [*grid(at_size(each.process), 8)],
            "further conditions": lambda each: architecture(each.net).extras(each.net.config),
            **{name: lambda each, name=name: getattr(each.net.config, name, None) for name in ("in_channels", "context_dim", "pooled_dim")}}
    for what, of in told.items():
        if of(worse) != of(model):
            raise ValueError(f"--autoguidance {path} differs from the model in {what}: name an earlier checkpoint of the same training, or "
                             "a smaller model that was trained on the same latents with the same text encoders")
    return replace(worse, net=worse.net.to(model.device), vae=model.vae, text=model.text)
