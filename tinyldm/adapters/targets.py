"""Which layers of a network an adapter changes: groups of layers by name.

The layers of a group are found by the patterns in the network's row of tinyldm/model.py (`targets`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from tinyldm.lookup import lookup
from tinyldm.model import Model, architecture

# Group -> the layers in it. All but "text" choose among the layers of each adapted part.
GROUPS = {
    "attention": "queries, keys, values and outputs of attention",
    "mlp": "feed-forward layers and, in U-Nets, the layers before and after a transformer",
    "conv": "convolutions of U-Nets",
    "modulation": "of transformers whose blocks are scaled and shifted by the time (Stable Diffusion 3, FLUX.1)",
    "text": "also adapts the text encoders",
}


def target_layers(network: nn.Module, groups: Collection[str]) -> dict[str, nn.Module]:
    """Name -> layer, of the network's linear layers and convolutions in these groups. A group that this network does not have is passed
    over; ValueError for unknown groups, and where no layer is left."""
    patterns = architecture(network).targets
    wanted = [patterns[group] for group in groups if lookup(GROUPS, group, "target of an adapter") and group in patterns]
    layers = {name: layer for name, layer in network.named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d)) and any(re.search(pattern, name) for pattern in wanted)}
    if not layers:
        raise ValueError(f"{type(network).__name__} has no layers in {', '.join(groups)}: its groups are {', '.join(patterns) or 'none'}")
    return layers


def adapted_parts(model: Model, groups: Sequence[str]) -> Mapping[str, nn.Module]:
    """The parts of a model that an adapter with these targets changes: the network and, with "text", its text encoders. ValueError for a
    group that none of them has."""
    parts = {"net": model.net, **(model.text.modules if "text" in groups else {})}
    known = {"text"}.union(*(architecture(network).targets for network in parts.values()))
    if lost := [group for group in groups if group not in known]:
        lookup(GROUPS, lost[0], "target of an adapter")
        raise ValueError(f"the model has no layers in {lost[0]}, a target of an adapter: it has {', '.join(sorted(known))}")
    return parts
