"""Looks up names that a user typed, and suggests the nearest one for a misspelt name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a ValueError that names the nearest entry and all known ones."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {what} '{name}': {nearest(name, table)}known: {', '.join(table) or 'none'}")


def nearest(name: str, known: Iterable[str]) -> str:
    """"did you mean 'euler'? " for a misspelt name; "" where no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean '{near[0]}'? " if near else ""


def build_dataclass(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """A dataclass from a dict of its fields; lists become tuples. ValueError, with the nearest name, for an unknown field."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        lookup(known, name, f"{what} field")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
