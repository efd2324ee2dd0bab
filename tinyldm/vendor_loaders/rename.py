"""Names: our state-dict keys to those of a published layout, and back.

A table is `list[(regex, replacement)]`, applied in order with re.sub to *our* key. Our keys are known from
the module, so each is renamed once and the resulting dict reads in both directions: there is no second,
inverse table. Loading is strict; a tensor that finds no place, or a place that finds no tensor, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Rules = list[tuple[str, str]]


def published_names(ours: Iterable[str], rules: Rules) -> dict[str, str]:
    """Our key -> published key. ValueError where two of ours would share one published name."""
    names, taken = {}, {}
    for key in ours:
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in taken:
            raise ValueError(f"rename rules give {key} and {taken[name]} the same name {name}: make a pattern stricter")
        names[key], taken[name] = name, key
    return names


def export_renamed(state_dict: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """A state dict (a module's, or an EMA's) under published names: contiguous CPU tensors, ready for safetensors."""
    names = published_names(state_dict, rules)
    return {names[key]: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}


@torch.no_grad()
def load_renamed(module: nn.Module, tensors: Mapping[str, Tensor], rules: Rules) -> None:
    """Copy published tensors into module, in the dtype that module has. One on the meta device comes to the CPU.

    ValueError for missing and unexpected names and for shapes that differ; module is then unchanged.
    """
    own = module.state_dict()
    names = published_names(own, rules)
    missing, extra = names.values() - tensors.keys(), tensors.keys() - set(names.values())
    if missing or extra:
        raise ValueError(f"the weights do not fit {type(module).__name__}: {_some('missing', missing)}, "
                         f"{_some('unexpected', extra)}. {_cause(names.values(), missing, extra)}")
    wrong = [f"{name} is {list(tensors[name].shape)}, expected {list(own[key].shape)}"
             for key, name in names.items() if tensors[name].shape != own[key].shape]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(names)} tensors have another shape than {type(module).__name__}'s: "
                         f"{wrong[0]}. The config beside the weights is of another model or size")
    if any(tensor.is_meta for tensor in own.values()):
        # Copies: safetensors' tensors lie in the mapped file, at any alignment.
        copies = {key: tensors[name].to(own[key].dtype, copy=True) for key, name in names.items()}
        module.load_state_dict(copies, assign=True)
    else:
        module.load_state_dict({key: tensors[name] for key, name in names.items()})


def _some(what: str, names: Iterable[str]) -> str:
    """'missing 12 (a, b, c, ...)'"""
    names = sorted(names)
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{what} {len(names)}" + (f" ({first})" if names else "")


def _cause(expected: Iterable[str], missing: set[str], extra: set[str]) -> str:
    if any(name.startswith(("_orig_mod.", "module.")) for name in extra):
        return "Saved from a compiled or wrapped module? Save the raw module's state dict"
    if len(missing) == len(set(expected)):
        return "None of the names fits: the file is in another layout or holds another network"
    if missing and not extra:
        return "Is the file cut short, or one shard of several?"
    return "The config beside the weights is of another model or size"
