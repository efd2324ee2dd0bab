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
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from tinyldm.tokenizer import Tokenizer
from tinyldm.vendor_loaders import scheduler as schedulers
from tinyldm.vendor_loaders import unet as unets
from tinyldm.vendor_loaders.kinds import KINDS, NON_EMA, OWN_DIT, VAE, Kind, StateDict, first_layout
from tinyldm.vendor_loaders.rename import export_renamed
from tinyldm.vendor_loaders.weights import INCOMPLETE, write_weights

Part = nn.Module | tuple[nn.Module, StateDict] | str | Path     # a module, one with other weights, a written folder

PIPELINE, OWN_PIPELINE = "StableDiffusionPipeline", "TinyLDMPipeline"


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


def save_vae(path: str | Path, vae: VAE, state_dict: StateDict | None = None) -> None:
    """Write a VAE's part folder (config.json and weights) to path, which is created, and flush it to the disk."""
    write_part(path, vae, state_dict)
    _sync(Path(path))


def write_part(path: str | Path, module: nn.Module, state_dict: StateDict | None = None) -> None:
    """config.json and weights of any network in KINDS, under published names. state_dict: other weights, same keys."""
    path, kind = Path(path), KINDS[type(module)]
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", kind.to_config(module.config))
    save_weights(path / weights_name(kind, None), module, state_dict)


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
    write_weights(file, export_renamed(tensors, first_layout(module).rules(module.config)))


def weights_name(kind: Kind, variant: str | None) -> str:
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
        save_weights(path / weights_name(KINDS[type(module)], NON_EMA), module, raw)


def _model_index(path: Path, network: str, scheduler: dict) -> dict:
    """model_index.json, in the form that diffusers writes."""
    text = read_json(path / "text_encoder" / "config.json", INCOMPLETE)["architectures"][0]
    vae = read_json(path / "vae" / "config.json", INCOMPLETE)
    public = (network == "unet" and scheduler["_class_name"] != schedulers.OWN and not vae.get("shift_factor")
              and not vae["_class_name"].startswith("TinyLDM") and text == "CLIPTextModel")
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
        "vae": ours(vae["_class_name"]),
    }


def _write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)        # as in save_weights
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(file: Path, fix: str) -> dict:
    if not file.exists():
        raise ValueError(f"{file} does not exist: {fix}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {INCOMPLETE}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (it holds no {{...}}): {INCOMPLETE}")
    return content


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
