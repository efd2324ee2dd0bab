"""The folder of a cache as a job begins to fill it: a new one, or one that was made with the same settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tinyldm.data.shard import read_facts
from tinyldm.files import write_file

NEWER = ("keep_pictures",)      # as SHAPING, but caches name them only where they are not 0, as older ones cannot


def check_folder(folder: Path) -> None:
    """ValueError for a folder that holds other files and no cache."""
    if folder.exists() and not (folder / "settings.json").exists():
        if others := {path.name.removeprefix(".writing-") for path in folder.iterdir()} - {"settings.json", "claims", "decoded.png"}:
            raise ValueError(f"{folder} holds other files ({', '.join(sorted(others)[:3])}) and no cache: name another folder")


def open_folder(folder: Path, settings: dict[str, Any], made_by: str, rebuild: bool) -> None:
    """Make the cache's folder, or check that an existing one was made with the same settings. ValueError that
    lists the differences; with `rebuild`, a cache with other settings is deleted instead, and so is, always, one without a single
    picture: what a command leaves that failed."""
    file = folder / "settings.json"
    found = read_settings(folder) if file.exists() and holds_work(folder) else {}
    wanted = dict.fromkeys(NEWER) | settings
    if found and (not rebuild or {name: found.get(name) for name in wanted} == wanted):
        check_settings(folder, found, wanted)                  # with `rebuild`: another process may have rebuilt it already
    else:
        (folder / "index.json").unlink(missing_ok=True)        # first of all, so that a half-deleted cache does not look finished
        if (folder / "shards").exists():
            shutil.rmtree(folder / "shards")
        (folder / "encode_batch_size").unlink(missing_ok=True)
        write_file(file, json.dumps(settings | {"vae_weights": made_by}, sort_keys=True, indent=1))
    (folder / "shards").mkdir(exist_ok=True)


def holds_work(folder: Path) -> bool:
    """Whether a cache is finished, holds a picture, or is being written."""
    shards = [*(folder / "shards").glob("*")]
    return (folder / "index.json").exists() or any(shard.name.startswith(".") or read_facts(shard).get("kept") for shard in shards)


def read_settings(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'settings.json'} is damaged ({error}): delete {folder} and prepare it again") from error


def check_settings(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError, which lists the differences, unless all settings in `wanted` have the same values in `found`."""
    def short(value: Any) -> str:
        return value[:8] if isinstance(value, str) and len(value) == 64 else json.dumps(value)

    if differences := [f"{name} {short(found.get(name))} in the cache, {short(value)} in this run" for name, value in wanted.items()
                       if found.get(name) != value]:
        raise ValueError(f"the latents in {folder} were made with other settings ({'; '.join(differences)}): "
                         "use the same, name another folder, or make them anew with prepare.py --rebuild")
