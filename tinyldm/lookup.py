"""Looks up names that a user typed, and suggests the nearest one for a misspelt name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
# What people type for a precision and for a device, in either case -> the library's own name, which config.json holds.
DTYPES = {"auto": "auto", "bf16": "bf16", "bfloat16": "bf16", "fp32": "fp32", "float32": "fp32", "fp16": "fp16", "float16": "fp16",
          "half": "fp16"}
DEVICES = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "mps": "mps"}


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a ValueError that names the nearest entry and all known ones."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {what} '{name}': {nearest(name, table)}known: {', '.join(table) or 'none'}")


def nearest(name: str, known: Iterable[str]) -> str:
    """"did you mean 'euler'? " for a misspelt name; "" where no known name is near."""
    spelled = {re.sub(r"[^a-z0-9]+", "_", str(other).lower()): other for other in known}   # AdamW is near to adamw, DDIM to ddim
    near = difflib.get_close_matches(re.sub(r"[^a-z0-9]+", "_", str(name).lower()), list(spelled), n=1)
    return f"did you mean '{spelled[near[0]]}'? " if near else ""


def dtype_name(typed: str, known: Iterable[str] = ("auto", "bf16", "fp32")) -> str:
    """The library's name of a precision: "bfloat16" -> "bf16". ValueError for one that is not among the `known` ones (by default
    those of autocast: training in fp16 would need its losses scaled)."""
    return lookup({name: own for name, own in DTYPES.items() if own in known}, typed.lower(), "--dtype")


def device_name(typed: str) -> str:
    """The library's name of a device: "GPU" -> "cuda", "cuda:1" stays. ValueError for an unknown one."""
    kind, colon, number = typed.lower().partition(":")
    if colon and not number.isdecimal():
        raise ValueError(f"--device {typed}: after the colon comes the device's number, as in cuda:1")
    return lookup(DEVICES, kind, "--device") + colon + number


def build_dataclass(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """A dataclass from a dict of its fields; lists become tuples. ValueError, with the nearest name, for an unknown field."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        lookup(known, name, f"{what} field")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
