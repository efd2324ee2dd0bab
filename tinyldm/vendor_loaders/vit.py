"""The published layouts of the picture towers of models/vit.py. Which one a file is in, its tensors say, and nearly all of the config too.

    transformers          CLIP and SigLIP: vision_model.encoder.layers.0...; files of both towers, or of the picture tower alone
    transformers-dinov2   DINOv2 with and without registers: encoder.layer.0...
    open_clip             LAION's and OpenAI's CLIP: visual.transformer.resblocks.0..., with q, k and v in one tensor
    dinov2                Meta's own files (dinov2_vitl14_pretrain.pth): blocks.0...
    timm                  SigLIP in open_clip's files: visual.trunk.blocks.0...

`complete` adds what only a config.json tells: the number of heads, the activation and the epsilon of the norms. Where there is none, they
are those of the published models, the activation that of the layout's usual weights: OpenAI's in transformers', LAION's in open_clip's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tinyldm.lookup import lookup
from tinyldm.models.vit import ViTConfig
from tinyldm.vendor_loaders.layout import Layout, Rules, Shape, count_blocks

MOST_HEADS = 16                         # of CLIP's and SigLIP's towers of 1024 channels and more; heads are 64 wide below that

TRANSFORMERS = [
    (r"^class_token$", "embeddings.class_embedding"),
    (r"^positions$", "embeddings.position_embedding.weight"),
    (r"^patches\.", "embeddings.patch_embedding."),
    (r"^input_norm\.", "pre_layrnorm."),
    (r"^final_norm\.", "post_layernorm."),
    (r"^layers\.(\d+)\.", r"encoder.layers.\1."),
    *[(rf"^head\.attn\.to_{name}\.(weight|bias)$", rf"head.attention.in_proj_\1@{i}/3") for i, name in enumerate("qkv")],
    (r"^head\.attn\.to_out\.", "head.attention.out_proj."),
    (r"^head\.norm\.", "head.layernorm."),
    (r"^head\.probe$", "head.probe@1,1,"),
    (r"\.attn\.to_(q|k|v|out)\.", r".self_attn.\1_proj."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^(?!projection)", "vision_model."),
    (r"^projection\.", "visual_projection."),
]

OPEN_CLIP = [
    (r"^class_token$", "class_embedding"),
    (r"^positions$", "positional_embedding"),
    (r"^patches\.", "conv1."),
    (r"^input_norm\.", "ln_pre."),
    (r"^final_norm\.", "ln_post."),
    (r"^layers\.(\d+)\.", r"transformer.resblocks.\1."),
    *[(rf"\.to_{name}\.(weight|bias)$", rf".in_proj_\1@{i}/3") for i, name in enumerate("qkv")],
    (r"\.attn\.to_out\.", ".attn.out_proj."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^projection\.weight$", "proj@T"),
]

TRANSFORMERS_DINOV2 = [
    (r"^class_token$", "embeddings.cls_token@1,1,"),
    (r"^registers$", "embeddings.register_tokens@1,"),
    (r"^positions$", "embeddings.position_embeddings@1,"),
    (r"^patches\.", "embeddings.patch_embeddings.projection."),
    (r"^final_norm\.", "layernorm."),
    (r"^layers\.(\d+)\.", r"encoder.layer.\1."),
    *[(rf"\.attn\.to_{name[0]}\.", rf".attention.attention.{name}.") for name in ("query", "key", "value")],
    (r"\.attn\.to_out\.", ".attention.output.dense."),
    (r"\.scale([12])$", r".layer_scale\1.lambda1"),
]

TIMM = [                                # its names are those of Meta's DINOv2, too
    (r"^class_token$", "cls_token@1,1,"),
    (r"^registers$", "register_tokens@1,"),
    (r"^positions$", "pos_embed@1,"),
    (r"^patches\.", "patch_embed.proj."),
    (r"^final_norm\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent@1,1,"),
    (r"^head\.attn\.to_q\.", "attn_pool.q."),
    *[(rf"^head\.attn\.to_{name}\.(weight|bias)$", rf"attn_pool.kv.\1@{i}/2") for i, name in enumerate("kv")],
    (r"^head\.attn\.to_out\.", "attn_pool.proj."),
    (r"^head\.", "attn_pool."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    *[(rf"\.attn\.to_{name}\.(weight|bias)$", rf".attn.qkv.\1@{i}/3") for i, name in enumerate("qkv")],
    (r"\.attn\.to_out\.", ".attn.proj."),
    (r"\.scale([12])$", r".ls\1.gamma"),
]


def dinov2_rules(table: Rules, first: str, second: str) -> Callable[[ViTConfig], Rules]:
    """The function that makes DINOv2's rules; first and second are the names of the two matrices of a SwiGLU MLP."""
    swiglu = [(r"\.mlp\.fc1\.", f".mlp.{first}."), (r"\.mlp\.fc2\.", f".mlp.{second}.")]
    return lambda config: table + swiglu if config.activation == "swiglu" else table


