"""The names of tensors in files of adapters.

A tensor's name consists of a prefix for a part of the model, the path of a layer in a published layout, and a field of the layer:

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight       kohya: _ for the dots of the path
    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight               diffusers, peft
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight         diffusers before peft
    down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight         the oldest of diffusers

The paths come from the rename rules by which the models themselves are read: all of them are written down once (`known_layers`), and
looked up. Whether a word ends with . or _ makes no difference to this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from tinyldm.adapters.kinds import Fields
from tinyldm.folders.rename import Place, places
from tinyldm.folders.save import text_folders
from tinyldm.model import TEXT_ENCODERS, Model, architecture
from tinyldm.text.encoders import part_name
from tinyldm.vendor_loaders.layout import Layout, Shape

# Regex of the end of a tensor's name -> field of the layer. After lora_A, peft may write the name of the adapter.
FIELDS = {
    r"\.(lora_down|lora_A|lora\.down|lora_linear_layer\.down)(\.\w+)?\.weight": "down",
    r"\.(lora_up|lora_B|lora\.up|lora_linear_layer\.up)(\.\w+)?\.weight": "up",
    r"\.lora_mid\.weight": "mid",
    r"\.alpha": "alpha",
    r"\.dora_scale": "dora_scale",
    r"\.lora_magnitude_vector(\.\w+)*": "magnitude",
    **{rf"\.{field}(\.\w+)?": field for field in (
        *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")))},
}
# Regex of a tensor's whole name -> the kind of adapter that has such tensors and is not read.
REFUSED = {
    r".*\.(diff|diff_b)": "whole differences of weights (LyCORIS' full), which are a model and no adapter",
    r".*\.(w_norm|b_norm)": "changes of norms (LyCORIS)",
    r".*\.on_input": "(IA)^3",
    r".*\.(oft_\w+|boft_\w+)(\.\w+)*": "OFT",
    r".*\.[ab][12]\.weight": "GLoRA",
    r".*\.vera_lambda_\w+": "VeRA",
    r".*\.lora_embedding_[AB](\.\w+)?|.*\.lora_B(\.\w+)?\.bias|.*\.bias_(indices|values|size)": "LoRA of embeddings or biases",
    r"bundle_emb\..*": "words of textual inversion in the same file",
}
# Old spellings of whole names -> the present ones, in this order.
OLD = [
    (r"\.processor\.(qkv|proj)_lora1\.", r".img_attn.\1.lora."),        # xlabs' of FLUX
    (r"\.processor\.(qkv|proj)_lora2\.", r".txt_attn.\1.lora."),
    (r"\.processor\.", "."),
    (r"_lora\.(down|up)\.", r".lora.\1."),
]
# Of layers that have no such name: old spellings -> the present ones.
OLD_LAYERS = [(r"([._]self_attn[._])to_([qkv])$", r"\1\2_proj"), (r"([._]self_attn[._])to_out$", r"\1out_proj"),
              (r"[._]to_out$", ".to_out.0")]

# Programs write these before the paths of a network's layers, but for the folder of the network in a model folder (unet, transformer).
NETWORK_PREFIXES = ("lora_unet", "lora_transformer", "lycoris", "diffusion_model", "model.diffusion_model", "base_model.model",
                    "transformer.base_model.model", "base_model.model.transformer", "unet.base_model.model", "transformer", "unet", "")


class Layer(NamedTuple):
    """A layer of the model in one published layout."""

    part: str
    layout: str                     # key of the part's `layouts` in tinyldm/model.py
    path: str                       # in that layout
    places: tuple[Place, ...]       # our weights that its weight holds
    shape: Shape                    # of its weight


def same(name: str) -> str:
    """A name as it is looked up."""
    return name.replace(".", "_").lstrip("_")


def layers_in(part: str, network: nn.Module, name: str, layout: Layout) -> Iterator[Layer]:
    """The linear layers and convolutions of a part, in one of its layouts."""
    own = network.state_dict()
    adaptable = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    for published, found in places(own, layout.rules(network.config)).items():
        if all(place.key in adaptable for place in found):
            shape = found[0].form.outer_shape(tuple(own[found[0].key].shape), found[0].how)
            yield Layer(part, name, published.removesuffix(".weight"), tuple(found), shape)


class Prefixes(NamedTuple):
    """What stands before the paths of a part's layers."""

    diffusers: str
    kohya: str
    read: tuple[str, ...] = ()      # further ones


