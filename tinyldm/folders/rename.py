"""Renames our state-dict keys to those of a published layout, and back.

A table is `list[(regex, replacement)]`, applied in order with re.sub to *our* key. Our keys are known from
the module, so each is renamed once and the resulting dict reads in both directions: there is no second,
inverse table. Loading is strict: a published tensor that is not used, or one of ours that is not loaded, is an error.

Where a published tensor is stored differently from ours, a suffix of its name in the table says how:

    name@1/3    ours is the second of three equal parts along the first axis (open_clip fuses q, k and v)
    name@T      stored transposed
    name@1x1    a matrix stored as a 1x1 convolution

A `Layout` is such a table, and the way to recognise the files that it is for: by a tensor name that only they contain, never by
the file's own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tinyldm.folders.weights import Weights
from tinyldm.vendor_loaders.layout import Layout, Rules, Shape, apply


def recognise(weights: Weights, layouts: Mapping[str, Layout]) -> tuple[Layout, Weights]:
    """The layout of a network's weights, and those weights without their prefix and without what lies outside it.

    ValueError where no layout fits.
    """
    for layout in layouts.values():
        for name in weights.shapes:
            if found := re.fullmatch(layout.mark, name):
                prefix = found[1]
                return layout, weights.renamed(lambda key: key.removeprefix(prefix) if key.startswith(prefix) else "")
    raise ValueError(f"none of the layouts {', '.join(layouts)} fits the tensors, {_some(weights.shapes)}. "
                     f"Is it another network, or saved from a compiled or wrapped module?")


def published_names(ours: Iterable[str], rules: Rules) -> dict[str, str]:
    """Our key -> published key. ValueError where two of ours would share one published name."""
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for key in ours:
        name = apply(rules, key)
        if name in taken:
            raise ValueError(f"rename rules give {key} and {taken[name]} the same name {name}: make a pattern stricter")
        names[key], taken[name] = name, key
    return names


def published_shapes(state_dict: Mapping[str, Tensor], rules: Rules) -> dict[str, Shape]:
    """Published name -> shape of the tensor there."""
    places = (_place(name) for name in published_names(state_dict, rules).values())
    return {name: _outer_shape(tensor.shape, how) for (name, how), tensor in zip(places, state_dict.values())}


def export_renamed(state_dict: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """A state dict (a module's, or an EMA's) under published names: contiguous CPU tensors, ready for safetensors."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, published in published_names(state_dict, rules).items():
        name, how = _place(published)
        parts.setdefault(name, {})[how] = state_dict[key].detach().cpu()
    return {name: _outwards(part).contiguous() for name, part in parts.items()}


@torch.no_grad()
def load_renamed(module: nn.Module, weights: Weights | Mapping[str, Tensor], rules: Rules,
                 device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
    """Copy published tensors into module, one at a time, in the dtype that module has.

    A module on the meta device is given memory on `device`, in `dtype` where that is not None.
    ValueError for missing and unexpected names and for shapes that differ; module is then unchanged.
    """
    weights = weights if isinstance(weights, Weights) else Weights.of(weights)
    own = module.state_dict()
    _check(type(module).__name__, weights.shapes, own, rules)
    places: dict[str, list[tuple[str, str]]] = {}               # published name -> (how it is stored, our key) of each part
    for key, published in published_names(own, rules).items():
        name, how = _place(published)
        places.setdefault(name, []).append((how, key))
    empty = any(tensor.is_meta for tensor in own.values())
    if empty:
        own = {key: torch.empty(t.shape, dtype=dtype or t.dtype, device=device) for key, t in own.items()}
    for name, tensor in weights.stream():
        for how, key in places[name]:
            own[key].copy_(_inwards(tensor, how))
    if empty:
        module.load_state_dict(own, assign=True)


def _check(what: str, shapes: Mapping[str, Shape], own: Mapping[str, Tensor], rules: Rules) -> None:
    expected = published_shapes(own, rules)
    missing, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    if missing or extra:
        raise ValueError(f"the weights do not fit {what}: missing {_some(missing)}, unexpected {_some(extra)}. "
                         f"{_cause(expected, missing, extra)}")
    wrong = [f"{name} is {list(shapes[name])}, expected {list(shape)}"
             for name, shape in expected.items() if tuple(shapes[name]) != shape]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(expected)} tensors have another shape than {what}'s: {wrong[0]}. "
                         f"The config beside the weights is of another model or size")


# ---- how a published tensor is stored


def _place(published: str) -> tuple[str, str]:
    """'attn.in_proj_weight@1/3' -> ('attn.in_proj_weight', '1/3')."""
    name, _, how = published.partition("@")
    return name, how


def _outer_shape(shape: Iterable[int], how: str) -> Shape:
    shape = tuple(shape)
    if how == "T":
        return shape[::-1]
    if how == "1x1":
        return shape + (1, 1) if len(shape) == 2 else shape          # a bias stays as it is
    return (shape[0] * int(how.partition("/")[2]), *shape[1:]) if how else shape


def _inwards(tensor: Tensor, how: str) -> Tensor:
    if how == "T":
        return tensor.T
    if how == "1x1":
        return tensor.flatten(1) if tensor.dim() == 4 else tensor
    part, _, count = how.partition("/")
    return tensor.chunk(int(count))[int(part)] if how else tensor


def _outwards(parts: Mapping[str, Tensor]) -> Tensor:
    how, tensor = next(iter(parts.items()))
    if how == "T":
        return tensor.T
    if how == "1x1":
        return tensor[:, :, None, None] if tensor.dim() == 2 else tensor
    return torch.cat([parts[how] for how in sorted(parts)]) if how else tensor


# ---- what went wrong


def _some(names: Iterable[str]) -> str:
    """'12 (a, b, c, ...)'"""
    names = sorted(names)
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)}" + (f" ({first})" if names else "")


def _cause(expected: Iterable[str], missing: set[str], extra: set[str]) -> str:
    if any(name.startswith(("_orig_mod.", "module.")) for name in extra):
        return "Saved from a compiled or wrapped module? Save the raw module's state dict"
    if len(missing) == len(set(expected)):
        return "None of the names fits: the file is in another layout or holds another network"
    if missing and not extra:
        return "Is the file cut short, or one shard of several?"
    return "The config beside the weights is of another model or size"
