"""The local file system, on which find and glob also go into linked folders.

fsspec's own passes over links to folders without a word. Here a link has the information of its target, and `find` reads every folder
once: a folder within the tree under its own name, others under the first link that leads there. A link that leads back to a folder
which holds it is a circle, and is not followed. `glob` reads every folder at most once for each part of the pattern, however many
paths lead there: between folders that link to each other, the number of paths grows with the factorial of the number of folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from glob import has_magic

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate


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

    def walk(self, path, maxdepth=None, topdown=True, on_error="omit", detail=False, **kwargs):
        """As fsspec's, with detail and from the top down, but through links too: folders in the tree first, then linked ones.

        path: a folder, or a list of several, in all of which every folder is read once.
        """
        read: set[str] = set()                              # real paths
        links = [(top, maxdepth, ()) for top in (path if isinstance(path, list) else [self._strip_protocol(path)])]
        while links:
            top, depth, above = links.pop(0)                # above: the real paths of the folders that hold the links taken so far
            folders = [(top, depth)]
            while folders:
                folder, depth = folders.pop()
                real = os.path.realpath(folder)
                if real in read:
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

    def glob(self, path, maxdepth=None, detail=False, **kwargs):
        """As fsspec's, for patterns without maxdepth, with {path: information}, and each thing that matches once: without the names
        that it has through other links, and without linked folders that lie in another folder that matches."""
        parts = self._strip_protocol(path).split("/")
        magic = next((i for i, part in enumerate(parts) if has_magic(part)), len(parts))
        root = "/".join(parts[:magic]) or "/"
        found = [self.info(root)] if self.exists(root) else []
        for i, part in enumerate(parts[magic:], magic + 1):
            folders = [info["name"] for info in once(found) if info["type"] == "directory"]
            if part == "**":                                # any number of folders; at the end of the pattern, the files in them too
                walked = list(self.walk(folders))
                found = [self.info(folder) for folder, _, _ in walked]
                found += [info for _, _, files in walked for info in files.values() if i == len(parts)]
            else:
                matches = re.compile(glob_translate(part)).match
                found = [info for folder, dirs, files in self.walk(folders, maxdepth=1) for name, info in (dirs | files).items()
                         if matches(name) and not (name in dirs and holds(os.path.realpath(info["name"]), os.path.realpath(folder)))]
        found = once(found)
        folders = [os.path.realpath(info["name"]) for info in found if info["type"] == "directory"]
        inside = lambda real: any(holds(folder, real) for folder in folders if folder != real)
        return {info["name"]: info for info in found
                if not (info["type"] == "directory" and info["islink"] and inside(os.path.realpath(info["name"])))}


def holds(outer: str, inner: str) -> bool:
    """Whether the folder `inner` is `outer` or lies within it. Both are real paths."""
    return (inner + os.sep).startswith(os.path.join(outer, ""))


def once(infos: Iterable[dict]) -> list[dict]:
    """The files among these, and each folder once, under the most direct of its names."""
    real = lambda info: os.path.realpath(info["name"]) if info["type"] == "directory" else info["name"]
    kept: dict[str, dict] = {}
    for info in sorted(infos, key=lambda info: (real(info) != info["name"], info["islink"], info["name"])):
        kept.setdefault(real(info), info)
    return list(kept.values())