def prefixes(model: Model) -> dict[str, Prefixes]:
    """Of each adaptable part. kohya calls the CLIPs te1 and te2 in their order, and T5 te3; an only text encoder te."""
    texts = model.text.modules
    found = {"net": Prefixes(architecture(model.net).folder, "lora_unet", NETWORK_PREFIXES)}
    for i in range(len(model.text.encoders)):
        if (part := part_name(i)) in texts:
            number = "3" if architecture(texts[part]) is TEXT_ENCODERS["t5"] else str(i + 1) if len(model.text.encoders) > 1 else ""
            found[part] = Prefixes(text_folders(i)[0], f"lora_te{number}", (f"lora_te{i + 1}",))
    return found


def known_layers(model: Model) -> dict[str, Layer]:
    """The layers of the model by every name, as `same` gives it, that a file may have for them: of the network in all of its layouts,
    of text encoders in the first one, transformers' (with and without the text_model that transformers 5 leaves out)."""
    found: dict[str, Layer] = {}
    for part, known in prefixes(model).items():
        network = model.modules[part]
        layouts = dict(list(architecture(network).layouts.items())[: None if part == "net" else 1])
        for layer in (layer for name, layout in layouts.items() for layer in layers_in(part, network, name, layout)):
            for prefix in (known.diffusers, known.kohya, *known.read):
                for path in (layer.path, layer.path.removeprefix("text_model.")):
                    found.setdefault(same(f"{prefix}.{path}"), layer)
    return found


def find(name: str, known: dict[str, Layer]) -> Layer | None:
    """The layer of a name in a file, None where there is no such layer."""
    if found := known.get(same(name)):
        return found
    for pattern, new in OLD_LAYERS:
        name = re.sub(pattern, new, name)
    return known.get(same(name))


def split(key: str) -> tuple[str, str] | None:
    """The name of the layer and the field in a tensor's name; None for no name of an adapter's tensor."""
    for pattern, new in OLD:
        key = re.sub(pattern, new, key)
    for pattern, field in FIELDS.items():
        if found := re.fullmatch(rf"(.+?){pattern}", key):
            return found[1], field
    return None


# ---- whose names these are

# Regex found in the names of layers, as `same` gives them -> the family of models. The first that fits counts.
FAMILIES = {
    r"(^|_)blocks_\d+_(self_attn|cross_attn)_[qkvo]$": "Wan, a video model",
    r"individual_token_refiner|(^|_)txt_in_\w*refiner": "HunyuanVideo",
    r"(^|_)(img|txt)_mlp_net_|(^|_)(img|txt)_mod_1$": "Qwen-Image",
    r"(^|_)distilled_guidance_layer_": "Chroma",
    r"(^|_)(double_blocks|single_blocks|single_transformer_blocks)_\d": "FLUX.1",
    r"(^|_)joint_blocks_\d|_blocks_\d+_(attn_add_[qkv]_proj|attn_to_add_out|ff_context|norm1_context)": "Stable Diffusion 3",
    r"(^|_)(adaln_single|caption_projection)_": "PixArt or LTX",
    r"(^|_)layers_\d+_(attention|feed_forward)_": "Lumina or Z-Image",
    r"(^|_)(te2|encoder_2)_|((in|out)put|(down|up))_blocks_\d+_\w*transformer_blocks_[1-9]": "Stable Diffusion XL",
    r"(^|_)((down|up)_blocks_\d|mid_block)_attentions|(^|_)((in|out)put_blocks_\d+|middle_block)_1_": "Stable Diffusion 1 or 2",
}
TEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}


def family(layers: Mapping[str, Fields]) -> str | None:
    """The family of models that an adapter is for, told by the names of its layers and the width of the text that U-Nets attend to;
    None where that is not known."""
    for name, fields in layers.items():
        if re.search(r"attn2_to_[kv]$", same(name)) and "down" in fields and (width := fields["down"].shape[1]) in TEXT_WIDTHS:
            return TEXT_WIDTHS[width]
    return next((what for pattern, what in FAMILIES.items() if any(re.search(pattern, same(name)) for name in layers)), None)
