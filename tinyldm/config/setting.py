"""How a setting of a run is defined: once, as a field of one of the groups, by `fixed` or by `free`. There is no third way."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def _setting(default: Any, text: str, kept: bool, flag: str, also: tuple[str, ...], clears: dict[str, Any] | None) -> Any:
    metadata = {"help": text, "kept": kept, "flag": flag, "also": also, "clears": clears or {}}
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def fixed(default: Any, text: str, *, flag: str = "", also: tuple[str, ...] = (), clears: dict[str, Any] | None = None) -> Any:
    """A setting that a resumed run keeps.

    text     its line of --help
    flag     its name on the command line and in config.json, where that is not the field's
    also     older or other names, which are understood too
    clears   settings of a preset that this one, when it is typed, replaces: name -> value that means "none"
    """
    return _setting(default, text, True, flag, also, clears)


def free(default: Any, text: str, *, flag: str = "", also: tuple[str, ...] = (), clears: dict[str, Any] | None = None) -> Any:
    """A setting that a resumed run may change. Arguments as for `fixed`."""
    return _setting(default, text, False, flag, also, clears)
