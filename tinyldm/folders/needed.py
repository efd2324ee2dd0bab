"""Selects the files of a hub repository to download. Each function gets all file names; [] means that the repository does not
hold what is asked for. tokenizer_config.json is asked for even where it is not among the names: of an incomplete cache it may have
been lost, and without it the same captions would get other ids."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tinyldm.folders.weights import choose
from tinyldm.model import AUTOENCODERS, NETWORKS, TEXT_ENCODERS, Architecture

CONFIGS = ("config.json", "open_clip_config.json")
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model")
TOKENIZER = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
INDEX = r"(?P<stem>[a-z_]+)(\.(?P<before>\w+))?\.(?P<kind>safetensors|bin)\.index(\.(?P<after>\w+))?\.json"


def of_index(names: set[str]) -> list[str]:
    """Of a whole model: the files that describe the others."""
    return sorted(names & {"model_index.json", "tinyldm.json"}) if "model_index.json" in names else []


def of_model(names: set[str], variant: str | None = None, weights: bool = True) -> list[str]:
    """Of a whole model: every part, and the files that describe them; without weights only these."""
    if "model_index.json" not in names:
        return []
    kinds = {row.folder: row for row in (*NETWORKS.values(), *AUTOENCODERS.values(), *TEXT_ENCODERS.values())}
    numbered = {f"{folder}_{i}": row for folder, row in kinds.items() for i in (2, 3)}         # text_encoder_2 and so on
    parts = [of_folder(names, folder, row, variant) for folder, row in (kinds | numbered).items() if f"{folder}/config.json" in names]
    tokenizers = {name.split("/")[0] + "/" for name in names if re.match(r"tokenizer(_\d)?/", name)}
    return ["model_index.json", *(names & {"tinyldm.json", "scheduler/scheduler_config.json"}),
            *(name for folder in sorted(tokenizers) for name in _of_tokenizer(names, folder)),
            *(name for part in parts for name in part if weights or name.endswith(CONFIGS))]


def of_part(names: set[str], rows: Iterable[Architecture], variant: str | None = None) -> list[str]:
    """Of one part: its config and weights, from its folder in a model's repository or from a repository of its own.

    rows: the architectures that the part may have; all have the same folder and the same name of the weights file."""
    row = next(iter(rows))
    return of_folder(names, row.folder if f"{row.folder}/config.json" in names else "", row, variant)


def of_texts(names: set[str]) -> list[str]:
    """Of the text encoders: all of a whole model with their tokenizers, or the one in a repository of its own."""
    if "model_index.json" not in names:
        return of_part(names, TEXT_ENCODERS.values()) or of_tokenizer(names)
    return [name for name in of_model(names) if re.match(r"(model_index|tinyldm)\.json|(text_encoder|tokenizer)(_\d)?/", name)]


def of_folder(names: set[str], folder: str, row: Architecture, variant: str | None = None) -> list[str]:
    """Config and weights in one folder of a repository; "" is its root. [] where there are no weights."""
    return of_weights(names, folder, row.stem, variant)


def of_weights(names: set[str], folder: str, stem: str, variant: str | None = None) -> list[str]:
    """The same of weights files of this stem."""
    start = f"{folder}/" if folder else ""
    inside = {name.removeprefix(start) for name in names if name.startswith(start)}
    weights = choose(inside, stem, variant) or choose(inside, stem)
    if weights is None:
        return []
    return [start + name for name in (*(set(CONFIGS) & inside), weights, *_shards(weights, inside))]


def of_tokenizer(names: set[str]) -> list[str]:
    return _of_tokenizer(names, "tokenizer/" if "tokenizer/tokenizer_config.json" in names else "")


def _of_tokenizer(names: set[str], folder: str) -> list[str]:
    found = names & {folder + name for name in TOKENIZER}
    return sorted(found | {folder + "tokenizer_config.json"}) if found else []


def _shards(weights: str, names: set[str]) -> list[str]:
    """The shards of an index file: those with its stem, kind and variant. [] for a file that is no index."""
    if (index := re.fullmatch(INDEX, weights)) is None:
        return []
    variant = index["before"] or index["after"]
    dotted = rf"\.{variant}" if variant else ""
    number = r"-\d+-of-\d+"
    pattern = rf"{index['stem']}({dotted}{number}|{number}{dotted})\.{index['kind']}"
    return sorted(name for name in names if re.fullmatch(pattern, name))
