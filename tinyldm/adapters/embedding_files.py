"""The files of textual inversion, as diffusers, AUTOMATIC1111 and kohya write them.

    diffusers       .safetensors or .bin: {"<my-dog>": [n, width]}, or [width]
    kohya           .safetensors: {"emb_params": [n, width]}; the token is the file's name
    AUTOMATIC1111   .pt: {"string_to_param": {"*": [n, width]}, "name": token, ...}
                    .png, .webp: the same in a picture (embedding_pictures.py)
    SDXL and others {"clip_l": [n, 768], "clip_g": [n, 1280]}, one tensor for each text encoder

Sources: huggingface/diffusers, loaders/textual_inversion.py; kohya-ss/sd-scripts, train_textual_inversion.py and
sdxl_train_textual_inversion.py; AUTOMATIC1111/stable-diffusion-webui, modules/textual_inversion. All of them read the safetensors files
that are written here; pickles are only read, with weights_only=True.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyldm.adapters.embedding_pictures import PICTURES, read_picture
from tinyldm.files import flush
from tinyldm.folders.modelspec import modelspec
from tinyldm.folders.weights import PICKLES, errors_about, open_weights, unpickle, write_weights
from tinyldm.lookup import lookup
from tinyldm.model import Model
from tinyldm.text.encoders import part_name

STANDARD = "learned_embeds.safetensors"    # diffusers' name of such a file
PARAMS = "emb_params"
# What the tensors of a model's text encoders are called, by the rule that joins these; of a single encoder it is the token.
ENCODERS = {"sdxl": ("clip_l", "clip_g"), "sd3": ("clip_l", "clip_g", "t5xxl"), "flux": ("clip_l", "t5xxl")}
# Layout -> the name of a single tensor in it.
WRITTEN = {"diffusers": lambda token: token, "kohya": lambda token: PARAMS}
# The published families, by the widths of these tensors.
FAMILIES = [
    ({"": 768}, "Stable Diffusion 1"),
    ({"": 1024}, "Stable Diffusion 2"),
    ({"clip_l": 768, "clip_g": 1280}, "Stable Diffusion XL and 3"),
    ({"clip_l": 768, "clip_g": 1280, "t5xxl": 4096}, "Stable Diffusion 3"),
    ({"clip_l": 768, "t5xxl": 4096}, "FLUX"),
]


class Embedding(NamedTuple):
    token: str
    vectors: dict[str, Tensor]          # part name (text, text_2 ...) -> [n, width], float32, on the CPU


def split_token(typed: str | Path) -> tuple[Path, str | None]:
    """FILE or FILE:TOKEN, as it was typed -> the file, and the token or None."""
    file, colon, token = str(typed).rpartition(":")
    return (Path(file), token) if colon and not Path(typed).exists() and Path(file).exists() else (Path(typed), None)


def save_embedding(path: str | Path, token: str, vectors: Mapping[str, Tensor], model: Model, layout: str = "diffusers",
                   metadata: Mapping[str, str] | None = None) -> None:
    """Write vectors {part: [n, width]} to a .safetensors file, all of it or nothing. layout: a key of WRITTEN, for models with one text
    encoder; the others have one. metadata: further texts for the header, in which the token stands too."""
    path, name, slots = Path(path), lookup(WRITTEN, layout, "layout of embeddings")(token), _slots(model)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: embeddings are written as .safetensors, which diffusers and AUTOMATIC1111 read: use that ending")
    if odd := [part for part in vectors if part not in slots.values()]:
        raise ValueError(f"the model has no text encoder {odd[0]}: it has {', '.join(slots.values())}")
    names = {part: slot or name for slot, part in slots.items()}
    tensors = {names[part]: rows.detach().cpu().contiguous() for part, rows in vectors.items()}
    partial = path.with_name(f".writing-{path.name}")
    try:
        about = modelspec("tinyldm/textual-inversion", token, trigger_phrase=token)
        write_weights(partial, tensors, about | {**(metadata or {}), "token": token})
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def read_embedding(path: str | Path, model: Model, token: str | None = None) -> Embedding:
    """Read an embedding in any of the layouts for this model. path: a file, or a folder that holds one under its standard name.
    token: what to call it instead of its own name. ValueError for a file that is none, is damaged, or is for another model."""
    path = Path(path)
    path = path / STANDARD if path.is_dir() else path
    with errors_about(path):
        name, tensors = _of_content(read_picture(path), {}) if path.suffix.lower() in PICTURES else _read_tensors(path)
        rows = {key: _checked(tensor) for key, tensor in tensors.items()}
        return Embedding(token or name or path.stem, _placed(path, rows, model))


def _read_tensors(path: Path) -> tuple[str | None, Mapping[str, Tensor]]:
    """The token, None where it is the file's name, and the tensors: one, or one for each text encoder by its name."""
    if path.suffix.lower() in PICKLES and path.is_file():
        with torch.serialization.safe_globals([nn.ParameterDict]):          # in which old versions of AUTOMATIC1111 keep the vectors
            return _of_content(unpickle(path), {})
    weights = open_weights(path)
    if len(weights.shapes) > max(map(len, ENCODERS.values())):              # not read before that is known: it may be a whole model
        raise ValueError(_not_one(weights.shapes))
    return _of_content(dict(weights.stream()), weights.facts)


