"""The local file system, on which find and glob also go into linked folders.

fsspec's own passes over links to folders without a word. Here a link has the information of its target, and `find` reads every folder
once: a folder within the tree under its own name, others under the first link that leads there. A link that leads back to a folder
which holds it is a circle, and is not followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from fsspec.implementations.local import LocalFileSystem


class LinkedFileSystem(LocalFileSystem):
    """fsspec's local file system, with links followed."""

    def info(self, path, **kwargs) -> dict:
        """Of a link, the information of its target; where the target is missing, it is a file of 0 bytes, which cannot be opened."""
        if not isinstance(path, os.DirEntry) or not path.is_symlink():
            return super().info(path, **kwargs)
        try:
            return super().info(path.path, **kwargs)
        except PermissionError:
            raise
        except OSError:
            return super().info(path, **kwargs) | {"type": "file"}

    def walk(self, path, maxdepth=None, topdown=True, on_error="omit", detail=False, once=True, **kwargs):
        """As fsspec's, with detail and from the top down, but through links too: folders in the tree first, then linked ones.

        once: whether a folder that several links lead to is read only through the first; otherwise, only circles are left out.
        """
        read: set[str] = set()                              # real paths
        links = [(self._strip_protocol(path), maxdepth, ())]
        while links:
            top, depth, above = links.pop(0)                # above: the real paths of the folders that hold the links taken so far
            folders = [(top, depth)]
            while folders:
                folder, depth = folders.pop()
                real = os.path.realpath(folder)
                if once and real in read:
                    continue
                read.add(real)
                try:
                    listing = {os.path.basename(info["name"]): info for info in self.ls(folder, detail=True)}
                except OSError:
                    if on_error == "raise":
                        raise
                    continue
                dirs = {name: info for name, info in sorted(listing.items()) if info["type"] == "directory"}
                yield folder, dirs, {name: info for name, info in listing.items() if name not in dirs}
                if depth is None or depth > 1:
                    below = depth and depth - 1
                    folders += [(info["name"], below) for info in reversed(dirs.values()) if not info["islink"]]
                    links += [(info["name"], below, (*above, real)) for info in dirs.values() if info["islink"]
                              and not any(holds(os.path.realpath(info["name"]), inner) for inner in (*above, real))]


def holds(outer: str, inner: str) -> bool:
    """Whether the folder `inner` is `outer` or lies within it. Both are real paths."""
    return (inner + os.sep).startswith(os.path.join(outer, ""))


def without_repeats(infos: Iterable[dict]) -> list[dict]:
    """What a glob has found, in its order, without what it has found a second time through a link to a folder."""
    infos = list(infos)

    def real(info: dict) -> str:            # a link to a file counts as a file of its own
        folder, base = os.path.split(info["name"])
        return os.path.realpath(info["name"]) if info["type"] == "directory" else os.path.join(os.path.realpath(folder), base)

    kept: dict[str, dict] = {}
    for info in sorted(infos, key=lambda info: (real(info) != info["name"], os.path.islink(info["name"]), info["name"])):
        inside = info["type"] == "directory" and os.path.islink(info["name"]) and any(
            holds(path, real(info)) for path, other in kept.items() if other["type"] == "directory")
        if not inside:
            kept.setdefault(real(info), info)
    names = {info["name"] for info in kept.values()}
    return [info for info in infos if info["name"] in names]
