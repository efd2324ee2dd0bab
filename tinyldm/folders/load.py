"""Loads a whole model, a VAE, a text encoder or a tokenizer, in the formats in which they are published.

A source is a model folder in diffusers' layout (described in save.py), the folder of one part, a hub id (hub.py), or one file: a
Stable Diffusion checkpoint in CompVis' layout (single_file.py) or a VAE alone. The names of the tensors show which layout a file
has. Weights are copied from the memory-mapped file straight to their device and dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from tinyldm.files import read_json
from tinyldm.folders import hub, needed
from tinyldm.folders.build import load_network
from tinyldm.folders.parts import config_in, in_file, in_folder
from tinyldm.folders.rename import recognise
from tinyldm.folders.single_file import load_checkpoint, vae_config
from tinyldm.folders.text_file import load_text_file, tokenizer_of_file
from tinyldm.folders.weights import INCOMPLETE, PICKLES, Weights, errors_about, find_weights, open_weights
from tinyldm.lookup import fits, in_words
from tinyldm.model import AUTOENCODERS, NETWORKS, NON_EMA, TEXT_ENCODERS, Architecture, Model, architecture
from tinyldm.models.taesd import TAESD
from tinyldm.text.absent import AbsentText, AbsentTokenizer
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.text.base_tokenizer import BaseTokenizer
from tinyldm.text.tokenizer import open_tokenizer
from tinyldm.vendor_loaders import clip, families, pipelines, taesd
from tinyldm.vendor_loaders import scheduler as schedulers

FILES = (".safetensors", *PICKLES)


def load_model(source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
               ema: bool = True, variant: str | None = None, tokenizer: str | Path | Sequence[str] | None = None,
               prediction: str | None = None, parts: Sequence[str] = (), without: Collection[str] = ()) -> Model:
    """A whole model: one of ours, or a published Stable Diffusion 1, 2, XL, 3 or 3.5, or FLUX.1.

    ema         False: the raw weights, where a folder has both
    variant     such as "fp16": which weights files of a published folder (default: full precision where there is one)
    tokenizer   for a single-file checkpoint, which holds none: a tokenizer's folder or hub id, or one for each text encoder
    parts       for a single-file checkpoint: sources of text encoders and VAE that it lacks
    prediction  replaces the one in the source's scheduler config or, for a single Stable Diffusion 2 file, the guessed one
    without     folders of text encoders to leave out, where the model can do without: {"text_encoder_3"}, the T5 of Stable Diffusion 3

    The VAE stays in float32 where dtype is float16, in which it can overflow. ValueError, with advice, for a
    source that is missing, incomplete, damaged or of another architecture.

    On the device "meta" a model is shapes without values. No weights are read, and of a hub id none are downloaded.
    """
    tokenizers = [tokenizer] if isinstance(tokenizer, (str, Path)) else list(tokenizer or ())
    path = hub.locate(source, needed.of_index)              # from the hub, at first only two small files
    if path.is_file():
        if variant or not ema:
            raise ValueError(f"{path} is one file, with one set of weights: leave out {'--variant' if variant else '--no-ema'}")
        return load_checkpoint(path, device, dtype, tokenizers, prediction, parts, without)
    if parts:
        raise ValueError(f"--parts {parts[0]} is for a single file, and {source} is a model folder, which has all of its parts")
    index = read_json(path / "model_index.json", "not a model folder: pass one that holds model_index.json")
    reading = pipelines.find(index, source)
    pipeline, own = pipelines.PIPELINES[reading.written_as], reading.written_as == pipelines.OWN
    stated = load_defaults(path, must=own)
    join = stated.get("text_join", "single") if own else pipeline.join
    texts = pipelines.text_row(reading.written_as, join)
    if odd := set(without) - texts.optional:
        raise ValueError(f"{source} cannot draw without {min(odd)}: only the T5 of Stable Diffusion 3 can be left out")
    if reading.without:
        print(f"note: {source} is drawn with as {reading.written_as} does, without {reading.without}", file=sys.stderr)
    shapes_only = torch.device(device).type == "meta"
    path = hub.locate(source, lambda names: needed.of_model(names, variant, weights=not shapes_only))
    rows = [row for row in NETWORKS.values() if row.folder in index]
    if not rows:
        raise ValueError(f"{path / 'model_index.json'} names no network that can be read ({', '.join(NETWORKS)})")
    if variant and not shapes_only and not _has_variant(path, variant, rows[0]):
        raise ValueError(f"{source} has no weights of variant '{variant}': leave it out for full precision")
    wanted = variant if ema else NON_EMA
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype
    net = load_part(path / rows[0].folder, rows, device, dtype, wanted, must=not ema)
    vae = load_part(path / "vae", AUTOENCODERS.values(), device, vae_dtype, wanted)
    if not pipeline.shifts:
        vae.config = replace(vae.config, shift_factor=0.0)
    network = architecture(net).to_config(net.config)
    if pipeline.network not in ("", network["_class_name"]):
        raise ValueError(f"{source} holds a {reading.written_as} with a {network['_class_name']}, where a {pipeline.network} belongs: "
                         f"{INCOMPLETE}")
    zeros = {folder: AbsentText(net.config.context_dim, tokens) for folder, tokens in zip(pipelines.TEXT_FOLDERS, texts.lengths(network))
             if folder in texts.optional and (folder in without or not (index.get(folder) or [None])[0])}
    text = load_text_encoders(path, join, tokenizers, pipeline.lengths(network),
                              lambda part: load_part(part, TEXT_ENCODERS.values(), device, dtype, wanted), zeros)
    config = load_scheduler(path, index, reading, prediction)
    with errors_about(path / "scheduler"):
        process, predicted = schedulers.from_config(config)
    return Model(net, vae, text, process, predicted, config, stated or pipelines.defaults(reading, index, network))


def _has_variant(path: Path, variant: str, network: Architecture) -> bool:
    """Whether any part of a model folder has weights of this variant."""
    rows = (network, *AUTOENCODERS.values(), *TEXT_ENCODERS.values())
    return any(find_weights(folder, row.stem, variant) for row in rows for folder in path.glob(f"{row.folder}*"))


def load_scheduler(path: Path, index: Mapping, reading: pipelines.Reading, prediction: str | None) -> dict[str, Any]:
    """scheduler_config.json of a model folder, with what model_index.json, the pipeline's constructor and the caller change in it."""
    config = read_json(path / "scheduler" / "scheduler_config.json", INCOMPLETE) | _named_class(index)
    stated = {"prediction_type": schedulers.PREDICTION_TYPES[prediction]} if prediction else {}
    return schedulers.with_fields(config, reading.scheduler) | stated


