"""CLIP's text tower in its two published layouts: transformers' (`text_encoder/` of a model folder) and open_clip's.

transformers files carry the `text_model.` prefix; transformers 5 leaves it out for a CLIPTextModel made there,
and keeps it for one loaded from a file that had it. A whole CLIPModel file also holds `vision_model.*`,
`visual_projection.*` and `logit_scale`, and old files hold `position_ids`. open_clip files hold both towers too,
with q, k and v in one tensor. LAION's repositories hold both layouts under several file names.

Two things are not in the weights, and both go wrong in silence: the activation (OpenAI's weights want quick_gelu,
LAION's gelu) and the padding. SOURCES says both for the sources that are known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from tinyldm.models.clip_text import ACTIVATIONS, CLIPTextConfig
from tinyldm.tokenizer import EOS
from tinyldm.vendor_loaders.rename import Layout, Rules
from tinyldm.vendor_loaders.weights import Shape

CLIP_RULES = [
    (r"^(token|position)_embedding\.", r"text_model.embeddings.\1_embedding."),
    (r"^layers\.(\d+)\.", r"text_model.encoder.layers.\1."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.(q|k|v|out)\.", r".self_attn.\1_proj."),
    (r"\.(fc[12])\.", r".mlp.\1."),
    (r"^final_norm\.", "text_model.final_layer_norm."),
    (r"^projection\.", "text_projection."),
]

OPEN_CLIP_RULES = [
    (r"^position_embedding\.weight$", "positional_embedding"),
    (r"^layers\.(\d+)\.", r"transformer.resblocks.\1."),
    *[(rf"\.{name}\.(weight|bias)$", rf".attn.in_proj_\1@{i}/3") for i, name in enumerate("qkv")],
    (r"\.out\.", ".attn.out_proj."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.fc1\.", ".mlp.c_fc."),
    (r"\.fc2\.", ".mlp.c_proj."),
    (r"^final_norm\.", "ln_final."),
    (r"^projection\.weight$", "text_projection@T"),
]


def _unprojected(config: CLIPTextConfig) -> Rules:
    """A projection that the config does not ask for is left out."""
    return [] if config.projection_dim else [(r"^text_projection(\.weight)?$", "")]


def tidy(config: CLIPTextConfig) -> Rules:
    """transformers' names of all ages, without the image tower."""
    return [(r"^(vision_model|visual_projection)\..*|^logit_scale$|.*position_ids$", ""), *_unprojected(config),
            (r"^(?=embeddings|encoder|final_layer_norm)", "text_model.")]


def open_clip_tidy(config: CLIPTextConfig) -> Rules:
    return [(r"^visual\..*|^logit_(scale|bias)$|^attn_mask$", ""), *_unprojected(config)]


def infer(shapes: Mapping[str, Shape]) -> CLIPTextConfig:
    """The config behind open_clip weights; gelu and zero padding are its rule."""
    config = _tower(shapes, r"transformer\.resblocks\.(\d+)\.", "token_embedding.weight", "positional_embedding",
                    "transformer.resblocks.0.mlp.c_fc.weight")
    return replace(config, activation="gelu", pad_token_id=0)


def infer_openai(shapes: Mapping[str, Shape]) -> CLIPTextConfig:
    """The config behind transformers' names in a Stable Diffusion 1 checkpoint: OpenAI's tower."""
    before = "text_model." if any(name.startswith("text_model.") for name in shapes) else ""
    config = _tower(shapes, rf"{before}encoder\.layers\.(\d+)\.", f"{before}embeddings.token_embedding.weight",
                    f"{before}embeddings.position_embedding.weight", f"{before}encoder.layers.0.mlp.fc1.weight")
    return replace(config, activation="quick_gelu", pad_token_id=config.eos_token_id)


