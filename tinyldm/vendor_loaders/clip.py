"""CLIP's text tower in its two published layouts: transformers' (`text_encoder/` of a model folder) and open_clip's.

In transformers files, names carry the prefix `text_model.`. transformers 5 omits it for a CLIPTextModel that was created
there, and keeps it for one that was loaded from a file with the prefix. The file of a whole CLIPModel also holds
`vision_model.*`, `visual_projection.*` and `logit_scale`, and old files hold `position_ids`. open_clip files hold both
towers too, with q, k and v fused into one tensor, and the projection as a matrix that is multiplied from the right. LAION's
repositories hold both layouts under several file names. In checkpoints of SDXL that diffusers' older script has converted
(huggingface/diffusers, convert_diffusers_to_original_sdxl.py; Playground v2 is one), the projection kept transformers' name and form.

Two settings are not in the weights, and a wrong value of either loads without an error and degrades the pictures: the
activation (quick_gelu for OpenAI's weights, gelu for LAION's) and the padding token. SOURCES lists both for known sources.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from tinyldm.models.clip_text import CLIPTextConfig
from tinyldm.models.layers import ACTIVATIONS
from tinyldm.text.tokenizer import EOS
from tinyldm.vendor_loaders.layout import Layout, Rules, Shape, count_blocks

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
CONVERTED_RULES = [(r"^projection\.", "text_projection."), *OPEN_CLIP_RULES]


def _unprojected(config: CLIPTextConfig) -> Rules:
    """A rule that leaves out the projection of a file whose config has none."""
    return [] if config.projection_dim else [(r"^text_projection(\.weight)?$", "")]


def transformers_tidy(config: CLIPTextConfig) -> Rules:
    """Names of every version of transformers -> those of CLIP_RULES; the image tower is left out."""
    return [(r"^(vision_model|visual_projection)\..*|^logit_(scale|bias)$|.*position_ids$", ""), *_unprojected(config),
            (r"^(?=embeddings|encoder|final_layer_norm)", "text_model.")]


def open_clip_tidy(config: CLIPTextConfig) -> Rules:
    """Leaves out the image tower and what open_clip stores beside the networks."""
    return [(r"^visual\..*|^logit_(scale|bias)$|^attn_mask$|.*position_ids$", ""), *_unprojected(config)]


def infer_open_clip(shapes: Mapping[str, Shape]) -> CLIPTextConfig:
    """The config of open_clip weights. open_clip uses gelu unless its config says otherwise."""
    config = _config_from_shapes(shapes, r"transformer\.resblocks\.(\d+)\.", "token_embedding.weight", "positional_embedding",
                                 "transformer.resblocks.0.mlp.c_fc.weight")
    return replace(config, activation="gelu")


def infer_openai(shapes: Mapping[str, Shape]) -> CLIPTextConfig:
    """The config of weights under transformers' names in a Stable Diffusion 1 checkpoint: OpenAI's text tower."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in shapes) else ""
    config = _config_from_shapes(shapes, rf"{prefix}encoder\.layers\.(\d+)\.", f"{prefix}embeddings.token_embedding.weight",
                                 f"{prefix}embeddings.position_embedding.weight", f"{prefix}encoder.layers.0.mlp.fc1.weight")
    return replace(config, activation="quick_gelu")


