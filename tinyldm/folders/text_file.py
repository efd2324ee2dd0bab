"""A text encoder in one file, with what its tensors do not tell, and its tokenizer, which lies beside the file or at its publisher's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyldm.folders import hub, needed
from tinyldm.folders.build import load_network
from tinyldm.folders.parts import Found, in_file, inside, told
from tinyldm.folders.weights import Weights, errors_about, open_weights
from tinyldm.model import TEXT_ENCODERS, Architecture
from tinyldm.models.clip_text import CLIPTextConfig
from tinyldm.text.base_tokenizer import BaseTokenizer
from tinyldm.text.t5_tokenizer import T5Tokenizer
from tinyldm.text.tokenizer import Tokenizer, open_tokenizer
from tinyldm.vendor_loaders import clip, families
from tinyldm.vendor_loaders.families import Text

# kind of tokenizer -> the publisher's, and the files in which others keep it
TOKENIZERS = {T5Tokenizer: ("google/t5-v1_1-xxl", "spiece.model"),
              Tokenizer: ("openai/clip-vit-large-patch14", "vocab.json and merges.txt")}


def text_in_file(file: Path) -> tuple[Found, Text | None]:
    """The text encoder in a file, the first one of a whole checkpoint, and what it is: None where a config.json beside the file says
    it. ValueError, with what to do, where nothing says it."""
    weights, instead = open_weights(file), "name a file of one, the folder of one, a model folder, or a hub id of either"
    if whole := families.find(weights.shapes):
        (folder, text), there = next(iter(whole.family.encoders.items())), inside(file, weights, whole.family)
        if folder in there:
            return there[folder], text
    found = [] if whole else in_file(file, TEXT_ENCODERS.values())
    if len(found) != 1:
        raise ValueError(f"{file} holds {len(found) or 'no'} text encoder{'s' * (len(found) > 1)} that can be recognised: {instead}")
    config = told(found[0])
    text = families.alone(config) if found[0].config is None else None
    if found[0].config is None and text is None:
        raise ValueError(f"{file} holds a CLIP of width {config.width} with {config.layers} layers, of which more cannot be told from its "
                         f"tensors: put its config.json beside it, or {instead}")
    return found[0], text


def load_text_file(file: Path, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    found, text = text_in_file(file)
    with errors_about(file):
        if text is None:
            return load_network(found.row.module, found.config, found.weights, device, dtype)
        return load_text_part(text, found, text_config(text, found), device, dtype)


def tokenizer_of_file(file: Path, context_length: int | None) -> BaseTokenizer:
    """The tokenizer of the text encoder in a file: that of a model folder or part folder around it, else its publisher's."""
    found, text = text_in_file(file)
    places = [file.parent] if any((file.parent / name).exists() for name in ("tokenizer", *needed.VOCABULARIES)) else []
    try:
        return find_tokenizer(found.row, places, context_length, text.pad_token if text else None)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} holds no tokenizer: put its files beside it ({files_of(found.row)}) ({error})") from error


def find_tokenizer(row: Architecture, places: Iterable[Path], context_length: int | None, pad_token: str | None) -> BaseTokenizer:
    """The first tokenizer of a text encoder's kind in these places, else its publisher's from the hub."""
    for path in places:
        path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
        with errors_about(path):
            tokenizer = open_tokenizer(path, context_length, pad_token)
            if isinstance(tokenizer, row.tokenizer):
                return tokenizer
    return open_tokenizer(hub.locate(TOKENIZERS[row.tokenizer][0], needed.of_tokenizer), context_length, pad_token)


def files_of(row: Architecture) -> str:
    """The files of a text encoder's tokenizer, in words."""
    return TOKENIZERS[row.tokenizer][1]


def text_config(text: Text, found: Found) -> Any:
    """The config of a text encoder, with what its weights do not tell."""
    config = told(found)
    if text.config is not CLIPTextConfig:
        return config
    width = config.projection_dim if found.config else None
    if text.projection == "identity":
        width = width or config.width
    elif text.projection == "own" and found.config is None:
        names = {"text_projection": 1, "text_projection.weight": 0}       # name -> axis of the projection's width
        width = next((found.weights.shapes[name][axis] for name, axis in names.items() if name in found.weights.shapes), None)
    if text.projection == "own" and width is None:
        raise ValueError(f"{found.source}: its text encoder {text.name} has no projection (text_projection): take a file with it")
    if found.config:
        return replace(config, projection_dim=width if text.projection else None)
    unused = 0 if found.layout is clip.LAYOUTS["transformers"] else text.unused
    return replace(config, **text.settings, projection_dim=width, layers=config.layers - unused)


def load_text_part(text: Text, found: Found, config: Any, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    weights = found.weights
    if text.unused and found.config is None:            # Stable Diffusion 2 reads the last layer but one, as in the published folder
        layers = config.layers
        weights = weights.renamed(lambda name: "" if name.startswith(f"transformer.resblocks.{layers}.") else name)
    if text.projection == "identity" and found.config is None:
        weights = weights.renamed(lambda name: "" if name.startswith("text_projection") else name)
        weights = weights.joined(Weights.of({"text_projection.weight": torch.eye(config.width)}))
    with errors_about(found.source):
        return load_network(found.row.module, config, weights, device, dtype)
