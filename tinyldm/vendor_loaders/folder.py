"""The model folder: what training exports, what sampling reads and what the hub publishes, one layout for all.

    model_index.json           which part is which class
    tinyldm.json               how to sample by default (sampler, steps, ...); other libraries ignore it
    unet/ or transformer/      config.json, diffusion_pytorch_model.safetensors
    vae/                       config.json, diffusion_pytorch_model.safetensors
    text_encoder/              config.json, model.safetensors
    tokenizer/                 vocab.json, merges.txt, ...
    scheduler/                 scheduler_config.json: what the network learned (scheduler.py)

The weights of the network and the text encoder are the averaged ones (EMA); where raw ones are saved too they
lie beside them as the variant `non_ema`, as Stable Diffusion 1.5's do. The folder is diffusers': model_index.json
names StableDiffusionPipeline where that pipeline computes the same pictures, and TinyLDMPipeline, which only
tinyldm opens, where it would not (a DiT; a scheduler of our own; a VAE with shift_factor, which it ignores; a
text encoder with projection, whose outputs it takes in another order). Parts are published classes even then,
the DiT excepted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyldm.diffusion.process import Process
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.unet import UNet
from tinyldm.models.vae import AutoencoderKL
from tinyldm.tokenizer import Tokenizer
from tinyldm.vendor_loaders import clip
from tinyldm.vendor_loaders import scheduler as schedulers
from tinyldm.vendor_loaders import unet as unets
from tinyldm.vendor_loaders import vae as vaes
from tinyldm.vendor_loaders.rename import Rules, export_renamed, load_renamed

StateDict = Mapping[str, Tensor]
Part = nn.Module | tuple[nn.Module, StateDict] | str | Path     # a module, one with other weights, a written folder

PIPELINE, OWN_PIPELINE = "StableDiffusionPipeline", "TinyLDMPipeline"
OWN_DIT = "TinyLDMDiT"
NON_EMA = "non_ema"


class Kind(NamedTuple):
    """How one class of network is stored."""

    folder: str
    stem: str                                   # of the weights file
    rules: Rules
    to_config: Callable[[Any], dict]
    from_config: Callable[[dict], Any]
    accept: Callable[[StateDict, nn.Module], StateDict]      # older and larger files -> what `rules` expects


def _dit_to_config(config: DiTConfig) -> dict:
    return {"_class_name": OWN_DIT} | asdict(config)


def _dit_from_config(config: dict) -> DiTConfig:
    if config.get("_class_name") != OWN_DIT:
        raise ValueError(f"config.json describes a {config.get('_class_name')}: of transformers only {OWN_DIT} can be read")
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := fields.keys() - asdict(DiTConfig()).keys():
        raise ValueError(f"{OWN_DIT} config has unknown fields ({', '.join(sorted(unknown))}): is it of a newer version?")
    return DiTConfig(**fields)


def _as_is(tensors: StateDict, module: nn.Module) -> StateDict:
    return tensors


def _modernise(tensors: StateDict, module: nn.Module) -> StateDict:
    return vaes.modernise(tensors)


def _text_tower(tensors: StateDict, module: CLIPText) -> StateDict:
    """Without the image tower, without what transformers 4 stored beside weights, and prefixed as it did."""
    unused = ("vision_model.", "visual_projection.", "logit_scale")
    unused += ("text_projection.",) if module.projection is None else ()
    kept = {name: tensor for name, tensor in tensors.items()
            if not name.startswith(unused) and not name.endswith("position_ids")}
    bare = not any(name.startswith("text_model.") for name in kept)          # transformers 5
    return {f"text_model.{name}" if bare and not name.startswith("text_projection.") else name: tensor
            for name, tensor in kept.items()}


WEIGHTS = "diffusion_pytorch_model"
KINDS = {
    UNet: Kind("unet", WEIGHTS, unets.UNET_RULES, unets.to_config, unets.from_config, _as_is),
    DiT: Kind("transformer", WEIGHTS, [], _dit_to_config, _dit_from_config, _as_is),
    AutoencoderKL: Kind("vae", WEIGHTS, vaes.VAE_RULES, vaes.to_config, vaes.from_config, _modernise),
    CLIPText: Kind("text_encoder", "model", clip.CLIP_RULES, clip.to_config, clip.from_config, _text_tower),
}


@dataclass
class Model:
    """A loaded model folder: networks in eval mode, without gradients."""

    net: UNet | DiT
    vae: AutoencoderKL
    text: CLIPText
    tokenizer: Tokenizer
    process: Process
    prediction: str
    scheduler: dict         # scheduler_config.json as it was read: save_model takes it back
    defaults: dict          # tinyldm.json, {} where there is none


def save_model(path: str | Path, *, net: nn.Module | tuple[nn.Module, StateDict], vae: Part, text: Part,
               tokenizer: Tokenizer | str | Path, scheduler: dict, defaults: dict,
               non_ema: Mapping[str, StateDict] | None = None) -> None:
    """Write a whole model folder to path, which must not exist yet, and flush it to the disk.

    net, vae, text   a module, or (module, state_dict) to write other weights such as an EMA's; all but net also
                     as the path of a part folder written earlier, which is hard-linked: the frozen is stored once
    scheduler        from scheduler.to_config
    defaults         anything JSON can hold
    non_ema          {"net": state_dict, "text": state_dict}, raw weights to store beside the averaged ones

    FileExistsError, OSError (a full disk among them); ValueError where a state dict is not its module's.
    A crash leaves a torso: write to a temporary name and rename it.
    """
    path, non_ema = Path(path), non_ema or {}
    path.mkdir(parents=True)
    if non_ema.keys() - {"net", "text"}:
        raise ValueError(f"non_ema takes 'net' and 'text', not {', '.join(non_ema)}")
    network = KINDS[type(net[0] if isinstance(net, tuple) else net)].folder
    _save_part(path / network, net, non_ema.get("net"))
    _save_part(path / "text_encoder", text, non_ema.get("text"))
    _save_part(path / "vae", vae, None)
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(path / "tokenizer")
    else:
        _link(Path(tokenizer), path / "tokenizer")
    _write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(path / "tinyldm.json", defaults)
    _write_json(path / "model_index.json", _model_index(path, network, scheduler))
    _sync(path)


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
               ema: bool = True) -> Model:
    """Read a model folder: one of ours, or a published Stable Diffusion 1 or 2. ema=False: the raw weights.

    All networks get this dtype; a VAE in float16 can overflow, so decode with model.vae.float() then.
    ValueError, with what to do, for a folder that is missing, incomplete, damaged or of another architecture.
    """
    path = Path(path)
    index = _read_json(path / "model_index.json", "not a model folder: pass one that holds model_index.json")
    if index.get("_class_name") not in (PIPELINE, OWN_PIPELINE):
        raise ValueError(f"{path} holds a {index.get('_class_name')}: only {PIPELINE} and {OWN_PIPELINE} can be read")
    variant = None if ema else NON_EMA
    network = DiT if "transformer" in index else UNet
    net = _load_part(path / KINDS[network].folder, network, variant)
    text = _load_part(path / "text_encoder", CLIPText, variant, optional_variant=True)
    vae = _load_part(path / "vae", AutoencoderKL)
    if not (path / "tokenizer").is_dir():
        raise ValueError(f"{path} has no tokenizer/: {INCOMPLETE}")
    tokenizer = Tokenizer.load(path / "tokenizer")
    scheduler = _read_json(path / "scheduler" / "scheduler_config.json", INCOMPLETE)
    learned = schedulers.from_config(scheduler)
    defaults = path / "tinyldm.json"
    return Model(*(part.to(device, dtype) for part in (net, vae, text)), tokenizer, *learned, scheduler,
                 _read_json(defaults, INCOMPLETE) if defaults.exists() else {})


def save_vae(path: str | Path, vae: AutoencoderKL, state_dict: StateDict | None = None) -> None:
    """Write a VAE's part folder (config.json and weights) to path, which is created, and flush it to the disk."""
    write_part(path, vae, state_dict)
    _sync(Path(path))


