"""Whole models as one file: the checkpoints of Stable Diffusion 1, 2, XL and 3 and of FLUX.1, read; those of Stable Diffusion 1, written.

One `.safetensors` or `.ckpt` holds the network, and often the VAE and the text encoders, under the prefixes that
vendor_loaders/families.py lists, and no config: the shapes show the family and the sizes. They do not show the tokenizers, nor whether
a U-Net predicts eps or v (`_stated_prediction`). Parts that a file lacks come from other sources, which their tensors describe too.

Two files beside NAME.safetensors are read, as in AUTOMATIC1111's WebUI: NAME.yaml, the config that says what is predicted, and
NAME.vae.safetensors (or .pt, .ckpt), which replaces the VAE.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyldm.folders import hub, needed, parts
from tinyldm.folders.modelspec import modelspec
from tinyldm.folders.build import load_network
from tinyldm.folders.parts import Found, inside, row_of, told
from tinyldm.folders.rename import export_renamed, recognise
from tinyldm.folders.text_file import files_of, find_tokenizer, load_text_part, text_config
from tinyldm.folders.weights import Weights, errors_about, open_weights, write_weights
from tinyldm.lookup import lookup
from tinyldm.model import AUTOENCODERS, NETWORKS, Model
from tinyldm.models.clip_text import CLIPTextConfig
from tinyldm.models.unet import UNetConfig
from tinyldm.models.vae import VAEConfig
from tinyldm.text.absent import AbsentText, AbsentTokenizer
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.text.base_tokenizer import BaseTokenizer
from tinyldm.vendor_loaders import clip, families, pipelines
from tinyldm.vendor_loaders import scheduler as schedulers
from tinyldm.vendor_loaders import unet as unets
from tinyldm.vendor_loaders import vae as vaes
from tinyldm.vendor_loaders.families import SD1, Family, Text

VAE_BESIDE = (".vae.safetensors", ".vae.pt", ".vae.ckpt")
PREFIXES = {"net": families.NETWORK, "vae": families.VAE[0], "text": "cond_stage_model.transformer."}     # as written
BASE_STEPS = 875_000                    # `global_step` of Stable Diffusion 2's base model, which predicts eps


def load_checkpoint(file: Path, device: str | torch.device, dtype: torch.dtype, tokenizers: Sequence[str | Path] = (),
                    prediction: str | None = None, others: Sequence[str | Path] = (), without: Collection[str] = ()) -> Model:
    """A checkpoint of a family in FAMILIES. Arguments as for load_model (load.py); others: its `parts`.

    ValueError for other files, with what they are where that is known, and for parts that are missing or there twice."""
    weights = open_weights(file)
    family, net, own = _network(file, weights)
    row = NETWORKS[family.network]
    pipeline, lengths = pipelines.PIPELINES[family.pipeline], pipelines.PIPELINES[family.pipeline].lengths(row.to_config(net))
    if odd := set(without) - pipeline.optional:
        raise ValueError(f"{file} cannot draw without {min(odd)}: only Stable Diffusion 3 can be drawn with without its T5")
    if len(tokenizers) > len(family.texts):
        raise ValueError(f"{len(tokenizers)} tokenizers for a model with {len(family.texts)} text encoders: name one for each (--tokenizer)")
    found = {**inside(file, weights, family), **_beside(file), **_elsewhere(others, family, net)}
    _check_complete(file, family, found, pipeline.optional)
    with errors_about(file):
        scheduler = _scheduler(file, weights, family, net, prediction)
        process, predicted = schedulers.from_config(scheduler)
        if size := family.sample_sizes.get(predicted):
            net = replace(net, sample_size=size)
        configs = {folder: text_config(text, _fitting(text, found[folder], net)) for folder, text in family.encoders.items()
                   if folder in found.keys() - without}
        network = load_network(row.module, net, own, device, dtype)
    vae = _load_vae(found["vae"], family, device, torch.float32 if dtype == torch.float16 else dtype)
    vae.config = vae.config if pipeline.shifts else replace(vae.config, shift_factor=0.0)
    encoders = []
    for i, (folder, text) in enumerate(family.encoders.items()):
        if folder not in configs:
            if folder not in without:
                print(f"note: {file} is drawn with without {text.name}: --parts SOURCE adds it", file=sys.stderr)
            encoders.append(TextEncoder(AbsentText(net.context_dim, lengths[i]), AbsentTokenizer()))
            continue
        module = load_text_part(text, found[folder], configs[folder], device, dtype)
        length = lengths[i] if i < len(lengths) and lengths[i] else module.config.context_length
        encoders.append(TextEncoder(module, _load_tokenizer(tokenizers, others, family, folder, length)))
    with errors_about(file):
        joined = TextEncoders(encoders, pipeline.join)
    defaults = pipelines.defaults(pipelines.find({"_class_name": family.pipeline}, file), {}, row.to_config(net))
    return Model(network, vae, joined, process, predicted, scheduler, defaults)


# ---- what a file holds


def _network(file: Path, weights: Weights) -> tuple[Family, Any, Weights]:
    """The family, the network's config and its weights. ValueError for files of other models, of other parts and of variants."""
    if what := families.other(weights.shapes):
        raise ValueError(f"{file} is {what}")
    found = families.find(weights.shapes)
    if found is None:
        there = sorted({_kind(part) for part in parts.in_file(file)})
        alone = f": it is {' and '.join(there)}. Name the file of the network, and this one with --parts" if there else ""
        raise ValueError(f"{file} is no checkpoint of {', '.join(sorted(family.name for family in families.FAMILIES))}: it holds no "
                         f"network of one ({families.NETWORK}*){alone}")
    own = weights.renamed(lambda name: name.removeprefix(found.prefix) if families.of_network(name, found.prefix) else "")
    row = NETWORKS[found.family.network]
    with errors_about(file):
        layout, own = recognise(own, {name: layout for name, layout in row.layouts.items() if layout.infer})
        config = layout.config_of(own.shapes)
        if config.in_channels > config.out_channels:
            what = families.MORE_INPUTS.get(config.in_channels, "a variant that takes more than noise and a caption")
            raise ValueError(f"the network takes {config.in_channels} channels and makes {config.out_channels}: it is {what}")
    return found.family, config, own


