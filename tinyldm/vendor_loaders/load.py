"""Loading: a whole model, a VAE, a text encoder or a tokenizer, from wherever it is published.

A source is a model folder in diffusers' layout (folder.py says what lies where), the folder of one part, a hub id
(hub.py), or one file: a Stable Diffusion checkpoint in CompVis' layout (single_file.py) or a VAE alone. Layouts
are told apart by the names of the tensors. Weights go straight from the mapped file to their device and dtype.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tinyldm.diffusion.process import Process
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT
from tinyldm.models.taesd import TAESD
from tinyldm.models.unet import UNet
from tinyldm.models.vae import AutoencoderKL
from tinyldm.tokenizer import Tokenizer
from tinyldm.vendor_loaders import clip, hub, needed, taesd
from tinyldm.vendor_loaders import scheduler as schedulers
from tinyldm.vendor_loaders.folder import OWN_PIPELINE, PIPELINE, read_json, weights_name
from tinyldm.vendor_loaders.kinds import KINDS, NON_EMA, VAE
from tinyldm.vendor_loaders.rename import Layout, apply, load_renamed, recognise
from tinyldm.vendor_loaders.weights import INCOMPLETE, PICKLES, Weights, find_weights, named, open_weights

FILES = (".safetensors", *PICKLES)
SDXL_SCALING = 0.13025                  # its VAE has Stable Diffusion 1's shape; only the checkpoint around it tells


@dataclass
class Model:
    """A loaded model: networks in eval mode, without gradients."""

    net: UNet | DiT
    vae: VAE
    text: CLIPText
    tokenizer: Tokenizer
    process: Process
    prediction: str
    scheduler: dict         # scheduler_config.json as it was read: save_model takes it back
    defaults: dict          # tinyldm.json, {} where there is none


def load_model(source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
               ema: bool = True, variant: str | None = None, tokenizer: str | None = None,
               prediction: str | None = None) -> Model:
    """A whole model: one of ours, or a published Stable Diffusion 1 or 2.

    ema         False: the raw weights, where a folder has both
    variant     such as "fp16": which weights files of a published folder (default: full precision where there is one)
    tokenizer   for a single-file checkpoint, which holds none: a tokenizer's folder or hub id
    prediction  instead of what the source says or, for a single Stable Diffusion 2 file, instead of the guess

    The VAE stays in float32 where dtype is float16, in which it can overflow. ValueError, with what to do, for a
    source that is missing, incomplete, damaged or of another architecture.
    """
    path = hub.locate(source, needed.of_index)              # of a hub repository first only what says what it is
    if path.is_file():
        if variant or not ema:
            raise ValueError(f"{path} is one file, with one set of weights: leave out {'--variant' if variant else '--no-ema'}")
        from tinyldm.vendor_loaders.single_file import load_checkpoint
        return load_checkpoint(path, device, dtype, tokenizer, prediction)
    index = read_json(path / "model_index.json", "not a model folder: pass one that holds model_index.json")
    if index.get("_class_name") not in (PIPELINE, OWN_PIPELINE):
        raise ValueError(f"{source} holds a {index.get('_class_name')}: only {PIPELINE} and {OWN_PIPELINE} can be read")
    path = hub.locate(source, lambda names: needed.of_model(names, variant))
    if variant and not any(find_weights(path / kind.folder, kind.stem, variant) for kind in KINDS.values()):
        raise ValueError(f"{source} has no weights of variant '{variant}': leave it out for full precision")
    network = DiT if "transformer" in index else UNet
    wanted = variant if ema else NON_EMA
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype
    net = _load_part(path / KINDS[network].folder, (network,), device, dtype, wanted, must=not ema)
    text = _load_part(path / "text_encoder", (CLIPText,), device, dtype, wanted)
    vae = _load_part(path / "vae", (AutoencoderKL, TAESD), device, vae_dtype, variant)
    if tokenizer is None and not (path / "tokenizer").is_dir():
        raise ValueError(f"{path} has no tokenizer/: {INCOMPLETE}")
    config = read_json(path / "scheduler" / "scheduler_config.json", INCOMPLETE)
    if prediction:
        config |= {"prediction_type": schedulers.PREDICTION_TYPES[prediction]}
    with named(path / "scheduler"):
        learned = schedulers.from_config(config)
    defaults = path / "tinyldm.json"
    with named(path / "tokenizer"):
        words = Tokenizer.load(path / "tokenizer") if tokenizer is None else load_tokenizer(tokenizer)
    return Model(net, vae, text, words, *learned, config, read_json(defaults, INCOMPLETE) if defaults.exists() else {})


def load_vae(source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """A VAE from its part folder, the model folder around it, a hub id of either, or a file (with config.json beside it
    where there is one); TAESD also from the folder of its two files. Eval mode, without gradients."""
    path = locate_part(source, AutoencoderKL)
    if path.is_file():
        return _load_vae_file(path, device, dtype)
    path = path / "vae" if (path / "vae").is_dir() else path
    if not (path / "config.json").exists() and (weights := _taesd_halves(path)):
        with named(path):
            return build_network(TAESD, taesd.LAYOUTS["original"].config_of(weights.shapes), weights, device, dtype)
    return _load_part(path, (AutoencoderKL, TAESD), device, dtype)


def load_text(source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> CLIPText:
    """A CLIP text encoder from its part folder, the model folder around it, or a hub id of either."""
    path = locate_part(source, CLIPText)
    if path.is_file():
        raise ValueError(f"{path} is a file: a text encoder is read from its folder, a model folder, or a hub id of either")
    path = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    return _load_part(path, (CLIPText,), device, dtype, origin=hub.hub_id(source))


def load_tokenizer(source: str | Path, context_length: int | None = None) -> Tokenizer:
    """A CLIP tokenizer from its folder, the model folder around it, a vocabulary file or a hub id. Padding is its
    publisher's where that is known (clip.SOURCES), else what its folder says."""
    path = hub.locate(source, needed.of_tokenizer)
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    origin = hub.hub_id(source) or (_origin(path.parent) if path.is_file() else _origin(path))
    known = clip.known_source(origin)
    with named(path):
        return Tokenizer.load(path, context_length, known.pad_token if known else None)