def load_defaults(path: Path, must: bool) -> dict[str, Any]:
    """tinyldm.json: the model's defaults for drawing, and what was trained on. must: whether it is an error that there is none."""
    file = path / "tinyldm.json"
    defaults = read_json(file, INCOMPLETE) if must or file.exists() else {}
    if isinstance(data := defaults.get("data"), str):           # older folders have the words of --data in one text
        defaults["data"] = data.split() if "://" in data else [data]
    for name, hint in {"sampler": str, "steps": int, "cfg": float, "resolution": int, "text_join": str, "mask_padding": bool,
                       "schedule": str, "zero_negative": bool, "distilled": bool}.items():
        if name in defaults and not fits(defaults[name], hint):
            raise ValueError(f"{file}: {name}={defaults[name]!r} must be {in_words(hint)}")
    return defaults


def _named_class(index: dict) -> dict:
    """The scheduler's class, which diffusers takes from model_index.json, not from scheduler_config.json."""
    named = index.get("scheduler")
    return {"_class_name": named[1]} if isinstance(named, list) and len(named) == 2 and named[1] else {}


def load_text_encoders(path: Path, join: str, tokenizers: Sequence[str], lengths: Sequence[int | None],
                       load: Callable[[Path], nn.Module], absent: Mapping[str, AbsentText] = MappingProxyType({})) -> TextEncoders:
    """All text encoders of a model folder: text_encoder/ with tokenizer/, text_encoder_2/ with tokenizer_2/ and so on.

    tokenizers: sources to take instead of those folders, one for each encoder. lengths: how many tokens each reads; None: what its
    tokenizer says. absent: what stands for those that are left out, by folder."""
    encoders, folders = [], {folder.name for folder in path.glob("text_encoder*")} | absent.keys() or {"text_encoder"}
    if len(tokenizers) not in (0, len(folders)):
        raise ValueError(f"{len(tokenizers)} tokenizers for a model with {len(folders)} text encoders: name one for each (--tokenizer)")
    for i, name in enumerate(sorted(folders)):
        if name in absent:
            encoders.append(TextEncoder(absent[name], AbsentTokenizer()))
            continue
        module, words = load(path / name), path / name.replace("text_encoder", "tokenizer")
        if tokenizers:
            encoders.append(TextEncoder(module, load_tokenizer(tokenizers[i])))
            continue
        if not words.is_dir():
            raise ValueError(f"{path} has no {words.name}/: {INCOMPLETE}")
        with errors_about(words):
            encoders.append(TextEncoder(module, open_tokenizer(words, lengths[i] if i < len(lengths) else None)))
    with errors_about(path):
        return TextEncoders(encoders, join)