def _config_from_shapes(shapes: Mapping[str, Shape], layer: str, tokens: str, positions: str, mlp: str) -> CLIPTextConfig:
    """The fields that follow from the shapes: `layer` is the regex of a layer's names, the others are names of tensors.
    CLIP's heads are 64 wide, and BOS and EOS are the last two tokens of its vocabulary, behind which only added tokens come."""
    vocab_size, width = shapes[tokens]
    own = min(vocab_size, CLIPTextConfig.vocab_size)
    return CLIPTextConfig(
        vocab_size=vocab_size,
        width=width,
        layers=count_blocks(shapes, layer),
        heads=max(1, width // 64),
        mlp_width=shapes[mlp][0],
        context_length=shapes[positions][0],
        bos_token_id=own - 2,
        eos_token_id=own - 1,
    )


LAYOUTS = {
    "transformers": Layout(r"(.*?)(?:text_model\.)?embeddings\.token_embedding\.weight", lambda config: CLIP_RULES,
                           transformers_tidy, infer_openai),
    "converted": Layout(r"((?!visual\.).*?)text_projection\.weight", lambda config: CONVERTED_RULES, open_clip_tidy, infer_open_clip),
    "open_clip": Layout(r"((?!visual\.).*?)transformer\.resblocks\.0\.attn\.in_proj_weight", lambda config: OPEN_CLIP_RULES,
                        open_clip_tidy, infer_open_clip),
}


class Source(NamedTuple):
    """The settings with which a publisher trained its text towers, and which its weights do not tell."""

    activation: str
    pad_token: str


SOURCES = {
    r"openai/clip-vit-.*": Source("quick_gelu", EOS),
    r"laion/CLIP-ViT-.*": Source("gelu", "!"),
}


def known_source(*names: str | None) -> Source | None:
    """The entry of SOURCES for the first of these hub ids (or `_name_or_path` of a config) that has one, else None."""
    return next((source for pattern, source in SOURCES.items() for name in names
                 if name and re.fullmatch(pattern, name, re.IGNORECASE)), None)


def check_activation(activation: str, *names: str | None) -> None:
    """ValueError where the first known source of these names (as for known_source) was trained with another activation."""
    source = known_source(*names)
    if source and source.activation != activation:
        raise ValueError(f"the config says hidden_act={activation!r}, but {next(filter(None, names))} was trained with "
                         f"{source.activation!r}; the wrong one loads without an error and degrades the results. Correct config.json")


PROJECTED = ("CLIPTextModelWithProjection", "CLIPModel")    # the published classes whose pooled output is projected
MODEL_TYPES = {"clip_text_model": "CLIPTextModel", "clip": "CLIPModel"}     # model_type of a config -> the class that it means alone
CLASSES = ("CLIPTextModel", *PROJECTED, *MODEL_TYPES)       # the names of the tower in config.json

# our field -> the published field, and the value that transformers assumes for a config.json without it
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
    "norm_eps": ("layer_norm_eps", 1e-5),
}


def to_config(config: CLIPTextConfig) -> dict:
    """The config.json with which transformers opens the tower as CLIPTextModel, or as CLIPTextModelWithProjection."""
    own = CLIPTextConfig.vocab_size
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection_dim else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **{published: getattr(config, ours) for ours, (published, _) in FIELDS.items()},
        # transformers takes 2 for the largest id of all, which a token that was added to CLIP's vocabulary has.
        **({"eos_token_id": own - 1} if config.eos_token_id == 2 and config.vocab_size > own else {}),
        "projection_dim": config.projection_dim or config.width,    # transformers demands a number even without a projection
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    }


def from_config(config: dict, origin: str | None = None) -> CLIPTextConfig:
    """A published config.json, of CLIPTextModel, CLIPTextModelWithProjection, CLIPModel or open_clip -> our config.

    origin: the hub id of the repository that holds the config. ValueError for a config whose activation is not the one with
    which this source was trained. pad_token_id is not read: padding is the tokenizer's
    business, and published configs often state an id that was never used for it.
    """
    if "model_cfg" in config:
        return _from_open_clip(config["model_cfg"])
    kind = config.get("model_type", "clip_text_model")
    architecture = (config.get("architectures") or [MODEL_TYPES.get(kind, kind)])[0].removeprefix("Flax")
    if architecture not in ("CLIPTextModel", *PROJECTED):
        raise ValueError(f"config.json describes a {architecture}: of text encoders, only CLIP's and T5's can be read")
    text = next((config[name] for name in ("text_config_dict", "text_config") if config.get(name) is not None), config)
    if config.get("use_attention_mask"):
        raise ValueError("the config says use_attention_mask: diffusers hides the padding from such a text encoder, and here it reads it")
    values = {ours: text.get(published, default) for ours, (published, default) in FIELDS.items()}
    if values["activation"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act {values['activation']!r} is unknown: CLIP text encoders use "
                         f"{' or '.join(ACTIVATIONS)}")
    check_activation(values["activation"], origin, config.get("_name_or_path"), text.get("_name_or_path"))
    return CLIPTextConfig(**values, projection_dim=config.get("projection_dim", 512) if architecture in PROJECTED else None)


def _from_open_clip(config: dict) -> CLIPTextConfig:
    """open_clip_config.json: {"model_cfg": {"embed_dim": ..., "text_cfg": {...}}}."""
    text = config["text_cfg"]
    return CLIPTextConfig(
        vocab_size=text["vocab_size"], width=text["width"], layers=text["layers"], heads=text["heads"],
        mlp_width=int(text["width"] * text.get("mlp_ratio", 4)), context_length=text["context_length"],
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        bos_token_id=text["vocab_size"] - 2, eos_token_id=text["vocab_size"] - 1,
        projection_dim=config["embed_dim"])
