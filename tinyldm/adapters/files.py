"""Files of adapters, read and written: kohya's, diffusers' and peft's names, one .safetensors.

A tensor that is not understood, a layer that the model does not have and a shape that does not fit are errors that name it: an adapter
is applied whole or not at all. Where a file says no alpha, B A is added as it is, with a scale of 1. In files in diffusers' layout, which
have no place for alpha that all programs look at, the scale is multiplied into B.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from tinyldm.adapters.formats import REFUSED, Layer, family, find, known_layers, layers_in, prefixes, split
from tinyldm.adapters.kinds import Change, Fields, build
from tinyldm.adapters.lora import LoRA
from tinyldm.adapters.low_rank import LowRank
from tinyldm.adapters.writers import WRITERS
from tinyldm.files import INCOMPLETE, read_json, write_file
from tinyldm.folders.modelspec import modelspec
from tinyldm.folders.weights import open_weights
from tinyldm.lookup import lookup
from tinyldm.model import Model, architecture
from tinyldm.vendor_loaders import families

OWN = "adapter.safetensors"                             # in a checkpoint
NAMES = (OWN, "pytorch_lora_weights.safetensors", "adapter_model.safetensors")          # diffusers', peft's
HEADER = "tinyldm"                                      # the text of the header with what is known about an adapter, as JSON
STATED = "lora_adapter_metadata"                        # diffusers' text of the header with peft's settings


# Family -> ModelSpec's id of its architecture.
MODELSPEC = {"Stable Diffusion 1": "stable-diffusion-v1", "Stable Diffusion 2": "stable-diffusion-v2",
             "Stable Diffusion 3": "stable-diffusion-3", "Stable Diffusion XL": "stable-diffusion-xl-v1-base", "FLUX.1": "flux-1-dev"}
# Family -> kohya's name of it in a header, by which other programs tell what an adapter is for (sd-scripts, networks/lora*.py).
KOHYA_VERSIONS = {"Stable Diffusion 1": "sd_v1", "Stable Diffusion 2": "sd_v2", "Stable Diffusion XL": "sdxl_base_v1-0",
                  "Stable Diffusion 3": "sd3", "FLUX.1": "flux1"}


# ---- reading


class AdapterFile(NamedTuple):
    """What a file holds, under its own names."""

    path: Path
    layers: dict[str, Fields]
    keys: dict[str, dict[str, str]]                     # layer -> field -> the tensor's name
    metadata: dict[str, str]                            # of the header
    stated: Mapping[str, Any]                           # peft's settings, from the header or from adapter_config.json

    def change(self, name: str) -> Change:
        """What a layer does to its weight. ValueError where its tensors do not fit together."""
        try:
            return build(self.layers[name], self.scale(name))
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {error}") from error

    def scale(self, name: str) -> Callable[[int | None], float | None]:
        """A function: rank of a layer (None: its tensors do not tell) -> the scale that peft's settings state; None where they do not."""
        part = next((part for part in sorted({key.rpartition(".")[0] for key in self.stated}) if part and name.startswith(f"{part}.")), "")
        of = lambda key, default: self.stated.get(f"{part}.{key}" if part else key, default)
        module = name.removeprefix(f"{part}.").removeprefix("base_model.model.")
        special = lambda key, else_: next((value for pattern, value in (of(key, None) or {}).items()
                                           if re.match(rf"(.*\.)?({pattern})$", module)), else_)
        try:
            alpha, stated = special("alpha_pattern", of("lora_alpha", of("alpha", None))), special("rank_pattern", of("r", 1))
            alpha, stated = None if alpha is None else float(alpha), int(stated)
        except (re.error, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"peft's settings of the adapter hold a value that cannot be read ({error})") from error
        return lambda rank: None if alpha is None else alpha / (rank or stated) ** (0.5 if of("use_rslora", False) else 1)