def load_vae(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Read a VAE from its part folder or from the model folder around it; eval mode, without gradients."""
    path = Path(path)
    inside = (path / "vae" / "config.json").exists()
    return _load_part(path / "vae" if inside else path, AutoencoderKL).to(device, dtype)


def load_text(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> CLIPText:
    """Read a CLIP text encoder from its part folder or from the model folder around it; eval mode, without gradients."""
    path = Path(path)
    inside = (path / "text_encoder" / "config.json").exists()
    return _load_part(path / "text_encoder" if inside else path, CLIPText).to(device, dtype)


def write_part(path: str | Path, module: nn.Module, state_dict: StateDict | None = None) -> None:
    """config.json and weights of any network in KINDS, under published names. state_dict: other weights, same keys."""
    path, kind = Path(path), KINDS[type(module)]
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", kind.to_config(module.config))
    save_weights(path / _weights_name(kind, None), module, state_dict)


def save_weights(file: str | Path, module: nn.Module, state_dict: StateDict | None = None) -> None:
    """One safetensors file of module's weights, or of state_dict in their place. OSError where it cannot be written."""
    own = module.state_dict()
    tensors = own if state_dict is None else state_dict
    if tensors.keys() != own.keys():
        odd = sorted(tensors.keys() ^ own.keys())
        raise ValueError(f"the state dict is not of this {type(module).__name__}: {len(odd)} names differ ({odd[0]}, "
                         f"for example). Pass the raw module's, not a compiled or wrapped one's")
    file = Path(file)
    file.unlink(missing_ok=True)        # other folders may be linked to the old contents
    try:    # the note: published files carry it, and transformers 4 refused files that do not
        save_file(export_renamed(tensors, KINDS[type(module)].rules), file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error


def load_weights(module: nn.Module, file: str | Path) -> None:
    """Read a safetensors file with published names into module (on any device, meta too); strict. ValueError."""
    kind, file = KINDS[type(module)], Path(file)
    if not file.exists():
        raise ValueError(f"{file} does not exist: {INCOMPLETE}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): {INCOMPLETE}") from error
    try:
        load_renamed(module, kind.accept(tensors, module), kind.rules)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


INCOMPLETE = "copy or download the folder again, or export it anew"


def _weights_name(kind: Kind, variant: str | None) -> str:
    return f"{kind.stem}.{variant}.safetensors" if variant else f"{kind.stem}.safetensors"


def _save_part(path: Path, part: Part, raw: StateDict | None) -> None:
    if isinstance(part, (str, Path)):
        if raw is not None:
            raise ValueError(f"non_ema weights for {part}, which is only linked: pass the module instead")
        _link(Path(part), path)
        return
    module, weights = part if isinstance(part, tuple) else (part, None)
    write_part(path, module, weights)
    if raw is not None:
        save_weights(path / _weights_name(KINDS[type(module)], NON_EMA), module, raw)


def _load_part(path: Path, network: type, variant: str | None = None, optional_variant: bool = False) -> nn.Module:
    kind = KINDS[network]
    try:
        config = kind.from_config(_read_json(path / "config.json", INCOMPLETE))
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
    with torch.device("meta"):                  # no memory and no time for weights that are replaced at once
        module = network(config)
    file = path / _weights_name(kind, variant)
    if variant and not file.exists():
        if not optional_variant:
            raise ValueError(f"{path} has no raw weights ({file.name}): load the averaged ones (ema=True)")
        file = path / _weights_name(kind, None)     # a text encoder that was not trained has one set only
    load_weights(module, file)
    return module.eval().requires_grad_(False)


def _model_index(path: Path, network: str, scheduler: dict) -> dict:
    """model_index.json, in the form that diffusers writes."""
    text = _read_json(path / "text_encoder" / "config.json", INCOMPLETE)["architectures"][0]
    shifted = _read_json(path / "vae" / "config.json", INCOMPLETE).get("shift_factor")
    public = (network == "unet" and scheduler["_class_name"] != schedulers.OWN and not shifted
              and text == "CLIPTextModel")
    ours = lambda name: ["tinyldm" if name.startswith("TinyLDM") else "diffusers", name]
    index = {"_class_name": PIPELINE if public else OWN_PIPELINE}
    if public:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False,
                  "feature_extractor": [None, None], "image_encoder": [None, None]}
    return index | {
        "scheduler": ours(scheduler["_class_name"]),
        "text_encoder": ["transformers", text],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        network: ours(unets.CLASS if network == "unet" else OWN_DIT),
        "vae": ours(vaes.CLASS),
    }


def _write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)        # as in save_weights
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(file: Path, fix: str) -> dict:
    if not file.exists():
        raise ValueError(f"{file} does not exist: {fix}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {INCOMPLETE}") from error


def _link(source: Path, target: Path) -> None:
    """A second name for every file of a folder; copies where the file system has no hard links."""
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: pass a part folder written earlier")
    target.mkdir()
    for file in sorted(file for file in source.iterdir() if file.is_file()):
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)


def _sync(path: Path) -> None:
    """Flush a folder to the disk, files first: after a power cut it is whole, or not there under its final name."""
    for entry in [*path.rglob("*"), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
