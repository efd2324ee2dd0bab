"""The model folder: what training exports, what sampling reads and what the hub publishes, one layout for all.

    model_index.json           which part is which class
    tinyldm.json               defaults for sampling (sampler, steps, ...); other libraries ignore it
    unet/ or transformer/      config.json, diffusion_pytorch_model.safetensors
    vae/                       config.json, diffusion_pytorch_model.safetensors
    text_encoder/              config.json, model.safetensors
    tokenizer/                 vocab.json, merges.txt, ...
    scheduler/                 scheduler_config.json: the process and prediction that the network learned (scheduler.py)

The weights of the network and the text encoder are the averaged ones (EMA); where raw ones are saved too they
lie beside them as the variant `non_ema`, as Stable Diffusion 1.5's do. The folder is diffusers': model_index.json
names a published pipeline where that computes the same pictures (vendor_loaders/pipelines.py: StableDiffusionPipeline
for a U-Net and CLIP), and TinyLDMPipeline, which only tinyldm opens, where none would (a DiT; a scheduler of our own;
a U-Net's VAE with shift_factor, which is ignored there). Parts are published classes even then, the DiT excepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tinyldm.files import INCOMPLETE, flush_folder, link, read_json
from tinyldm.folders.modelspec import IMPLEMENTATION, modelspec
from tinyldm.folders.rename import export_renamed
from tinyldm.folders.weights import write_weights
from tinyldm.model import NON_EMA, Architecture, Model, StateDict, architecture
from tinyldm.text.absent import AbsentText
from tinyldm.text.encoders import TextEncoders, part_name
from tinyldm.text.base_tokenizer import BaseTokenizer
from tinyldm.vendor_loaders import pipelines
from tinyldm.vendor_loaders.layout import Rules

Part = nn.Module | tuple[nn.Module, StateDict] | str | Path     # a module; a module and weights to use instead; a written folder


def save_model(path: str | Path, *, net: nn.Module | tuple[nn.Module, StateDict], vae: Part, texts: Sequence[Part],
               tokenizers: Sequence[BaseTokenizer | str | Path], scheduler: dict, defaults: dict,
               non_ema: Mapping[str, StateDict] | None = None) -> None:
    """Write a whole model folder to path, which must not exist yet, and flush it to the disk.

    net, vae, texts   a module, or (module, state_dict) to write other weights such as an EMA's. vae and texts may also be the path
                      of a part folder written earlier, which is hard-linked, so that frozen networks are stored once
    texts, tokenizers lists with one entry for each text encoder
    scheduler         from scheduler.to_config
    defaults          anything JSON can hold
    non_ema           {"net": state_dict, "text": state_dict, ...}, raw weights to store beside the averaged ones

    FileExistsError; OSError, for a full disk too; ValueError where a state dict is not its module's.
    A crash leaves an incomplete folder: write to a temporary name and rename it (files.replace_folder).
    """
    path, raw = Path(path), dict(non_ema or {})
    path.mkdir(parents=True)
    row = architecture(net[0] if isinstance(net, tuple) else net)
    title = " ".join(str(defaults[name]) for name in ("preset", "step") if defaults.get(name) is not None) or path.name
    about = modelspec(f"{IMPLEMENTATION}/{row.classes[0]}", title, defaults.get("resolution"))
    _save_part(path / row.folder, net, raw.pop("net", None), about)
    _save_texts(path, texts, tokenizers, raw)
    _save_part(path / "vae", vae, raw.pop("vae", None))
    if raw:
        raise ValueError(f"non_ema takes the network, the text encoders and the autoencoder, not {', '.join(raw)}")
    _write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(path / "tinyldm.json", defaults)
    _write_json(path / "model_index.json", _model_index(path, row, scheduler, defaults))
    flush_folder(path)


def save_loaded(path: str | Path, model: Model) -> None:
    """save_model of a whole model as it is in memory."""
    there = [(module, tokenizer) for module, tokenizer in model.text.encoders if not isinstance(module, AbsentText)]
    save_model(path, net=model.net, vae=model.vae, texts=[module for module, _ in there], tokenizers=[words for _, words in there],
               scheduler=model.scheduler, defaults=model.defaults)


def save_texts(path: str | Path, text: TextEncoders) -> None:
    """Write text encoders to path, which must not exist yet: a model folder without the other parts, which load_texts reads, and of
    whose parts save_model makes links. Flush it to the disk."""
    path = Path(path)
    path.mkdir(parents=True)
    _save_texts(path, [*text.modules.values()], text.tokenizers, {})
    _write_json(path / "tinyldm.json", {"text_join": text.join})
    _write_json(path / "model_index.json", {"_class_name": pipelines.OWN})
    flush_folder(path)


def text_folders(i: int) -> tuple[str, str]:
    """The folders of a model's i-th text encoder, counted from 0, and of its tokenizer."""
    number = f"_{i + 1}" if i else ""
    return f"text_encoder{number}", f"tokenizer{number}"