def load_vae(source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A VAE from its part folder, the model folder around it, a hub id of either, or a file (whose config.json, if any, lies beside
    it); TAESD also from the folder of its two files. In eval mode, without gradients."""
    path = locate_part(source, AUTOENCODERS.values())
    if path.is_file():
        return _load_vae_file(path, device, dtype)
    path = path / "vae" if (path / "vae").is_dir() else path
    if (path / "log.jsonl").exists():
        raise ValueError(f"the run {path} has no finished autoencoder yet: go on with python train.py --out {path} --resume yes")
    if not (path / "config.json").exists() and (weights := _taesd_halves(path)):
        with errors_about(path):
            return load_network(TAESD, taesd.LAYOUTS["original"].config_of(weights.shapes), weights, device, dtype)
    return load_part(path, AUTOENCODERS.values(), device, dtype)


def load_text(source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A text encoder from its part folder, the model folder around it, a hub id of either, or a file, whose tensors or a config.json
    beside it say what it is. Of a whole checkpoint it is the first one."""
    path = locate_part(source, TEXT_ENCODERS.values())
    if path.is_file():
        return load_text_file(path, device, dtype)
    path = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    return load_part(path, TEXT_ENCODERS.values(), device, dtype, origin=hub.hub_id(source))


def load_tokenizer(source: str | Path, context_length: int | None = None) -> BaseTokenizer:
    """A tokenizer from its folder, the model folder around it, a vocabulary file, a hub id, or the file of a text encoder. The padding
    token is its publisher's where that is known (clip.SOURCES), else that of the folder's tokenizer_config.json."""
    path = hub.locate(source, needed.of_tokenizer)
    if path.is_file() and path.suffix.lower() in FILES:
        return tokenizer_of_file(path, context_length)
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    origin = hub.hub_id(source) or (_origin(path.parent) if path.is_file() else _origin(path))
    known = clip.known_source(origin)
    with errors_about(path):
        return open_tokenizer(path, context_length, known.pad_token if known else None)


def locate_part(source: str | Path, rows: Iterable[Architecture]) -> Path:
    """The local path of a part's source; for a hub id, its config and weights are downloaded unless they are cached."""
    return hub.locate(source, lambda names: needed.of_part(names, rows))


def load_part(path: Path, rows: Iterable[Architecture], device: str | torch.device, dtype: torch.dtype, variant: str | None = None,
              must: bool = False, origin: str | None = None) -> Any:
    """A network from its folder, of the class that config.json names, or else of the first of the rows.

    must: a missing variant is an error; otherwise the file without variant is read instead. origin: the hub id it came from."""
    if torch.device(device).type == "meta" and not any(find_weights(path, row.stem) for row in rows):
        row, config = config_in(path, rows, origin)
        return load_network(row.module, config, None, device, dtype)
    found = in_folder(path, rows, variant, must, origin)
    with errors_about(found.source):
        return load_network(found.row.module, found.config, found.weights, device, dtype)


def _taesd_halves(folder: Path) -> Weights | None:
    """The weights of TAESD as it was first published, with encoder and decoder in two files; None where a folder lacks these."""
    files = {half: sorted(folder.glob(f"*{half}.*")) for half in ("encoder", "decoder")}
    if not all(files.values()):
        return None
    for found in files.values():
        if len({file.stem for file in found}) > 1:
            raise ValueError(f"{folder} holds several autoencoders ({', '.join(file.name for file in found)}): copy the two "
                             f"files of one to a folder of their own")
    # In alphabetical order .safetensors comes after .pth, so the last file is the preferred one.
    encoder, decoder = (open_weights(found[-1]).renamed(lambda name, half=half: f"{half}.{name}") for half, found in files.items())
    return encoder.joined(decoder)


def _load_vae_file(file: Path, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    found, family = in_file(file, AUTOENCODERS.values()), families.find(open_weights(file).shapes)
    with errors_about(file):
        if not found:
            recognise(open_weights(file), AUTOENCODERS["kl"].layouts)       # raises an error that lists the tensors found
        return load_network(found[0].row.module, vae_config(found[0], family and family.family), found[0].weights, device, dtype)


def _origin(folder: Path) -> str | None:
    """The hub id of origin that the folder's config.json notes, if it does."""
    file = folder / "config.json"
    return read_json(file, INCOMPLETE).get("_name_or_path") if file.exists() else None
