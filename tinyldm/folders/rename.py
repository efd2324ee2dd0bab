"""Renames our state-dict keys to those of a published layout, and back.

A table is `list[(regex, replacement)]`, applied in order with re.sub to *our* key. Our keys are known from
the module, so each is renamed once and the resulting dict reads in both directions: there is no second,
inverse table. Loading is strict: a published tensor that is not used, or one of ours that is not loaded, is an error.

Where a published tensor is stored differently from ours, a suffix of its name in the table says how:

    name@1/3    ours is the second of three equal parts along the first axis (open_clip fuses q, k and v)
    name@3-6/7  ours is the fourth to the seventh of seven equal parts (FLUX fuses q, k and v with the four times as wide MLP)
    name@swap   the two halves of the first axis are swapped (Stability's last modulation: shift, scale; diffusers': scale, shift)
    name@T      stored transposed
    name@1x1    a matrix stored as a 1x1 convolution
    name@1,1,   stored with two more axes of length 1 in front; name@1, with one

Each form is a row of FORMS.

A `Layout` is such a table, and the way to recognise the files that it is for: by a tensor name that only they contain, never by
the file's own name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinyldm.folders.weights import MAPPED, Weights
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
    return {name: parts[0].form.outer_shape(tuple(state_dict[parts[0].key].shape), parts[0].how)
            for name, parts in places(state_dict, rules).items()}


def export_renamed(state_dict: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """A state dict (a module's, or an EMA's) under published names: contiguous CPU tensors, ready for safetensors."""
    tensors = {}
    for name, parts in places(state_dict, rules).items():
        stored = [part.form.outwards(state_dict[part.key].detach().cpu(), part.how) for part in parts]
        tensors[name] = (torch.cat(stored) if len(stored) > 1 else stored[0]).contiguous()
    return tensors


def read_renamed(published: str, read: Callable[[str], Tensor]) -> Tensor:
    """One of our tensors, by its name in published_names; `read` reads the published tensor of a name."""
    name, form, how = _form(published)
    return form.inwards(read(name), how)


@torch.no_grad()
def load_renamed(module: nn.Module, weights: Weights | Mapping[str, Tensor], rules: Rules,
                 device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
    """Copy published tensors into module, one at a time, in the dtype that module has. (See mapped_weights, too.)

    A module on the meta device is given memory on `device`, in `dtype` where that is not None. Where `device` is the meta device, too,
    no tensor is read.
    ValueError for missing and unexpected names and for shapes that differ; module is then unchanged.
    """
    weights = weights if isinstance(weights, Weights) else Weights.of(weights)
    own = module.state_dict()
    _check(type(module).__name__, weights.shapes, own, rules)
    stored = places(own, rules)
    empty = any(tensor.is_meta for tensor in own.values())
    if empty:
        own = {key: torch.empty(t.shape, dtype=dtype or t.dtype, device=device) for key, t in own.items()}
    mapped = empty and MAPPED.get() and torch.device(device).type == "cpu"
    for name, tensor in weights.stream() if torch.device(device).type != "meta" else ():
        for part in stored[name]:
            found = part.form.inwards(tensor, part.how)
            if mapped and found.dtype == own[part.key].dtype and found.is_contiguous():
                own[part.key] = found
            else:
                own[part.key].copy_(found)
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


class Form(NamedTuple):
    """A form in which tensors are stored. Each function takes the match of the suffix as its second argument."""

    outer_shape: Callable[[Shape, re.Match], Shape]             # our shape -> that of the stored tensor
    inwards: Callable[[Tensor, re.Match], Tensor]               # the stored tensor -> ours
    outwards: Callable[[Tensor, re.Match], Tensor]              # ours -> the stored tensor, or our part of it


def _span(how: re.Match) -> tuple[int, int, int]:
    """'3-6/7' -> (3, 7, 7), '1/3' -> (1, 2, 3): the first part, the one after the last, and the number of parts."""
    return int(how[1]), int(how[2] or how[1]) + 1, int(how[3])


def _fused_shape(shape: Shape, how: re.Match) -> Shape:
    start, stop, count = _span(how)
    return (shape[0] * count // (stop - start), *shape[1:])


def _part(tensor: Tensor, how: re.Match) -> Tensor:
    start, stop, count = _span(how)
    return tensor[tensor.shape[0] * start // count : tensor.shape[0] * stop // count]


SWAP = lambda tensor, how: tensor.roll(tensor.shape[0] // 2, 0)

FORMS = {                                                       # keyed by the regex of the suffix
    r"": Form(lambda shape, how: shape, lambda tensor, how: tensor, lambda tensor, how: tensor),
    r"(\d+)(?:-(\d+))?/(\d+)": Form(_fused_shape, _part, lambda tensor, how: tensor),
    r"swap": Form(lambda shape, how: shape, SWAP, SWAP),
    r"T": Form(lambda shape, how: shape[::-1], lambda tensor, how: tensor.T, lambda tensor, how: tensor.T),
    r"1x1": Form(lambda shape, how: shape + (1, 1) if len(shape) == 2 else shape,           # a bias stays as it is
                 lambda tensor, how: tensor.flatten(1) if tensor.dim() == 4 else tensor,
                 lambda tensor, how: tensor[:, :, None, None] if tensor.dim() == 2 else tensor),
    r"(?:1,)+": Form(lambda shape, how: (1,) * how[0].count(",") + shape, lambda tensor, how: tensor.flatten(0, how[0].count(",")),
                     lambda tensor, how: tensor[(None,) * how[0].count(",")]),
}


def _form(published: str) -> tuple[str, Form, re.Match]:
    """'attn.qkv.weight@1/3' -> 'attn.qkv.weight', the form of parts, and the match of '1/3'."""
    name, _, suffix = published.partition("@")
    for pattern, form in FORMS.items():
        if how := re.fullmatch(pattern, suffix):
            return name, form, how
    raise ValueError(f"the rename rules store a tensor as {published}: there is no form @{suffix}")


class Place(NamedTuple):
    """Where one of our tensors is found in a published one."""

    key: str                                                    # ours
    form: Form
    how: re.Match                                               # of the form's suffix


def places(ours: Iterable[str], rules: Rules) -> dict[str, list[Place]]:
    """Published name -> what of ours it holds, in the order of the parts. ValueError for rules that leave a part to nobody."""
    found: dict[str, list[Place]] = {}
    for key, published in published_names(ours, rules).items():
        name, form, how = _form(published)
        found.setdefault(name, []).append(Place(key, form, how))
    for name, parts in found.items():
        if parts[0].how.re.groups:                              # a fused tensor
            parts.sort(key=lambda part: _span(part.how))
            spans = [_span(part.how) for part in parts]
            if [0, *(stop for _, stop, _ in spans)] != [*(start for start, _, _ in spans), spans[-1][2]]:
                raise ValueError(f"the rename rules use the parts {', '.join(part.how[0] for part in parts)} of {name}: each part "
                                 f"must be used once")
    return found


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
