"""Folders that this library writes. Below a folder of pictures they are no data: a run that lies there would read its own sample grids."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

from tinyldm.files import OUTPUT

# The names of files that a folder of each kind holds: a run (one that began long ago has no `launch`), a cache, a model, pictures
# that were drawn.
SIGNS = ({"config.json", "launch"}, {"config.json", "log.jsonl"}, {"settings.json", "claims"}, {"settings.json", "index.json"},
         {"model_index.json"}, {OUTPUT})
KNOWN = frozenset().union(*SIGNS)


def is_output(names: Iterable[str]) -> bool:
    """Whether a folder that holds files of these names is one that this library has written."""
    found = set(names)
    return any(signs <= found for signs in SIGNS)


def outputs(names: Iterable[str]) -> set[str]:
    """The folders, among those of the files with these names relative to some folder, that this library has written: never the
    folder itself, which was named on purpose."""
    inside: dict[str, set[str]] = {}
    for name in names:
        if (base := posixpath.basename(name)) in KNOWN:
            inside.setdefault(posixpath.dirname(name), set()).add(base)
    return {folder for folder, found in inside.items() if folder and is_output(found)}