def save_part(path: str | Path, module: nn.Module, state_dict: StateDict | None = None, non_ema: StateDict | None = None) -> None:
    """Write a network's part folder (config.json and weights) to path, which is created, and flush it to the disk. state_dict: weights to
    write instead of the network's own. non_ema: raw weights to store beside averaged ones."""
    _save_part(Path(path), module if state_dict is None else (module, state_dict), non_ema)
    flush_folder(Path(path))


def write_part(path: str | Path, module: nn.Module, state_dict: StateDict | None = None, about: Mapping[str, str] | None = None) -> None:
    """Write config.json and weights of any network in the tables of model.py, under published names. state_dict: weights to write
    instead of the module's own, with the same keys. about: what the header says (modelspec.py); by default the class alone."""
    path, row = Path(path), architecture(module)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", row.to_config(module.config))
    save_weights(path / weights_name(row, None), module, state_dict, about)


def save_weights(file: str | Path, module: nn.Module, state_dict: StateDict | None = None, about: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file of module's weights, or of state_dict instead. OSError where it cannot be written."""
    own = module.state_dict()
    tensors = own if state_dict is None else state_dict
    if tensors.keys() != own.keys():
        odd = sorted(tensors.keys() ^ own.keys())
        raise ValueError(f"the state dict is not of this {type(module).__name__}: {len(odd)} names differ ({odd[0]}, "
                         f"for example). Pass the raw module's, not a compiled or wrapped one's")
    file = Path(file)
    file.unlink(missing_ok=True)        # do not overwrite it in place: other folders may hold hard links to it
    name = architecture(module).classes[0]
    write_weights(file, export_renamed(tensors, written_rules(module)), about or modelspec(f"{IMPLEMENTATION}/{name}", name))


def written_rules(module: nn.Module) -> Rules:
    """The rename rules with which a network is written: our tensor names -> those in its file."""
    return next(iter(architecture(module).layouts.values())).rules(module.config)


def weights_name(row: Architecture, variant: str | None) -> str:
    return f"{row.stem}.{variant}.safetensors" if variant else f"{row.stem}.safetensors"


def _save_texts(path: Path, texts: Sequence[Part], tokenizers: Sequence[BaseTokenizer | str | Path], raw: dict[str, StateDict]) -> None:
    """Arguments as of save_model; raw weights that are written are removed from `raw`."""
    for i, (text, tokenizer) in enumerate(zip(texts, tokenizers, strict=True)):
        encoder, words = text_folders(i)
        _save_part(path / encoder, text, raw.pop(part_name(i), None))
        if isinstance(tokenizer, (str, Path)):
            _link(Path(tokenizer), path / words)
        else:
            tokenizer.save(path / words)


def _save_part(path: Path, part: Part, raw: StateDict | None, about: Mapping[str, str] | None = None) -> None:
    if isinstance(part, (str, Path)):
        if raw is not None:
            raise ValueError(f"non_ema weights for {part}, which is only linked: pass the module instead")
        _link(Path(part), path)
        return
    module, weights = part if isinstance(part, tuple) else (part, None)
    write_part(path, module, weights, about)
    if raw is not None:
        save_weights(path / weights_name(architecture(module), NON_EMA), module, raw, about)


def _model_index(path: Path, row: Architecture, scheduler: dict, defaults: Mapping[str, Any]) -> dict:
    """model_index.json, in the form that diffusers writes."""
    config = lambda part: read_json(path / part / "config.json", INCOMPLETE)
    texts = {folder.name: config(folder.name) for folder in sorted(path.glob("text_encoder*"))}
    parts = pipelines.Configs(scheduler, config(row.folder), config("vae"), [*texts.values()])
    name = pipelines.for_parts(parts, defaults.get("text_join", "single"))
    pipeline = pipelines.PIPELINES[name]
    listed = lambda library, kind: ["tinyldm" if kind.startswith("TinyLDM") else library, kind]
    index = {"_class_name": name, **pipeline.index, "scheduler": listed("diffusers", scheduler["_class_name"])}
    for folder in pipeline.optional:
        index[folder] = index[folder.replace("text_encoder", "tokenizer")] = [None, None]
    for folder, text in texts.items():
        index[folder] = listed("transformers", pipelines.class_name(text))
        words = folder.replace("text_encoder", "tokenizer")
        kind = read_json(path / words / "tokenizer_config.json", INCOMPLETE).get("tokenizer_class", "CLIPTokenizer")
        index[words] = listed("transformers", kind.removesuffix("Fast"))
    if name == pipelines.SDXL:
        index[pipelines.ZERO_NEGATIVE] = defaults.get("zero_negative", False)
    return index | {row.folder: listed("diffusers", row.classes[0]), "vae": listed("diffusers", parts.vae["_class_name"])}


def _write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)        # do not overwrite it in place: other folders may hold hard links to it
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """Hard-link every file of a folder into a new folder; copy them where the file system has no hard links."""
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: pass a part folder written earlier")
    target.mkdir()
    for file in sorted(file for file in source.iterdir() if file.is_file()):
        link(file, target / file.name)