@dataclass(frozen=True)
class Entry:
    """The change of one layer of the model."""

    name: str                                           # of the layer in the file
    layer: Layer
    change: Change

    def parts(self, delta: Tensor) -> Iterable[tuple[str, Tensor]]:
        """The change of the published weight -> the names of our weights in it, and the change of each."""
        return ((place.key, place.form.inwards(delta.reshape(self.layer.shape), place.how)) for place in self.layer.places)


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model."""

    path: Path
    entries: Sequence[Entry]
    metadata: Mapping[str, str]

    def changes(self) -> dict[str, dict[str, LowRank]]:
        """Part -> our weight -> its change. ValueError where the adapter is not a LoRA."""
        found: dict[str, dict[str, LowRank]] = {}
        for entry in self.entries:
            if not isinstance(entry.change, LowRank):
                raise ValueError(f"{self.path}: {entry.name} is not plain LoRA, which alone has this form: it can be drawn with and merged")
            whole = entry.change.like(entry.layer.shape)
            for place in entry.layer.places:            # rows of B; the same A for all
                part = LowRank(whole.down, place.form.inwards(whole.up, place.how), whole.scale)
                found.setdefault(entry.layer.part, {})[place.key] = part
        return found


def newest(run: Path, name: str) -> Path | None:
    """The file of this name in the newest checkpoint of a run that has one; None where there is none."""
    steps = {int(number): file for file in run.glob(f"checkpoints/step-*/{name}")       # copies that are being replaced have other names
             if (number := file.relative_to(run).parts[1].removeprefix("step-")).isdigit()}
    return steps[max(steps)] if steps else None


def locate(path: str | Path) -> Path:
    """The file that a path names: itself; in a folder one of NAMES; of a run that of its newest checkpoint. ValueError where there is
    none."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"{path} does not exist: name an adapter's .safetensors file, or the folder of a run that trained one")
    found = next((path / name for name in NAMES if (path / name).is_file()), None) or newest(path, OWN)
    if found:
        return found
    if (path / "model_index.json").exists() or any(path.glob("checkpoints/step-*/model")):
        raise ValueError(f"{path} is a whole model, no adapter: name it as the model")
    raise ValueError(f"{path} holds no adapter ({', '.join(NAMES)}, or a run's checkpoints/step-*/{OWN})")


def read_layers(path: str | Path) -> AdapterFile:
    """The layers in an adapter's file, by its own names. ValueError for a file that is damaged or no adapter, and for kinds of adapters
    that are not read."""
    path = locate(path)
    weights = open_weights(path)
    layers: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, dict[str, str]] = {}
    for pattern, what in REFUSED.items():
        if odd := next((key for key in weights.shapes if re.fullmatch(pattern, key)), None):
            raise ValueError(f"{path} holds {what} ({odd}), which is not read: LoRA, LoHa, LoKr and DoRA are")
    names = {key: split(key) for key in weights.shapes}
    if not any(names.values()):
        raise ValueError(_no_adapter(path, weights.shapes))
    if odd := [key for key, found in names.items() if found is None]:
        raise ValueError(f"{path}: {_count(odd)} of its {len(names)} tensors are none of an adapter's: {INCOMPLETE}")
    for key, tensor in weights.stream():
        name, field = names[key]
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds numbers that are not finite: its training has failed, or the file is damaged")
        if field in layers.setdefault(name, {}):
            raise ValueError(f"{path} holds {field} of {name} twice, the second time as {key}")
        layers[name][field] = tensor
        keys.setdefault(name, {})[field] = key
    texts = {key: str(value) for key, value in weights.facts.items() if isinstance(value, str)}
    beside = path.with_name("adapter_config.json")
    try:
        stated = json.loads(texts.get(STATED, "{}")) or (read_json(beside, INCOMPLETE) if path.name == NAMES[2] and beside.exists() else {})
    except ValueError as error:
        raise ValueError(f"{path}: the text {STATED} of its header is damaged ({error})") from error
    return AdapterFile(path, layers, keys, texts, stated)


def _no_adapter(path: Path, shapes: Mapping[str, Any]) -> str:
    if found := families.find(shapes):
        return f"{path} is a whole model, {found.family.name}, no adapter: name it as the model"
    if len(shapes) < 4 and all(len(shape) < 3 for shape in shapes.values()):
        return f"{path} is a word of textual inversion, no adapter: name it as an embedding"
    return f"{path} is no adapter: its tensors are {_count(shapes)}"


def read_adapter(path: str | Path, model: Model) -> Adapter:
    """An adapter for this model, from a file with any of the names in formats.py. ValueError, which names the first of what does not
    fit, where it is not for this model."""
    file, known = read_layers(path), known_layers(model)
    found = {name: find(name, known) for name in file.layers}
    if lost := [name for name, layer in found.items() if layer is None]:
        raise ValueError(f"{file.path}: of the {len(found)} layers that the adapter changes, the model has no "
                         f"{_count(lost)}{_whose(file, model)}")
    entries = []
    for name, layer in found.items():
        change = file.change(name)
        if not _fits(change.shape, layer.shape):
            raise ValueError(f"{file.path}: {name} changes a weight of {list(change.shape)}, and the model's is "
                             f"{list(layer.shape)}{_whose(file, model)}")
        entries.append(Entry(name, layer, change))
    return Adapter(file.path, _once(file.path, entries), file.metadata)


