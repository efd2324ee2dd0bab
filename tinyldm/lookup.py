"""Names a person typed, looked up in the tables that know them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a ValueError that names the nearest entry and all known ones."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {what} '{name}': {nearest(name, table)}known: {', '.join(table)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """"did you mean 'euler'? " for a near miss, "" where nothing is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean '{near[0]}'? " if near else ""
