"""Loads LPIPS from published weights: the trunk (VGG16 or AlexNet) and the linear layers, wherever each of them lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tinyldm.folders import hub
from tinyldm.folders.rename import load_renamed
from tinyldm.folders.weights import PICKLES, Weights, choose, errors_about, open_weights
from tinyldm.models.lpips import LPIPS, SCALE, SHIFT, LPIPSConfig
from tinyldm.vendor_loaders.layout import Shape
from tinyldm.vendor_loaders.lpips import infer, our_name, part_shapes

PUBLISHED = {"vgg16": "vgg", "alexnet": "alex"}         # trunk -> name of the linear layers' file in the lpips package


def load_lpips(*sources: str | Path, device: str | torch.device = "cpu") -> LPIPS:
    """LPIPS from one source or several, in any order, which together hold trunk and linear layers. A source is a hub id, a folder or
    a file. Which trunk it is, the tensors say. Safetensors are preferred to pickles, which are read with weights_only=True.

    In float32, frozen. ValueError, with advice, where a part is missing, damaged or does not fit the other.
    """
    config, weights = open_lpips(sources)
    with torch.device("meta"):                          # so that no initial weights are drawn
        made = LPIPS(config)
    load_renamed(made, weights, [], device, torch.float32)
    return made.requires_grad_(False)


def open_lpips(sources: Sequence[str | Path]) -> tuple[LPIPSConfig, Weights]:
    """The config and the weights, under our names and not read yet. Errors as for load_lpips."""
    files, said = [file for source in sources for file in weight_files(source)], ", ".join(map(str, sources))
    found = {file: open_weights(file).renamed(our_name) for file in files}
    trunk = next((file for file in files if "features.0.weight" in found[file].shapes), None)
    if trunk is None:
        raise ValueError(f"{said} holds no trunk of LPIPS (a tensor features.0.weight): name VGG16 or AlexNet as timm or torchvision "
                         "publishes it, for example timm/vgg16.tv_in1k")
    with errors_about(trunk):
        config = infer(part(found[trunk], "features").shapes)
    wanted = part_shapes(config, "linears")
    linear = next((file for file in files if fits(part(found[file], "linears").shapes, wanted)), None)
    if linear is None:
        raise ValueError(f"{said} holds no linear layers that fit {config.trunk} (lin0.model.1.weight and so on): name the lpips package's "
                         f"file weights/v0.1/{PUBLISHED[config.trunk]}.pth, or the folder that it is in, beside the trunk")
    constants = {"shift": torch.tensor(SHIFT).view(3, 1, 1), "scale": torch.tensor(SCALE).view(3, 1, 1)}
    return config, part(found[trunk], "features").joined(part(found[linear], "linears")).joined(Weights.of(constants))


def part(weights: Weights, name: str) -> Weights:
    return weights.renamed(lambda key: key if key.startswith(f"{name}.") else "")


def fits(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> bool:
    return {name: tuple(shape) for name, shape in shapes.items()} == dict(wanted)


def weight_files(source: str | Path) -> list[Path]:
    """The files of a source that may hold a part. Of a folder or repository with a file of the usual name it is that one alone."""
    path = hub.locate(source, chosen)
    if path.is_file():
        return [path]
    names = {file.name for file in path.iterdir() if file.is_file()} if path.is_dir() else set()
    return [path / name for name in chosen(names)]


def chosen(names: set[str]) -> list[str]:
    """The files to open among all of a folder's: model.safetensors and the like, else all weights, safetensors first. A pickle is
    left out beside a safetensors file of the same stem."""
    if usual := choose(names, "model"):
        return [usual]
    kinds = (".safetensors", *PICKLES)
    files = sorted((name for name in names if "/" not in name and name.endswith(kinds)),
                   key=lambda name: (not name.endswith(kinds[0]), name))
    return [name for name in files if name.endswith(kinds[0]) or f"{Path(name).stem}.safetensors" not in files]
