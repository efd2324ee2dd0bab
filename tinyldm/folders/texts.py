"""The text encoders of a model, or a single one, for a network that is trained on their features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tinyldm.files import INCOMPLETE, read_json
from tinyldm.folders import hub, needed
from tinyldm.folders.load import load_defaults, load_part, load_text, load_text_encoders, load_tokenizer
from tinyldm.lookup import lookup
from tinyldm.model import TEXT_ENCODERS
from tinyldm.text.encoders import JOINS, TextEncoder, TextEncoders
from tinyldm.vendor_loaders import pipelines


def load_frozen(path: Path) -> nn.Module:
    return load_part(path, TEXT_ENCODERS.values(), "cpu", torch.float32)


def tokenizer_only(path: Path) -> Any:
    """In place of a text encoder, where only its tokenizer is needed."""
    return SimpleNamespace(config=None)


def load_texts(source: str | Path, join: str, lengths: Callable[[str], Sequence[int | None]],
               load: Callable[[Path], Any] = load_frozen) -> TextEncoders:
    """All text encoders of a model folder, joined by its own rule or by `join`, or a single one, from any source of load_text.

    join: "": the folder's own; "single": only the first. lengths: rule -> how many tokens each encoder reads, None: as its tokenizer
    says. load: a part's folder -> its network."""
    path = hub.locate(source, needed.of_texts) if join != "single" else source
    rule = join or join_in(Path(path))
    if rule != "single":
        wanted = pipelines.TEXT_FOLDERS[:len(lookup(JOINS, rule, "rule to join text encoders").calls)]
        if lacking := [folder for folder in wanted if not (Path(path) / folder).is_dir()]:
            raise ValueError(f"{path} has no {lacking[0]}/, and networks are trained on the features of all {len(wanted)} text encoders "
                             f"that --text-join {rule} joins: name a model folder with all of them, or one of them with --text-join single")
        return load_text_encoders(Path(path), rule, (), lengths(rule), load)
    module = tokenizer_only(path) if load is tokenizer_only else load_text(source)
    return TextEncoders([TextEncoder(module, load_tokenizer(source, getattr(module.config, "context_length", None)))], rule)


def join_in(path: Path) -> str:
    """The rule by which a model folder joins its text encoders; "single" for any other path."""
    if not (path / "model_index.json").is_file():
        return "single"
    name = str(read_json(path / "model_index.json", INCOMPLETE).get("_class_name"))
    name = pipelines.READ[name].written_as if name in pipelines.READ else name
    if name in pipelines.PIPELINES and name != pipelines.OWN:
        return pipelines.PIPELINES[name].join
    return load_defaults(path, must=False).get("text_join", "single")