def _of_content(content: Any, facts: Mapping[str, object]) -> tuple[str | None, Mapping[str, Tensor]]:
    """As _read_tensors, from what a file holds."""
    if isinstance(content, Tensor):
        return None, {"": content}
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}: is it an embedding?")
    if "string_to_param" in content:
        params = content["string_to_param"]
        params = vars(params)["_parameters"] if isinstance(params, nn.ParameterDict) else params
        if not isinstance(params, Mapping) or len(params) != 1:
            raise ValueError("string_to_param does not hold one tensor: is it an embedding?")
        return content.get("name"), {"": next(iter(params.values()))}
    token = facts.get("token")
    names = {name for row in ENCODERS.values() for name in row}
    if content and content.keys() <= names:
        return token, content
    if len(content) != 1:
        raise ValueError(_not_one(content))
    (name, tensor), = content.items()
    return token or (None if name == PARAMS else str(name)), {"": tensor}


def _not_one(names: Iterable[str]) -> str:
    names = sorted(map(str, names))
    kind = "a LoRA: give it as --lora" if any("lora" in name.lower() for name in names) else "a model, or a part of one?"
    return f"holds {len(names)} tensors ({', '.join(names[:2])} ...), where an embedding has one, or clip_l and clip_g: it is {kind}"


def _checked(tensor: Any) -> Tensor:
    """[n, width] in float32, of what a file holds as vectors."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim not in (1, 2) or 0 in tensor.shape:
        what = f"{tensor.dtype} of shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"holds {what}, where an embedding has numbers [vectors, width]: is it an embedding?")
    rows = tensor.detach().float().clone().reshape(-1, tensor.shape[-1])
    if not rows.isfinite().all():
        raise ValueError("its vectors are not finite: it was trained to its ruin")
    return rows


def _slots(model: Model) -> dict[str, str]:
    """The name of a text encoder's tensor -> its part. Of a single encoder the name is ''."""
    return {name: part_name(i) for i, name in enumerate(ENCODERS.get(model.text.join, ("",)))}


def _placed(path: Path, rows: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Tensors by name -> those by part. ValueError where they are for another model."""
    slots, widths = _slots(model), {part: module.config.width for part, module in model.text.modules.items()}
    if "" in rows and "" not in slots:                      # for one of several text encoders: the width says for which
        fitting = [part for part, width in widths.items() if width == rows[""].shape[1]]
        if len(fitting) == 1:
            others = " and ".join(part for part in widths if part not in fitting)
            print(f"note: {path} is for the text encoder {fitting[0]} alone: {others} reads its token as plain text", file=sys.stderr)
            return {fitting[0]: rows[""]}
    missing = {slot for slot, part in slots.items() if part not in widths}          # left out, as T5 may be
    rows = {name: tensor for name, tensor in rows.items() if name not in missing}
    if not rows or any(widths.get(slots.get(name)) != tensor.shape[1] for name, tensor in rows.items()):
        own = {slot: widths[part] for slot, part in slots.items() if part in widths}
        raise ValueError(f"has vectors {_in_words({name: tensor.shape[1] for name, tensor in rows.items()})}, and the model's text "
                         f"encoders are {_in_words(own)}: take an embedding that was made for this model")
    return {slots[name]: tensor for name, tensor in rows.items()}


def _in_words(widths: Mapping[str, int]) -> str:
    """Name of a tensor -> width, as "768 wide (Stable Diffusion 1)"."""
    sizes = " and ".join(f"{name} {width}".strip() for name, width in sorted(widths.items(), key=lambda item: item[1]))
    family = next((family for names, family in FAMILIES if names == widths), "")
    return f"{sizes} wide" + f" ({family})" * bool(family)
