"""Folders that this library writes. Below a folder of pictures they are no data: a run that lies there would read its own sample grids."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable

from tinyldm.files import OUTPUT

# The names of files that a folder of each kind holds: a run (one that began long ago has no `launch`), a cache, a model, pictures
# that were drawn.
SIGNS = ({"config.json", "launch"}, {"config.json", "log.jsonl"}, {"settings.json", "claims"}, {"settings.json", "index.json"},
         {"model_index.json"}, {OUTPUT})
KNOWN = frozenset().union(*SIGNS)
REPORTED: set[str] = set()      # places for which this process has already printed that folders were passed over
NAME_IT = "was written by tinyldm: to read such a folder, name it itself with --data"


def is_output(names: Iterable[str]) -> bool:
    """Whether a folder that holds files of these names is one that this library has written."""
    found = set(names)
    return any(signs <= found for signs in SIGNS)


def outputs(names: Iterable[str]) -> set[str]:
    """The outermost folders, among those of the files with these names relative to some folder, that this library has written: never
    the folder itself, which was named on purpose."""
    inside: dict[str, set[str]] = {}
    for name in names:
        if (base := posixpath.basename(name)) in KNOWN:
            inside.setdefault(posixpath.dirname(name), set()).add(base)
    written = {folder for folder, found in inside.items() if folder and is_output(found)}
    return {folder for folder in written if not below(posixpath.dirname(folder), written)}


def below(name: str, folders: Collection[str]) -> bool:
    """Whether a file or folder is one of the folders or lies in one, at any depth."""
    while name and name not in folders:
        name = posixpath.dirname(name)
    return name in folders


def report_passed_over(place: str, folders: Collection[str]) -> None:
    """Print how many folders of this library were passed over in a place that --data names; once, though it is listed several times."""
    if folders and place not in REPORTED:
        REPORTED.add(place)
        several = len(folders) > 1
        print(f"--data {place}: {len(folders)} folder{'s' * several} that tinyldm wrote {'were' if several else 'was'} passed over "
              f"(first: {min(folders)})")
