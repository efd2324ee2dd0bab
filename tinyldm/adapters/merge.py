"""Adapters added to the weights of a model: to draw with them, and to write the sum as a model.

All changes are summed with the weight in float32, and the sum is rounded once to the weight's precision. So several adapters at once
are the sum of their changes; one after the other, in 16 bits, is that sum to rounding. The original weights are not kept: read the
model again to be without the adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyldm.adapters.files import Adapter, Entry, read_adapter
from tinyldm.config.adapter_arguments import Wanted
from tinyldm.model import Model


@torch.no_grad()
def apply_adapters(model: Model, wanted: Sequence[Wanted | tuple[str | Path, float]]) -> list[Adapter]:
    """Add adapters, each with its strengths, to the weights of a model, in place -> what was read. ValueError for the first that does not
    fit; the model is then unchanged. A model without values, on the meta device, is only compared."""
    wanted = [each if isinstance(each, Wanted) else Wanted(str(each[0]), *each[1:]) for each in wanted]
    adapters = [read_adapter(each.path, model) for each in wanted]
    for each in wanted:
        check_blocks(each, model)
    pairs = [(entry, each) for adapter, each in zip(adapters, wanted) for entry in adapter.entries]
    for part, network in model.modules.items():
        if not next(network.parameters()).is_meta:
            for together in connected((entry, each) for entry, each in pairs if entry.layer.part == part):
                _add(network, part, together)
    return adapters


def _add(network: nn.Module, part: str, changes: Iterable[tuple[Entry, Wanted]]) -> None:
    """Add changes that concern the same weights. All are computed before the first is added: DoRA's depends on the weight."""
    sums: dict[str, Tensor] = {}
    for entry, wanted in changes:
        strengths = {place.key: wanted.strength(part, place.key) for place in entry.layer.places}
        if not any(strengths.values()):
            continue
        weights = [place.form.outwards(network.get_parameter(place.key), place.how) for place in entry.layer.places]
        delta = entry.change.delta(weights[0] if len(weights) == 1 else torch.cat(weights))
        for key, own in entry.parts(delta):             # in place where that is possible: a large model's changes are large
            own = own.reshape(network.get_parameter(key).shape).mul_(strengths[key])
            sums[key] = sums[key].add_(own) if key in sums else own
    for key, change in sums.items():
        weight = network.get_parameter(key)
        weight.copy_(change.add_(weight))               # in float32, then rounded


def connected(changes: Iterable[tuple[Entry, Wanted]]) -> list[list[tuple[Entry, Wanted]]]:
    """The changes in groups that concern the same weights: a fused layer in one file stands for several in another."""
    groups: list[list[tuple[Entry, Wanted]]] = []
    group_of: dict[str, list] = {}
    for change in changes:
        keys = [place.key for place in change[0].layer.places]
        joined = [change]
        for group in {id(group_of[key]): group_of[key] for key in keys if key in group_of}.values():
            joined += group
            groups = [other for other in groups if other is not group]
        groups.append(joined)
        for entry, _ in joined:
            group_of.update((place.key, joined) for place in entry.layer.places)
    return groups


def check_blocks(wanted: Wanted, model: Model) -> None:
    """ValueError for a block with a strength of its own that the network does not have."""
    names = [name for name, _ in model.net.named_modules()]
    if lost := [block for block in wanted.blocks if block not in names]:
        tops = [name for name in names if name.count(".") <= 1 and name]
        raise ValueError(f"--lora {wanted.path}: the network has no block {lost[0]}: there are {', '.join(tops[:12])}, ...")
