"""The published names of LPIPS' tensors. Trunk and linear layers come from different publishers, mostly in different files:

    trunk    torchvision's files and timm's repositories of VGG16 and AlexNet: features.0.weight
    linear   the lpips package and CompVis: lin0.model.1.weight (its layer 0 is the dropout)
    both     state dicts of a whole LPIPS, and checkpoints of CompVis' autoencoders under loss.perceptual_loss: the trunk is called
             net.slice1.0.weight there, and the linear layers appear a second time as lins.0

Everything else in such files (classifiers, optimizers, the autoencoder itself) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from tinyldm.files import INCOMPLETE
from tinyldm.models.lpips import LPIPS, TRUNKS, LPIPSConfig
from tinyldm.vendor_loaders.layout import Shape

NAMES = {                               # regex of a whole published name -> our name
    r"features\.(\d+)\.(weight|bias)": r"features.\1.\2",
    r"(?:.*\.)?net\.slice\d\.(\d+)\.(weight|bias)": r"features.\1.\2",
    r"(?:.*\.)?lin(\d)\.model\.1\.weight": r"linears.\1.weight",
}


def our_name(published: str) -> str:
    """The name in models/lpips.py of a published tensor, "" for one that is no part of LPIPS."""
    for pattern, name in NAMES.items():
        if found := re.fullmatch(pattern, published):
            return found.expand(name)
    return ""


def part_shapes(config: LPIPSConfig, part: str) -> dict[str, Shape]:
    """The shapes of "features" or "linears" by our names."""
    with torch.device("meta"):
        state = LPIPS(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(f"{part}.")}


def infer(shapes: Mapping[str, Shape]) -> LPIPSConfig:
    """The config of a trunk of any widths, from the shapes of its tensors by our names. ValueError for another network."""
    first = tuple(shapes.get("features.0.weight", ()))
    for trunk, row in TRUNKS.items():
        own = part_shapes(LPIPSConfig(trunk), "features")
        if own["features.0.weight"][2:] != first[2:]:
            continue
        last = [name for name in own if name.endswith("weight")]
        ends = [sum(map(len, row.levels[:level + 1])) - 1 for level in range(len(row.levels))]
        widths = tuple(int(shapes.get(last[end], (1,))[0]) for end in ends)
        own = part_shapes(LPIPSConfig(trunk, widths), "features")
        if wrong := sorted(name for name in own.keys() | shapes.keys() if own.get(name) != tuple(shapes.get(name, ()))):
            raise ValueError(f"{wrong[0]} is not that of {trunk} ({len(wrong)} tensors are missing, unexpected or of another shape): is it "
                             f"a relative, such as one with batch norm? Otherwise {INCOMPLETE}")
        return LPIPSConfig(trunk, () if widths == row.widths else widths)
    raise ValueError(f"features.0.weight {list(first)} is neither VGG16's nor AlexNet's")