def transformers_tidy(config: ViTConfig) -> Rules:
    """Names of every version of transformers -> those of TRANSFORMERS; the text tower is left out."""
    return [(r"^(text_model|text_projection)\..*|^logit_(scale|bias)$|.*position_ids$", ""),
            (r"^(?=embeddings|encoder|pre_layrnorm|post_layernorm|head)", "vision_model.")]


def dinov2_tidy(config: ViTConfig) -> Rules:
    """Leaves out the token of masked patches, and classifiers."""
    return [(r"^(embeddings\.)?mask_token$|^(classifier|head)\..*|^linear_head\..*", "")]


def clip_like(shapes: Mapping[str, Shape]) -> ViTConfig:
    """The config of CLIP or SigLIP under transformers' names. CLIP's patches have no bias."""
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in shapes) else ""
    sized = _sizes(shapes, f"{prefix}embeddings.patch_embedding.weight", f"{prefix}embeddings.position_embedding.weight",
                   rf"{prefix}encoder\.layers\.(\d+)\.", f"{prefix}encoder.layers.0.mlp.fc1.weight")
    if f"{prefix}embeddings.class_embedding" not in shapes:
        return _siglip(sized)
    return ViTConfig(**sized, projection_dim=shapes.get("visual_projection.weight", (None,))[0])


def open_clip(shapes: Mapping[str, Shape]) -> ViTConfig:
    sized = _sizes(shapes, "conv1.weight", "positional_embedding", r"transformer\.resblocks\.(\d+)\.",
                   "transformer.resblocks.0.mlp.c_fc.weight")
    return ViTConfig(**sized, activation="gelu", input_norm="ln_pre.weight" in shapes, projection_dim=shapes.get("proj", (0, None))[1])