def _kind(part: Found) -> str:
    """'a VAE', 'a text encoder (T5)': what a part is, in words."""
    return "a VAE" if part.row.folder == "vae" else f"a text encoder ({part.row.module.__name__.removesuffix('Text')})"


def _beside(file: Path) -> dict[str, Found]:
    """The VAE in a file named after this one."""
    beside = next((vae for end in VAE_BESIDE if (vae := file.with_suffix(end)).is_file()), None)
    if beside is None:
        return {}
    there = parts.in_file(beside, AUTOENCODERS.values())
    if not there:
        raise ValueError(f"{beside} holds no VAE that can be recognised: rename it, or put the file of one in its place")
    return {"vae": there[0]}


def _elsewhere(sources: Sequence[str | Path], family: Family, net: Any) -> dict[str, Found]:
    """The parts in other sources. ValueError for a part that two hold, and for a source of which nothing is used."""
    found: dict[str, Found] = {}
    for source in sources:
        there = parts.in_source(source)
        places = [(place, part) for part in there if (place := _place(part, family, net))]
        for place, part in places:
            if place in found:
                raise ValueError(f"{found[place].source} and {part.source} both hold {_name(place, family)}: name one of them with --parts")
            found[place] = part
        if not places:
            raise ValueError(f"{source} holds {' and '.join(sorted({_kind(part) for part in there}))}, but {family.name} takes a VAE and "
                             f"{', '.join(text.name for text in family.texts)}, of the sizes that its network was trained with")
    return found


def _place(part: Found, family: Family, net: Any) -> str | None:
    """The part of the family that a found one can be; None for none."""
    if part.row.folder == "vae":
        return "vae"
    return next((folder for folder, text in family.encoders.items() if row_of(text) is part.row and text.fits(told(part), net)), None)


def _fitting(text: Text, found: Found, net: Any) -> Found:
    """The same part. ValueError where the network does not take a text encoder of this size."""
    if not text.fits(config := told(found), net):
        raise ValueError(f"{found.source}: its text encoder {text.name} is {config.width} wide, which the network does not take")
    return found


def _name(part: str, family: Family) -> str:
    return "a VAE" if part == "vae" else f"its text encoder {family.encoders[part].name}"


def _check_complete(file: Path, family: Family, found: Collection[str], optional: Collection[str]) -> None:
    """ValueError that says which parts are missing, and how to name sources of them."""
    prefixes = {"vae": families.VAE[0]} | {folder: text.prefix for folder, text in family.encoders.items() if folder not in optional}
    if lacking := [part for part in prefixes if part not in found]:
        named = " and no ".join(f"{_name(part, family).removeprefix('a ').removeprefix('its ')} ({prefixes[part]}*)" for part in lacking)
        raise ValueError(f"{file} holds the network of {family.name}, but no {named}: name files, folders or hub ids that do with "
                         f"--parts SOURCE ...")


# ---- the scheduler


def _scheduler(file: Path, weights: Weights, family: Family, net: Any, asked: str | None) -> dict:
    """The scheduler_config.json of the checkpoint. asked: the prediction that was asked for, which wins.

    An empty tensor `ztsnr` says that the curve ends at pure noise (AUTOMATIC1111/stable-diffusion-webui#16569). It is then sampled
    from its last entry on (arXiv:2305.08891, Section 3.3), by DDIM: PNDM has no such curve."""
    config = dict(family.scheduler(net))
    if family.prediction == "flow":
        if asked not in (None, "flow"):
            raise ValueError(f"{file} holds {family.name}, which predicts flow: leave out --prediction {asked}")
        return config
    prediction = asked or _stated_prediction(file, weights)
    if prediction is None:
        prediction = "eps" if weights.facts.get("global_step") == BASE_STEPS else family.prediction
    if families.ZERO_SNR in weights.shapes:
        if prediction == "eps":
            raise ValueError(f"{file} has zero terminal SNR (its tensor ztsnr says so), where eps tells nothing: pass --prediction v")
        config = families.DDIM | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config | {"prediction_type": schedulers.PREDICTION_TYPES[prediction]}


