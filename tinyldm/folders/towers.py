"""Loads networks that look at pictures from published weights: which layout a file is in, its tensors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyldm.files import INCOMPLETE, read_json
from tinyldm.folders import hub, needed
from tinyldm.folders.build import WithoutInitialWeights
from tinyldm.folders.rename import apply, load_renamed, recognise
from tinyldm.folders.weights import Weights, errors_about, find_weights, open_weights
from tinyldm.models.recogniser import RecogniserNet
from tinyldm.models.vit import ViT
from tinyldm.vendor_loaders import clip, vit
from tinyldm.vendor_loaders.layout import Layout

# What is subtracted from colours in 0..1, and what they are then divided by.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)                  # SigLIP's, and [-1, 1] for others


def load_vit(source: str | Path, device: str | torch.device = "cpu") -> ViT:
    """The picture tower of a CLIP, DINOv2 or SigLIP, in any layout of vendor_loaders/vit.py. A config.json beside the weights is only
    asked for what tensors do not tell."""
    file, weights = weights_of(source)
    with errors_about(file):
        layout, weights = recognise(weights, vit.LAYOUTS)
        config = layout.config_of(weights.shapes)
        beside = next((file.parent / name for name in needed.CONFIGS if (file.parent / name).exists()), None)
        if beside:
            published = read_json(beside, INCOMPLETE)
            config = vit.complete(config, published)
            clip.check_activation(config.activation, hub.hub_id(source), published.get("_name_or_path"))
        return filled(ViT, config, layout, weights, device)


def load_recogniser(source: str | Path, device: str | torch.device = "cpu") -> RecogniserNet:
    """The network of toyworld's recogniser, from the file in which `evaluate.py --metric prompts` keeps it."""
    file, weights = weights_of(source)
    shapes = weights.shapes
    if not {"stem.0.weight", "head.weight"} <= shapes.keys():
        raise ValueError(f"{file} does not hold toyworld's recogniser: name the file that evaluate.py --metric prompts has made, "
                         "~/.cache/tinyldm/recogniser.safetensors")
    with torch.device("meta"):
        net = RecogniserNet(shapes["stem.0.weight"][0], shapes["head.weight"][0])
    with errors_about(file):
        load_renamed(net, weights, [], device, torch.float32)
    return net.eval().requires_grad_(False)


def weights_of(source: str | Path) -> tuple[Path, Weights]:
    """The file of a network's weights, and the weights, not read yet. ValueError where there are none."""
    path = hub.locate(source, lambda names: needed.of_weights(names, "", "model"))
    file = path if path.is_file() else find_weights(path, "model")
    if file is None:
        raise ValueError(f"{source} holds no weights (model.safetensors or the like): name the folder or the file that does")
    return file, open_weights(file)


def filled(kind: type[nn.Module], config: Any, layout: Layout, weights: Weights, device: str | torch.device) -> Any:
    """A network with these weights, in float32, frozen."""
    with torch.device("meta"), WithoutInitialWeights():
        module = kind(config) if config else kind()
    tidy = layout.tidy(config)
    load_renamed(module, weights.renamed(lambda name: apply(tidy, name)), layout.rules(config), device, torch.float32)
    return module.eval().requires_grad_(False)
