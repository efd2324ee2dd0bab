"""Names of sources as they may leave this machine, in published models, pictures and tracking services: without the folders around
them, which tell who works where on what, and without passwords and keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyldm.config import PATHS
from tinyldm.folders.hub import is_hub_id

PRIVATE = (*PATHS, "out", "directory")          # names in config.json whose values may be paths or URLs


def portable(source: str) -> str:
    """A path, a hub id or a URL: of a path its last part, of a URL all but its user, password and query."""
    return source if is_hub_id(source) else portable_data(source)


def portable_data(word: str) -> str:
    """The same of a word of --data with its weight. It is no hub id: acme/cats is a folder, also on a machine that has none of that
    name."""
    return "::".join(map(_portable_link, word.split("::")))     # fsspec's chains of links: zip://*.png::https://host/file.zip


def _portable_link(link: str) -> str:
    protocol, colon, rest = link.partition("://")
    if not colon or protocol in ("file", "local"):
        return re.split(r"[/\\]", re.sub(r"[/\\]+(?=(:[\d.]+)?$)", "", link))[-1]        # a weight may follow the last slash
    host, slash, path = rest.partition("/")
    public = host.rpartition("@")[2] + slash + path
    return f"{protocol}://" + re.sub(r"[?#].*?(?=(:[\d.]+)?$)", "", public)        # up to a weight


def portable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as in config.json, with portable names in place of paths and URLs."""
    def of(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [of(name, part) for part in value]
        return (portable_data if name == "data" else portable)(value) if isinstance(value, str) and value else value

    return {name: of(name, value) if name in PRIVATE else value for name, value in settings.items()}


def trained_here(source: Path | str) -> bool:
    """Whether the source is RUN/checkpoints/step-001000/model, a run's own."""
    step = Path(source).resolve().parent
    return (step / "state.json").exists() and (step.parent.parent / "config.json").exists()


def model_name(source: Path | str) -> str:
    """The name of a model, for people: a hub id, the name of a folder or file, or those of a run and its checkpoint."""
    step = Path(source).resolve().parent
    return f"{step.parent.parent.name} {step.name}" if trained_here(source) else portable(str(source))
