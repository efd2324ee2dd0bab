"""Finds the parts of a model in a folder or file: by config.json where there is one, else by the names and shapes of the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tinyldm.files import INCOMPLETE, read_json
from tinyldm.folders import hub, needed
from tinyldm.folders.rename import recognise
from tinyldm.folders.save import weights_name
from tinyldm.folders.weights import Weights, find_weights, open_weights
from tinyldm.folders.weights import errors_about as about
from tinyldm.model import AUTOENCODERS, TEXT_ENCODERS, Architecture
from tinyldm.vendor_loaders import families
from tinyldm.vendor_loaders.families import Family, Text
from tinyldm.vendor_loaders.layout import Layout

ROWS = (*AUTOENCODERS.values(), *TEXT_ENCODERS.values())
UNTOLD = "a {} in this layout needs its config.json beside it"


class Found(NamedTuple):
    """A part that was found, and not loaded yet."""

    source: Path                # its weights file
    row: Architecture
    layout: Layout | None       # None: its config told everything
    config: Any                 # None: it follows from the weights
    weights: Weights            # without the prefix and what lies outside it, unless config is given


def in_folder(path: Path, rows: Iterable[Architecture], variant: str | None = None, must: bool = False, origin: str | None = None) -> Found:
    """The network in its own folder, of the class that config.json names, or else of the first of the rows.

    must: a missing variant is an error; otherwise the file without variant is read instead. origin: the hub id it came from."""
    row, config = config_in(path, rows, origin)
    weights = find_weights(path, row.stem, variant)
    if variant and weights is None:
        if must:
            raise ValueError(f"{path} has no raw weights ({weights_name(row, variant)}): leave out --no-ema (ema=True) for the "
                             "averaged ones")
        weights = find_weights(path, row.stem)
    weights = weights or path / weights_name(row, None)          # if there are none, the error names this file
    return Found(weights, row, None, config, open_weights(weights))


def config_in(path: Path, rows: Iterable[Architecture], origin: str | None = None) -> tuple[Architecture, Any]:
    """The row of the network in a folder and its config, as `in_folder` takes them."""
    rows = list(rows)
    file = next((path / name for name in needed.CONFIGS if (path / name).exists()), path / needed.CONFIGS[0])
    config = read_json(file, INCOMPLETE)
    names = [config.get("_class_name"), *(config.get("architectures") or []), config.get("model_type")]
    row = next((row for row in rows if any(name in row.classes for name in names)), rows[0])
    with about(path):
        return row, row.from_config(config | ({"_name_or_path": origin} if origin else {}))


def in_file(file: Path, rows: Iterable[Architecture] = ROWS) -> list[Found]:
    """All parts in a file, each with its layout; a config.json beside the file describes the only one. ValueError for a file in a layout
    that needs a config.json and has none."""
    weights, beside, found = open_weights(file), file.parent / "config.json", {}
    for row in rows:
        for layout in row.layouts.values():
            for match in filter(None, (re.fullmatch(layout.mark, name) for name in weights.shapes)):
                prefix = match[1]
                own = weights.renamed(lambda name, prefix=prefix: name.removeprefix(prefix) if name.startswith(prefix) else "")
                found.setdefault((row.folder, prefix), Found(file, row, layout, None, own))
    parts = list(found.values())
    if len(parts) == 1 and (parts[0].layout.infer is None or beside.exists()):
        what = "VAE" if parts[0].row.folder == "vae" else "text encoder"
        with about(file):
            return [parts[0]._replace(layout=None, config=parts[0].row.from_config(read_json(beside, UNTOLD.format(what))))]
    return [part for part in parts if part.layout.infer]


def inside(file: Path, weights: Weights, family: Family) -> dict[str, Found]:
    """The parts beside the network in the file itself: "vae", and text encoders by their folder in a model folder."""
    places = {"vae": (families.VAE, AUTOENCODERS["kl"])} | {folder: (text.prefix, row_of(text)) for folder, text in family.encoders.items()}
    found = {}
    for part, (prefix, row) in places.items():
        there = weights.renamed(lambda name, prefix=prefix: name if name.startswith(prefix) else "")  # not another part in this layout
        if there.shapes:
            with about(file):
                layout, own = recognise(there, {name: layout for name, layout in row.layouts.items() if layout.infer})
            found[part] = Found(file, row, layout, None, own)
    return found


def row_of(text: Text) -> Architecture:
    """The table row of a family's text encoder."""
    return next(row for row in TEXT_ENCODERS.values() if row.config is text.config)


def told(part: Found) -> Any:
    """The config of a part, as far as its weights tell it."""
    with about(part.source):
        return part.config or part.layout.config_of(part.weights.shapes)


def in_source(source: str | Path) -> list[Found]:
    """VAE and text encoders in a file, in the folder of one, or in a model folder; a hub id stands for the folder. ValueError where
    there are none."""
    path = hub.locate(source, lambda names: needed.of_model(names) or next(filter(None, (needed.of_part(names, [row]) for row in ROWS)), []))
    if path.is_file():
        found = in_file(path)
    elif (path / "config.json").exists():
        found = [in_folder(path, ROWS)]
    else:
        found = [in_folder(folder, [row for row in ROWS if row.folder == kind]) for kind in ("vae", "text_encoder")
                 for folder in sorted(path.glob(f"{kind}*")) if (folder / "config.json").exists()]
    if not found:
        raise ValueError(f"{source} holds neither a VAE nor a text encoder that can be recognised")
    return found