def _stated_prediction(file: Path, weights: Weights) -> str | None:
    """What the U-Net predicts, from the first of these that says so; None where none does:
    an empty tensor `v_pred` (AUTOMATIC1111/stable-diffusion-webui#16567); a NAME.yaml for CompVis' code, of which the one line that
    counts is found by a regex, so that no reader of YAML is needed; `modelspec.prediction_type` in the header (Stability-AI/ModelSpec).
    """
    if families.V_PRED in weights.shapes:
        return "v"
    names = {published: ours for ours, published in schedulers.PREDICTION_TYPES.items() if ours != "flow"}
    names |= {ours: ours for ours in names.values()}
    beside = file.with_suffix(".yaml")
    text = beside.read_text("utf-8", errors="replace") if beside.is_file() else ""
    if found := re.search(r"""^\s*parameterization\s*:\s*["']?(\w+)""", text, re.MULTILINE):
        return lookup(names, found[1], f"{beside}: parameterization")
    if re.search(r"^\s*target\s*:.*Diffusion\s*$", text, re.MULTILINE):       # the default of CompVis' LatentDiffusion
        return "eps"
    stated = weights.facts.get("modelspec.prediction_type")
    return lookup(names, str(stated), f"{file}: modelspec.prediction_type") if stated else None


# ---- the parts


def _load_vae(found: Found, family: Family, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    with errors_about(found.source):
        return load_network(found.row.module, vae_config(found, family), found.weights, device, dtype)


def vae_config(found: Found, family: Family | None) -> Any:
    """The config of a VAE that was found: its own, else of this family, which tells its scaling and shift."""
    if found.config is None and found.row is AUTOENCODERS["kl"] and family:
        return vaes.infer(found.weights.shapes, family.scaling)
    return told(found)


def _load_tokenizer(named: Sequence[str | Path], others: Sequence[str | Path], family: Family, folder: str, context_length: int) -> BaseTokenizer:
    """The tokenizer of a text encoder: from its own folder in a named source or a source of parts, else the named one of its kind, or
    the one in its place where there is one for each, else its publisher's from the hub."""
    text, own = family.encoders[folder], folder.replace("text_encoder", "tokenizer")
    try:
        located = [hub.locate(source, needed.of_tokenizer) for source in named]
        ours = [path / own for path in (*located, *map(Path, others)) if len(family.texts) > 1 and (path / own).is_dir()]
        ours += [located[[*family.encoders].index(folder)]] if len(located) == len(family.texts) else located
        return find_tokenizer(row_of(text), ours, context_length, text.pad_token)
    except (ValueError, OSError) as error:
        raise ValueError(f"a single-file checkpoint holds no tokenizer: name that of {text.name} with --tokenizer, as a folder with its "
                         f"files ({files_of(row_of(text))}), or a model folder ({error})") from error


# ---- written as one file


def why_not_one_file(model: Model) -> str | None:
    """Why other programs would not load the model correctly from one file, which has no config: they build the networks and
    scheduler of Stable Diffusion 1. None where these are the model's."""
    texts = [module.config for module in model.text.modules.values()]
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    sized = lambda config, like: replace(like, sample_size=getattr(config, "sample_size", None)) == config
    reasons = {
        "a U-Net of Stable Diffusion 1's shape": sized(model.net.config, UNetConfig()),
        "its VAE's shape and scaling factor": sized(model.vae.config, VAEConfig()),
        "OpenAI's CLIP-L with quick_gelu": len(texts) == 1 and isinstance(texts[0], CLIPTextConfig)
        and replace(texts[0], **ids) == replace(CLIPTextConfig(), **ids),
        "the scaled_linear process and eps-prediction": schedulers.read_process(model.scheduler)
        == schedulers.read_process(SD1 | {"prediction_type": "epsilon"}),
    }
    lacking = [name for name, present in reasons.items() if not present]
    return f"one-file checkpoints are read as Stable Diffusion 1, which has {lacking[0]}" if lacking else None


def checkpoint_tensors(model: Model) -> dict[str, Tensor]:
    """All weights of a model with a U-Net under CompVis' names, on the CPU."""
    tables = {"net": unets.LAYOUTS["CompVis"], "vae": vaes.LAYOUTS["CompVis"], "text": clip.LAYOUTS["transformers"]}
    modules = model.modules
    return {PREFIXES[part] + name: tensor for part, layout in tables.items() for name, tensor in export_renamed(
        modules[part].state_dict(), layout.rules(modules[part].config)).items()}


def save_checkpoint(file: str | Path, model: Model) -> None:
    """Write the model as one file. ValueError where it is not a Stable Diffusion 1; OSError where it cannot be written."""
    if reason := why_not_one_file(model):
        raise ValueError(reason)
    about = modelspec("stable-diffusion-v1", Path(file).stem, model.defaults.get("resolution"), model.prediction)
    write_weights(Path(file), checkpoint_tensors(model), about)
