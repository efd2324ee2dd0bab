"""Which files of a hub repository are needed: all file names -> those to download, [] where it is of another kind."""

from __future__ import annotations

import re

from torch import nn

from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT
from tinyldm.models.unet import UNet
from tinyldm.models.vae import AutoencoderKL
from tinyldm.vendor_loaders.kinds import KINDS
from tinyldm.vendor_loaders.weights import choose

CONFIGS = ("config.json", "open_clip_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
INDEX = r"(?P<stem>[a-z_]+)(\.(?P<before>\w+))?\.(?P<kind>safetensors|bin)\.index(\.(?P<after>\w+))?\.json"


def of_index(names: set[str]) -> list[str]:
    """Of a model, the one file that says what the others are."""
    return sorted(names & {"model_index.json"})


def of_model(names: set[str], variant: str | None = None) -> list[str]:
    """Of a whole model: every part, and what describes them."""
    if "model_index.json" not in names:
        return []
    networks = (UNet if "unet/config.json" in names else DiT, AutoencoderKL, CLIPText)
    parts = [of_part(names, network, variant) for network in networks]
    return ["model_index.json", *(names & {"tinyldm.json", "scheduler/scheduler_config.json"}), *of_tokenizer(names),
            *(name for part in parts for name in part)]


def of_part(names: set[str], network: type[nn.Module], variant: str | None = None) -> list[str]:
    """A part's config and weights, from its folder in a model's repository or from a repository of its own."""
    kind = KINDS[network]
    folder = f"{kind.folder}/" if f"{kind.folder}/config.json" in names else ""
    inside = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    weights = choose(inside, kind.stem, variant) or choose(inside, kind.stem)
    if weights is None:
        return []
    return [folder + name for name in (*(set(CONFIGS) & inside), weights, *_shards(weights, inside))]


def of_tokenizer(names: set[str]) -> list[str]:
    folder = "tokenizer/" if "tokenizer/tokenizer_config.json" in names else ""
    return sorted(names & {folder + name for name in TOKENIZER})


def _shards(weights: str, names: set[str]) -> list[str]:
    """The shards of an index: of its stem, kind and variant; none for a whole file."""
    if (index := re.fullmatch(INDEX, weights)) is None:
        return []
    variant = index["before"] or index["after"]
    dotted = rf"\.{variant}" if variant else ""
    number = r"-\d+-of-\d+"
    pattern = rf"{index['stem']}({dotted}{number}|{number}{dotted})\.{index['kind']}"
    return sorted(name for name in names if re.fullmatch(pattern, name))
