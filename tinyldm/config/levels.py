"""What follows from a U-Net's widths: how many levels it has, and so how many numbers other fields need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = 64                               # channels of an attention head, where nothing else is known


def with_levels(typed: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The typed fields of a U-Net, completed where its widths change and what belongs to its levels was not typed: heads keep their
    number of channels, and levels beyond those of before have attention where the last one has.

        widths=64,128,256 over tiny's widths=64,128 heads=2,4 attention=True,True -> heads=2,4,8 attention=True,True,True

    before: the fields that the typed ones are laid over."""
    result, widths, old = dict(typed), levels(typed.get("widths")), levels(before.get("widths"))
    if not widths or widths == old:                     # none, or words that are refused elsewhere
        return result
    if "heads" not in result:
        heads = levels(before.get("heads"))
        head = max(1, old[0] // heads[0]) if old and heads else HEAD
        result["heads"] = tuple(next(n for n in range(max(1, width // head), 0, -1) if width % n == 0) for width in widths)
    if "attention" not in result:
        known = before.get("attention") or (True,)
        known = tuple(known) if isinstance(known, (list, tuple)) else (known,)
        result["attention"] = (known + known[-1:] * len(widths))[:len(widths)]
    if "transformer_layers" not in result and before.get("transformer_layers"):
        layers = tuple(before["transformer_layers"])
        result["transformer_layers"] = (layers + layers[-1:] * len(widths))[:len(widths)]
    return result


def levels(value: Any) -> tuple[int, ...]:
    """One positive number for each level; () for anything else."""
    value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return value if all(type(each) is int and each > 0 for each in value) else ()