def dinov2(patches: str, positions: str, layer: str, first: str, swiglu: str,
           registers: str) -> Callable[[Mapping[str, Shape]], ViTConfig]:
    """The function that infers DINOv2's config from the shapes, given a layout's names."""
    def infer(shapes: Mapping[str, Shape]) -> ViTConfig:
        is_swiglu, count = swiglu in shapes, shapes.get(registers, (0, 0, 0))[1]
        sized = _sizes(shapes, patches, positions, layer, swiglu if is_swiglu else first)
        sized |= {"heads": max(1, sized["width"] // 64), "mlp_width": sized["mlp_width"] // (2 if is_swiglu else 1)}
        return ViTConfig(**sized, activation="swiglu" if is_swiglu else "gelu", registers=count, input_norm=False, patch_bias=True,
                         layer_scale=True, projection_dim=None, norm_eps=1e-6,
                         antialias=bool(count), position_offset=0.0 if count else 0.1)

    return infer


def timm(shapes: Mapping[str, Shape]) -> ViTConfig:
    return _siglip(_sizes(shapes, "patch_embed.proj.weight", "pos_embed", r"blocks\.(\d+)\.", "blocks.0.mlp.fc1.weight"))


def _siglip(sized: dict[str, int]) -> ViTConfig:
    return ViTConfig(**sized, activation="gelu_tanh", pooling="attention", input_norm=False, patch_bias=True, projection_dim=None,
                     norm_eps=1e-6)


def _sizes(shapes: Mapping[str, Shape], patches: str, positions: str, layer: str, first: str) -> dict[str, int]:
    """The fields that follow from shapes. `layer` is the regex of a layer's names, the others are names of tensors."""
    width, patch = shapes[patches][0], shapes[patches][2]
    side = math.isqrt(shapes[positions][-2])                # the class token's position makes one more than a square
    return {"image_size": side * patch, "patch": patch, "width": width, "layers": count_blocks(shapes, layer),
            "heads": max(1, min(MOST_HEADS, width // 64)), "mlp_width": shapes[first][0]}


LAYOUTS = {
    "transformers": Layout(r"(.*?)(?:vision_model\.)?embeddings\.patch_embedding\.weight", lambda config: TRANSFORMERS, transformers_tidy,
                           clip_like),
    "transformers-dinov2": Layout(
        r"(.*?)embeddings\.patch_embeddings\.projection\.weight",
        dinov2_rules(TRANSFORMERS_DINOV2, "weights_in", "weights_out"), dinov2_tidy,
        dinov2("embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings", r"encoder\.layer\.(\d+)\.",
               "encoder.layer.0.mlp.fc1.weight", "encoder.layer.0.mlp.weights_in.weight", "embeddings.register_tokens")),
    "open_clip": Layout(r"((?:.*\.)?visual\.|)class_embedding", lambda config: OPEN_CLIP, lambda config: [], open_clip),
    "dinov2": Layout(r"(.*?)blocks\.0\.ls1\.gamma", dinov2_rules(TIMM, "w12", "w3"), dinov2_tidy,
                     dinov2("patch_embed.proj.weight", "pos_embed", r"blocks\.(\d+)\.", "blocks.0.mlp.fc1.weight",
                            "blocks.0.mlp.w12.weight", "register_tokens")),
    "timm": Layout(r"((?:.*\.)?trunk\.|)attn_pool\.latent", lambda config: TIMM, lambda config: [], timm),
}

ACTIVATION_NAMES = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}      # hidden_act -> ours
# our field -> that of transformers' CLIPVisionConfig, and the value that it assumes for a config.json without it
FIELDS = {
    "image_size": ("image_size", 224), "patch": ("patch_size", 32), "width": ("hidden_size", 768), "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12), "mlp_width": ("intermediate_size", 3072), "activation": ("hidden_act", "quick_gelu"),
    "projection_dim": ("projection_dim", 512), "norm_eps": ("layer_norm_eps", 1e-5),
}
TOLD = ("heads", "norm_eps")            # of these, what tensors do not tell, and what is read as it stands


def to_config(config: ViTConfig) -> dict[str, Any]:
    """The config with which transformers opens a CLIP's picture tower. ValueError for a tower that is none."""
    alike = ViTConfig(**{ours: getattr(config, ours) for ours in FIELDS}, antialias=config.antialias,
                      position_offset=config.position_offset)
    if config != alike:
        raise ValueError("only picture towers of CLIP are written: pooled at the class token, without registers and layer scale")
    acts = {ours: theirs for theirs, ours in ACTIVATION_NAMES.items()}
    return {"model_type": "clip_vision_model", **{theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS.items()},
            "hidden_act": lookup(acts, config.activation, "activation that is written")}


def from_config(published: Mapping[str, Any]) -> ViTConfig:
    """The inverse of to_config."""
    values = {ours: published.get(theirs, default) for ours, (theirs, default) in FIELDS.items()}
    return ViTConfig(**values | {"activation": lookup(ACTIVATION_NAMES, values["activation"], "hidden_act of a picture tower")})


def complete(config: ViTConfig, published: Mapping[str, Any]) -> ViTConfig:
    """The config with what the tensors do not tell and a config.json of transformers or open_clip does. ValueError for a tower that
    computes something else, such as the mean of all tokens."""
    if "model_cfg" in published:
        return _complete_open_clip(config, published["model_cfg"])
    vision = next((published[name] for name in ("vision_config_dict", "vision_config") if published.get(name) is not None), published)
    told = {ours: vision[theirs] for ours in TOLD if vision.get(theirs := FIELDS[ours][0]) is not None}
    if vision.get("hidden_act") and config.activation != "swiglu":
        told["activation"] = lookup(ACTIVATION_NAMES, vision["hidden_act"], "hidden_act of a picture tower")
    return replace(config, **told)


def _complete_open_clip(config: ViTConfig, published: Mapping[str, Any]) -> ViTConfig:
    """{"embed_dim": ..., "quick_gelu": ..., "vision_cfg": {...}}"""
    vision = published["vision_cfg"]
    if "timm_model_name" in vision:
        return config
    if odd := next((name for name in ("attentional_pool", "global_average_pool") if vision.get(name)), None) or (
            vision.get("pool_type", "tok") != "tok" and "pool_type"):
        raise ValueError(f"the picture tower says {odd}={vision[odd]!r}: only CLIPs that pool at the class token are read here")
    tanh = (vision.get("act_kwargs") or {}).get("approximate") == "tanh"
    return replace(config, heads=config.width // vision.get("head_width", 64),
                   activation="quick_gelu" if published.get("quick_gelu") else "gelu_tanh" if tanh else "gelu")
