"""Finds finished work on a shard again when the shard's files have another path: moved, copied, or on another mount point.

A shard's name and stamp tell where its files are and when they changed, which a listing shows at no cost. Only for a shard that is not
in the cache by these are the files read, all of them, and hashed, which takes a fraction of the time of encoding. Less would not
do: the copy of a shard in which one caption was corrected can agree in name, size, and its first and last megabytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tinyldm.data.readers import Entry, File
from tinyldm.data.shard import check_shard, read_facts
from tinyldm.data.source_kind import Shard
from tinyldm.files import link, sha256
from tinyldm.unicode import read_lines


def hash_entries(entries: Sequence[Entry]) -> str:
    """A hash of the samples that a listing of local files stands for: their keys, their rows of metadata, and the contents of their
    files. OSError where one cannot be read."""
    digest = hashlib.sha256()
    for entry in entries:
        parts = {"picture": entry.picture, **entry.fields}
        hashed = {name: sha256(Path(part.path)) if isinstance(part, File) else part for name, part in parts.items()}
        digest.update(json.dumps([entry.key, entry.reason, entry.detail, hashed]).encode() + b"\n")
    return digest.hexdigest()


def content_of(shard: Shard) -> str:
    """The hash of a shard's contents; "" where it is not known without fetching them, or where they cannot be read."""
    try:
        return shard.content() if shard.content else ""
    except OSError:                                             # the shard's reader reports it
        return ""


def by_content(cache: Path, settings: str) -> dict[str, Path]:
    """{hash of the contents: folder} of all finished shards that were made with these settings (given as a digest)."""
    found = {}
    for file in (cache / "shards").glob("[!.]*/shard.json"):
        facts = read_facts(file.parent)
        if facts.get("content") and facts.get("settings") == settings:
            found[facts["content"]] = file.parent
    return found


def reuse(finished: Path, shard: Shard, folder: Path) -> bool:
    """Make the folder of a shard from a finished one of the same contents -> whether that was possible.

    Files are linked where the disk can do that: the finished one stays as it is, in case a run is reading it, and takes no room twice.
    """
    try:
        check_shard(finished)
        folder.mkdir()
        for file in finished.iterdir():
            if file.name == "shard.json":
                facts = json.loads(file.read_text(encoding="utf-8")) | {"name": shard.name, "url": shard.url, "stamp": shard.stamp}
                (folder / file.name).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")
            elif file.name == "skipped.jsonl":
                rows = [json.loads(line) | {"shard": shard.name} for line in read_lines(file) if line]
                (folder / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            else:
                link(file, folder / file.name)
    except (OSError, ValueError):                               # incomplete, or just being replaced by another process
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True