def locate_part(source: str | Path, network: type[nn.Module]) -> Path:
    """The local path of a network's source; from the hub its config and weights are downloaded, if they are not yet."""
    return hub.locate(source, lambda names: needed.of_part(names, network))


def load_weights(module: nn.Module, file: str | Path) -> None:
    """Read one weights file, in any published layout, into module; strict. On the meta device it comes to the CPU."""
    with named(Path(file)):
        _fill(module, open_weights(file))


class Undrawn(TorchFunctionMode):
    """Initial weights are not drawn: drawing on the meta device, where it does nothing, imports torch's compiler (1 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawing = getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_")
        return (args or (kwargs["tensor"],))[0] if drawing else func(*args, **(kwargs or {}))


def build_network(network: type[nn.Module], config: Any, weights: Weights, device: str | torch.device,
                  dtype: torch.dtype) -> Any:
    """A network with these weights, made on its device in its dtype; eval mode, without gradients."""
    with torch.device("meta"), Undrawn():       # no memory and no time for weights that are replaced at once
        module = network(config)
    _fill(module, weights, device, dtype)
    return module.eval().requires_grad_(False)


def _fill(module: nn.Module, weights: Weights, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
    layout, weights = recognise(weights, KINDS[type(module)].layouts)
    tidy = layout.tidy(module.config)
    load_renamed(module, weights.renamed(lambda name: apply(tidy, name)), layout.rules(module.config), device, dtype)


def _load_part(path: Path, networks: tuple[type[nn.Module], ...], device: str | torch.device, dtype: torch.dtype,
               variant: str | None = None, must: bool = False, origin: str | None = None) -> Any:
    """must: a missing variant is an error rather than a reason to take the usual file."""
    file = next((path / name for name in needed.CONFIGS if (path / name).exists()), path / needed.CONFIGS[0])
    config = read_json(file, INCOMPLETE)
    network = next((n for n in networks if config.get("_class_name") in KINDS[n].classes), networks[0])
    kind = KINDS[network]
    with named(path):
        config = kind.from_config(config | ({"_name_or_path": origin} if origin else {}))
    weights = find_weights(path, kind.stem, variant)
    if variant and weights is None:
        if must:
            raise ValueError(f"{path} has no raw weights ({weights_name(kind, variant)}): leave out --no-ema (ema=True) for the averaged ones")
        weights = find_weights(path, kind.stem)
    weights = weights or path / weights_name(kind, None)         # the error names what is expected
    with named(weights):
        return build_network(network, config, open_weights(weights), device, dtype)


def _taesd_halves(folder: Path) -> Weights | None:
    """TAESD as it was first published: the encoder in one file, the decoder in another."""
    files = {half: sorted(folder.glob(f"*{half}.*")) for half in ("encoder", "decoder")}
    if not all(files.values()):
        return None
    for found in files.values():
        if len({file.stem for file in found}) > 1:
            raise ValueError(f"{folder} holds several autoencoders ({', '.join(file.name for file in found)}): copy the two "
                             f"files of one to a folder of their own")
    encoder, decoder = (open_weights(found[-1]).renamed(lambda name, half=half: f"{half}.{name}")      # safetensors last
                        for half, found in files.items())
    return encoder.joined(decoder)


def _load_vae_file(file: Path, device: str | torch.device, dtype: torch.dtype) -> VAE:
    weights, beside = open_weights(file), file.parent / "config.json"
    with named(file):
        network, layout, own = _recognise_vae(weights)
        if layout.infer is None or beside.exists():
            config = KINDS[network].from_config(read_json(beside, "a VAE in this layout needs its config.json beside it"))
        else:
            config = layout.config_of(own.shapes)
            if any(name.startswith("conditioner.embedders.") for name in weights.shapes):
                config = replace(config, scaling_factor=SDXL_SCALING)
        return build_network(network, config, weights, device, dtype)


def _recognise_vae(weights: Weights) -> tuple[type[nn.Module], Layout, Weights]:
    for network in (AutoencoderKL, TAESD):
        for layout in KINDS[network].layouts.values():
            if any(re.fullmatch(layout.mark, name) for name in weights.shapes):
                return network, *recognise(weights, {"": layout})
    recognise(weights, KINDS[AutoencoderKL].layouts)            # the error says what is there instead
    raise AssertionError("unreachable")


def _origin(folder: Path) -> str | None:
    """The hub id that a config of the folder says it came from."""
    file = folder / "config.json"
    return read_json(file, INCOMPLETE).get("_name_or_path") if file.exists() else None