def _fits(change: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether rows, and numbers in a row, are as many."""
    return change[0] == weight[0] and math.prod(change[1:]) == math.prod(weight[1:])


def _once(path: Path, entries: list[Entry]) -> list[Entry]:
    """Without the layers of a second layout, where a file has all of them in two: some trainers of Stable Diffusion XL write them under
    both. ValueError where a weight is changed twice in another way."""
    layouts: dict[tuple[str, str], dict[str, Entry]] = {}       # part and layout -> our weight -> what changes it
    for entry in entries:
        for place in entry.layer.places:
            there = layouts.setdefault((entry.layer.part, entry.layer.layout), {})
            if (other := there.setdefault(place.key, entry)) is not entry:
                raise ValueError(f"{path} changes one layer twice, as {other.name} and as {entry.name}")
    dropped: set[tuple[str, str]] = set()
    for one, other in permutations(layouts, 2):
        both = layouts[one].keys() & layouts[other].keys()
        if one[0] != other[0] or not both or other in dropped:
            continue
        if both == layouts[one].keys():
            dropped.add(one)
        elif both != layouts[other].keys():
            first, second = (layouts[each][min(both)].name for each in (one, other))
            raise ValueError(f"{path} changes one layer twice, as {first} and as {second}, and others once")
    return [entry for entry in entries if (entry.layer.part, entry.layer.layout) not in dropped]


def _count(names: Iterable[str]) -> str:
    """'3 (a, b, c)'"""
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _whose(file: AdapterFile, model: Model) -> str:
    """Which family the adapter is for, and which the model is, as the end of an error."""
    theirs, ours = family(file.layers), family_of(model) or f"one whose network is a {type(model.net).__name__}"
    if theirs is None:
        return f". The model is {ours}: is the adapter for another family?"
    if ours in theirs:
        return f". It is for {theirs}, as the model is, but of another size or version"
    return f". It seems to be for {theirs}, and the model is {ours}"


def family_of(model: Model) -> str | None:
    """The name of the model's family in vendor_loaders/families.py; None for one that is in none, such as a DiT."""
    for name, layout in architecture(model.net).layouts.items():
        shapes = {f"{layer.path}.weight": layer.shape for layer in layers_in("net", model.net, name, layout)}
        for known in families.FAMILIES:
            if known.mark in shapes and known.known_by(shapes):
                return known.name
    return None


# ---- writing


def save_adapter(path: str | Path, adapters: Mapping[str, LoRA | Mapping[str, LowRank]], model: Model, metadata: Mapping[str, Any],
                 layout: str = "diffusers", dtype: torch.dtype | None = None) -> None:
    """Write an adapter as one .safetensors file, whole or not at all.

    adapters    part of the model (net, text, text_2 ...) -> its LoRA, or the changes of our weights
    metadata    what is known about it, such as base_model, trigger words, data: anything JSON can hold. It stands in the header
    layout      a key of WRITERS: "diffusers" for pipe.load_lora_weights, "kohya" for the other programs
    dtype       None: as the tensors are

    ValueError for parts and weights that the model does not have; OSError where the file cannot be written."""
    write, tensors = lookup(WRITERS, layout, "layout of adapters"), {}
    changes = {part: adapter.changes() if isinstance(adapter, LoRA) else adapter for part, adapter in adapters.items()}
    for part, own in changes.items():
        if part not in prefixes(model):
            raise ValueError(f"the model has no part {part} that an adapter can change: it has {', '.join(prefixes(model))}")
        tensors |= write(model, part, own)
    if not tensors:
        raise ValueError(f"{path}: the adapter changes nothing")
    tensors = {name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    content = save(tensors, header(changes, model, metadata))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(Path(path), content)


def header(changes: Mapping[str, Mapping[str, LowRank]], model: Model, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the file's header: what is known, as JSON under HEADER, and kohya's names for what other programs show."""
    every = [change for own in changes.values() for change in own.values()]
    one = lambda values: f"{values.pop():g}" if len(values) == 1 else "Dynamic"
    rank, alpha = one({change.rank for change in every}), one({change.rank * change.scale for change in every})
    known = {**metadata, "family": family_of(model), "rank": rank, "alpha": alpha, "parts": sorted(changes)}
    shown = {"ss_sd_model_name": metadata.get("base_model"), "ss_base_model_version": KOHYA_VERSIONS.get(known["family"]),
             "ss_v2": "True" if known["family"] == "Stable Diffusion 2" else None}
    title = str(metadata.get("base_model") or "adapter")
    shown |= modelspec(f"{MODELSPEC.get(known['family'], 'tinyldm')}/lora", f"LoRA for {title}", model.defaults.get("resolution"),
                       model.prediction)
    return {"format": "pt", HEADER: json.dumps(known), "ss_network_module": "networks.lora", "ss_network_dim": rank,
            "ss_network_alpha": alpha, **{name: str(value) for name, value in shown.items() if value}}
