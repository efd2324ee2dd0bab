"""Checks what a user typed or a file says: names, of which the nearest is suggested for a misspelt one, and types of values."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
# What people type for a precision and for a device, in either case -> the library's own name, which config.json holds.
DTYPE_NAMES = {"auto": "auto", "bf16": "bf16", "bfloat16": "bf16", "fp32": "fp32", "float32": "fp32", "fp16": "fp16", "float16": "fp16",
          "half": "fp16"}
# The types that are checked, in words. A type hint that is not made of these is not checked.
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "None", list: "a list", dict: "a table"}
DEVICES = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "mps": "mps"}


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a ValueError that names the nearest entry and all known ones."""
    if name in tuple(table):                                        # a file may name a list, which no dict can look up
        return table[name]
    raise ValueError(f"unknown {what} '{name}': {nearest(name, table)}known: {', '.join(table) or 'none'}")


def nearest(name: str, known: Iterable[str]) -> str:
    """"did you mean 'euler'? " for a misspelt name; "" where no known name is near."""
    spelled = {re.sub(r"[^a-z0-9]+", "_", str(other).lower()): other for other in known}   # AdamW is near to adamw, DDIM to ddim
    near = difflib.get_close_matches(re.sub(r"[^a-z0-9]+", "_", str(name).lower()), list(spelled), n=1)
    return f"did you mean '{spelled[near[0]]}'? " if near else ""


def dtype_name(typed: str, known: Iterable[str] = ("auto", "bf16", "fp32"), flag: str = "--dtype") -> str:
    """The library's name of a precision: "bfloat16" -> "bf16". ValueError for one that is not among the `known` ones (by default
    those of autocast: training in fp16 would need its losses scaled)."""
    return lookup({name: own for name, own in DTYPE_NAMES.items() if own in known}, typed.lower(), flag)


def device_name(typed: str) -> str:
    """The library's name of a device: "GPU" -> "cuda", "cuda:1" stays. ValueError for an unknown one."""
    kind, colon, number = typed.lower().partition(":")
    if colon and not number.isdecimal():
        raise ValueError(f"--device {typed}: after the colon comes the device's number, as in cuda:1")
    return lookup(DEVICES, kind, "--device") + colon + number


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a type hint wants. A whole number is a number; 0 and 1 are false and true, but true is no number;
    a list is as good as a tuple. Every value fits a hint that is not known here."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if kind is Literal:
        return value in inner
    if kind in (tuple, list, Sequence):
        if not isinstance(value, (tuple, list)):
            return False
        if kind is tuple and inner and inner[-1] is not ...:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(item, inner[0]) for item in value) if inner else True
    if kind is bool:
        return isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1))
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (str, dict, NoneType) else True


def in_words(hint: Any) -> str:
    """What a type hint wants, as a person would say it: tuple[int, ...] -> "a whole number, or several separated by commas"."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(in_words, inner))
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind is tuple and inner and inner[-1] is not ...:
        return f"({', '.join(map(in_words, inner))})"
    if kind in (tuple, list, Sequence) and inner:
        return f"{in_words(inner[0])}, or several separated by commas"
    return TYPES.get(kind, str(hint))


def fit(value: Any, hint: Any, what: str) -> Any:
    """A value as its type hint wants it: a list becomes a tuple, and a single value a tuple of one where the hint is a tuple, so that
    `widths=8` is one level. ValueError, which begins with `what`, for a value that does not fit."""
    value = _frozen(value)
    if fits(value, hint):
        return value
    if fits((value,), hint):
        return (value,)
    point = f", written without a point: {int(value)}" if hint is int and isinstance(value, float) and value.is_integer() else ""
    raise ValueError(f"{what}={value} must be {in_words(hint)}{point}")


def type_of(default: Any, whole: type = int) -> Any:
    """The type hint of an option that has a default and no annotation. whole: what a default such as 1 stands for. In a table of options,
    which has no annotations, it is a whole number, and any number is 1.0; in the signature of a function, where a whole number can be
    annotated, it may be any number (float)."""
    return {bool: bool, int: whole, float: float, str: str}.get(type(default), Any)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def field_hints(kind: type) -> Mapping[str, Any]:
    """The type hints of a dataclass; {} where they name what cannot be found, as those of a class inside a function may."""
    try:
        return _type_hints(kind)
    except (NameError, TypeError, AttributeError, SyntaxError):
        return {}


@cache                              # evaluates every hint's text. An error is not remembered: what a hint names may be defined later
def _type_hints(kind: type) -> Mapping[str, Any]:
    return MappingProxyType(get_type_hints(kind))


def build_dataclass(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """A dataclass from a dict of its fields, each as its type hint wants it (`fit`). ValueError, which names `what` (a flag), for an
    unknown field (with the nearest name), one that is missing, and for values that do not fit."""
    known, hints = {field.name: field for field in dataclasses.fields(kind) if field.init}, field_hints(kind)
    for name in values:
        lookup(known, name, f"{what} field")
    if missing := [name for name, field in known.items() if name not in values and needs_value(field)]:
        raise ValueError(f"{what} needs {', '.join(f'{name}=VALUE' for name in missing)}")
    values = {name: fit(value, Any if value is known[name].default else hints.get(name, Any), f"{what} {name}")
              for name, value in values.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def needs_value(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def check_types(config: Any) -> None:
    """ValueError where a field of a dataclass that was made from a file holds a value of another type than its hint says."""
    hints = field_hints(type(config))
    for field in dataclasses.fields(config):
        if (value := getattr(config, field.name)) is not field.default and not fits(value, hint := hints.get(field.name, Any)):
            raise ValueError(f"{field.name}={value!r} must be {in_words(hint)}")


def check_counts(config: Any, *names: str, least: int = 1) -> None:
    """ValueError where one of these fields, a whole number or several, is less than `least`. (For a dataclass's __post_init__,
    which comes before the types of a file's values are checked.)"""
    for name in names:
        value = getattr(config, name)
        several = value if isinstance(value, tuple) else (value,)
        if not several or any(isinstance(item, Real) and item < least for item in several):
            raise ValueError(f"{name}={value} must be {f'{least} or more' if several else 'one number at least'}")