def _tower(shapes: Mapping[str, Shape], layer: str, tokens: str, positions: str, mlp: str) -> CLIPTextConfig:
    """What shapes tell, under these names. CLIP's heads are 64 wide; BOS and EOS are its last two tokens."""
    vocab_size, width = shapes[tokens]
    return CLIPTextConfig(
        vocab_size=vocab_size,
        width=width,
        layers=len({found[1] for name in shapes if (found := re.match(layer, name))}),
        heads=max(1, width // 64),
        mlp_width=shapes[mlp][0],
        context_length=shapes[positions][0],
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )


LAYOUTS = {
    "transformers": Layout(r"(.*?)(?:text_model\.)?embeddings\.token_embedding\.weight", lambda config: CLIP_RULES, tidy,
                           infer_openai),
    "open_clip": Layout(r"((?!visual\.).*?)transformer\.resblocks\.0\.attn\.in_proj_weight", lambda config: OPEN_CLIP_RULES,
                        open_clip_tidy, infer),
}


class Source(NamedTuple):
    """What a publisher's text towers were trained with."""

    activation: str
    pad_token: str


SOURCES = {
    r"openai/clip-vit-.*": Source("quick_gelu", EOS),
    r"laion/CLIP-ViT-.*": Source("gelu", "!"),
}


def known_source(*names: str | None) -> Source | None:
    """The publisher behind a hub id or a config's `_name_or_path`, if it is one in SOURCES."""
    return next((source for pattern, source in SOURCES.items() for name in names
                 if name and re.fullmatch(pattern, name, re.IGNORECASE)), None)


# ours -> published, and the value that transformers assumes where config.json is silent
FIELDS = {
    "vocab_size": ("vocab_size", 49408),
    "width": ("hidden_size", 512),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 8),
    "mlp_width": ("intermediate_size", 2048),
    "context_length": ("max_position_embeddings", 77),
    "activation": ("hidden_act", "quick_gelu"),
    "bos_token_id": ("bos_token_id", 49406),
    "eos_token_id": ("eos_token_id", 49407),
    "pad_token_id": ("pad_token_id", 1),
    "norm_eps": ("layer_norm_eps", 1e-5),
}


def to_config(config: CLIPTextConfig) -> dict:
    """The config.json with which transformers opens the model: CLIPTextModel, or ...WithProjection."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection_dim else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **{published: getattr(config, ours) for ours, (published, _) in FIELDS.items()},
        "projection_dim": config.projection_dim or config.width,    # unused without projection; must be a number
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    }


def from_config(config: dict, origin: str | None = None) -> CLIPTextConfig:
    """A published config.json -> ours. Reads CLIPTextModel's, CLIPTextModelWithProjection's, CLIPModel's and open_clip's.

    origin: the hub id that it came from. ValueError for a config that states another activation than its source has.
    The pad id is the tokenizer's business: published configs often state one that nobody pads with.
    """
    if "model_cfg" in config:
        return _from_open_clip(config["model_cfg"])
    architecture = (config.get("architectures") or ["CLIPTextModel"])[0]
    text = next((config[name] for name in ("text_config_dict", "text_config") if config.get(name) is not None), config)
    values = {ours: text.get(published, default) for ours, (published, default) in FIELDS.items()}
    if values["activation"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act {values['activation']!r} is unknown: CLIP text encoders use "
                         f"{' or '.join(ACTIVATIONS)}")
    source = known_source(origin, config.get("_name_or_path"), text.get("_name_or_path"))
    if source and source.activation != values["activation"]:
        raise ValueError(f"the config says hidden_act={values['activation']!r}, but {origin or config.get('_name_or_path')} was "
                         f"trained with {source.activation!r}; the wrong one loads and degrades in silence. Correct config.json")
    projected = architecture in ("CLIPTextModelWithProjection", "CLIPModel")
    return CLIPTextConfig(**values, projection_dim=config.get("projection_dim", 512) if projected else None)


def _from_open_clip(config: dict) -> CLIPTextConfig:
    """open_clip_config.json: {"model_cfg": {"embed_dim": ..., "text_cfg": {...}}}."""
    text = config["text_cfg"]
    return CLIPTextConfig(
        vocab_size=text["vocab_size"], width=text["width"], layers=text["layers"], heads=text["heads"],
        mlp_width=int(text["width"] * text.get("mlp_ratio", 4)), context_length=text["context_length"],
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        bos_token_id=text["vocab_size"] - 2, eos_token_id=text["vocab_size"] - 1, pad_token_id=0,
        projection_dim=config["embed_dim"])
