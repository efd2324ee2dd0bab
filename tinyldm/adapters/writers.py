"""How the tensors of an adapter are named when it is written: for diffusers, and as kohya's trainer writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tinyldm.adapters.formats import Layer, layers_in, prefixes
from tinyldm.adapters.low_rank import LowRank
from tinyldm.folders.rename import Place
from tinyldm.model import Model, architecture


def published(model: Model, part: str, changes: Mapping[str, LowRank], layout: str) -> dict[str, LowRank]:
    """The changes of our weights in one part, by the path of a layer in a published layout. ValueError for weights that the part does
    not have."""
    network, own = model.modules[part], dict(changes)
    found = {layer.path: fused([(place, own.pop(place.key, None)) for place in layer.places], layer)
             for layer in layers_in(part, network, layout, architecture(network).layouts[layout])
             if any(place.key in own for place in layer.places)}
    if own:
        raise ValueError(f"{type(network).__name__} has no weight {min(own)} that an adapter can change")
    return found


def fused(parts: Sequence[tuple[Place, LowRank | None]], layer: Layer) -> LowRank:
    """The change of a published weight from those of our weights in it. Where these share A, as after a fused one was taken apart, it
    keeps the rank; otherwise their ranks add up, and each of them has its own columns of B."""
    there = [change for _, change in parts if change is not None]
    scales = {change.scale for change in there}
    factor = (lambda change: 1.0) if len(scales) == 1 else (lambda change: change.scale)        # which is multiplied into B
    rows = lambda place: place.form.inwards(torch.empty(layer.shape[0], device="meta"), place.how).shape[0]
    ups = [place.form.outwards(change.up.flatten(1) * factor(change), place.how) if change is not None
           else torch.zeros(rows(place), 0) for place, change in parts]
    if len(there) == len(parts) and all(torch.equal(change.down, there[0].down) for change in there):
        down, up = there[0].down, torch.cat(ups)
    else:
        down, up = torch.cat([change.down for change in there]), torch.block_diag(*ups)
    return LowRank(down, up, scales.pop() if len(scales) == 1 else 1.0).like(layer.shape)


def _diffusers(model: Model, part: str, changes: Mapping[str, LowRank]) -> dict[str, Tensor]:
    layout, prefix = next(iter(architecture(model.modules[part]).layouts)), prefixes(model)[part].diffusers
    tensors = {}
    for path, change in published(model, part, changes, layout).items():
        tensors |= {f"{prefix}.{path}.lora_A.weight": change.down, f"{prefix}.{path}.lora_B.weight": change.up * change.scale}
    return tensors


def _kohya(model: Model, part: str, changes: Mapping[str, LowRank]) -> dict[str, Tensor]:
    row, prefix = architecture(model.modules[part]), prefixes(model)[part].kohya
    layout = row.kohya(model.modules[part].config) or next(iter(row.layouts))
    tensors = {}
    for path, change in published(model, part, changes, layout).items():
        name = f"{prefix}_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": change.down, f"{name}.lora_up.weight": change.up,
                    f"{name}.alpha": torch.tensor(change.scale * change.rank)}
    return tensors


# Layout of a file -> the function that makes its tensors: (model, part, our weight -> its change) -> name -> tensor.
WRITERS: dict[str, Callable[[Model, str, Mapping[str, LowRank]], dict[str, Tensor]]] = {"diffusers": _diffusers, "kohya": _kohya}
