"""The transformer of FLUX.1 in its two published layouts: diffusers' (`transformer/` of a model folder) and Black Forest Labs'.

They differ in more than names. Black Forest Labs' files fuse queries, keys and values, in single blocks also with the first layer of
the MLP. In the last modulation they have shift before scale, diffusers has scale before shift: files with the wrong order load
without an error and draw noise.

dev and schnell differ by the guidance embedding. Krea and Kontext have the shapes of dev, and load as dev does: nothing in the
weights says that Kontext expects the picture to be edited as further tokens. Networks with other inputs, and those of another
family under similar names, are refused by name: VARIANTS, OTHERS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tinyldm.models.flux import PATCH, FluxConfig, usual_axes
from tinyldm.vendor_loaders.layout import Layout, Rules, Shape, count_blocks
from tinyldm.vendor_loaders.two_streams import AROUND, STREAMS
from tinyldm.vendor_loaders.unet import check

CLASS = "FluxTransformer2DModel"
AREA = PATCH**2

DIFFUSERS_RULES: Rules = [
    *AROUND,
    (r"^patch_in\.", "x_embedder."),
    (r"^guidance_in\.", "time_text_embed.guidance_embedder."),
    (r"^single_blocks\.(\d+)\.modulation\.", r"single_transformer_blocks.\1.norm.linear."),
    (r"^single_blocks\.(\d+)\.mlp_in\.", r"single_transformer_blocks.\1.proj_mlp."),
    (r"^single_blocks\.(\d+)\.out\.", r"single_transformer_blocks.\1.proj_out."),
    (r"^single_blocks\.", "single_transformer_blocks."),
    (r"^double_blocks\.", "transformer_blocks."),
    *STREAMS,
]

ORIGINAL_RULES: Rules = [
    (r"^patch_in\.", "img_in."),
    (r"^context_in\.", "txt_in."),
    (r"^(time_in|guidance_in)\.linear_1\.", r"\1.in_layer."),
    (r"^(time_in|guidance_in)\.linear_2\.", r"\1.out_layer."),
    (r"^pooled_in\.0\.", "vector_in.in_layer."),
    (r"^pooled_in\.2\.", "vector_in.out_layer."),
    (r"^final_modulation\.", "final_layer.adaLN_modulation.1."),
    (r"^patch_out\.", "final_layer.linear."),
    # q, k and v have the width of the network, the MLP four times as much.
    *[(rf"^(single_blocks\.\d+)\.attn\.to_{name}\.(.*)", rf"\1.linear1.\2@{i}/7") for i, name in enumerate("qkv")],
    (r"^(single_blocks\.\d+)\.mlp_in\.(.*)", r"\1.linear1.\2@3-6/7"),
    (r"^(single_blocks\.\d+)\.out\.", r"\1.linear2."),
    (r"^(single_blocks\.\d+)\.modulation\.", r"\1.modulation.lin."),
    (r"^(single_blocks\.\d+)\.attn\.", r"\1.norm."),
    (r"\.image\.", ".img_"),
    (r"\.text\.", ".txt_"),
    (r"\.(img|txt)_modulation\.", r".\1_mod.lin."),
    *[(rf"_attn\.to_{name}\.(.*)", rf"_attn.qkv.\1@{i}/3") for i, name in enumerate("qkv")],
    (r"_attn\.to_out\.", "_attn.proj."),
    (r"_attn\.([qk]_norm)", r"_attn.norm.\1"),
    (r"\.norm\.q_norm\.weight$", ".norm.query_norm.scale"),
    (r"\.norm\.k_norm\.weight$", ".norm.key_norm.scale"),
]

# Channels of a token, where there are more than in the network's answer -> what such a network is.
VARIANTS = {
    384: "FLUX.1 Fill, which also needs a mask and the masked picture",
    128: "FLUX.1 Canny or Depth, which also needs a picture of edges or depths",
}
# A name, of a tensor or a class in config.json, that only this relative of FLUX.1 has -> what it is.
OTHERS = {
    r"single_stream_modulation\.lin\.weight|Flux2Transformer2DModel": "FLUX.2, which has another network and a language model for its text",
    r"distilled_guidance_layer\..*|ChromaTransformer2DModel": "Chroma, whose modulations are made by a further network",
    r"FluxControlNetModel|controlnet_.*": "a ControlNet, which steers a FLUX.1 and draws nothing alone",
}


def infer(shapes: Mapping[str, Shape]) -> FluxConfig:
    """The config of weights in Black Forest Labs' layout. The axes of the positions, which they do not tell, are the
    usual ones. ValueError for relatives of FLUX.1, and for its variants with further inputs."""
    _refuse_others(shapes)
    width, channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return FluxConfig(
        **_latent_channels(channels, shapes["final_layer.linear.weight"][0]),
        width=width,
        heads=width // head,
        double_layers=count_blocks(shapes, r"double_blocks\.(\d+)\."),
        single_layers=count_blocks(shapes, r"single_blocks\.(\d+)\."),
        context_dim=shapes["txt_in.weight"][1],
        pooled_dim=shapes["vector_in.in_layer.weight"][1],
        guidance="guidance_in.in_layer.weight" in shapes,
        rope_axes=usual_axes(head),
    )


def _refuse_others(names: Mapping[str, object]) -> None:
    for pattern, what in OTHERS.items():
        if found := next((name for name in names if re.fullmatch(pattern, name)), None):
            raise ValueError(f"the network is {what} ({found}): it cannot be read; FLUX.1 dev and schnell can")


def _latent_channels(takes: int, makes: int) -> dict[str, int]:
    """The fields in_channels and out_channels, from the channels of a token that the network takes and makes."""
    if takes > makes:
        what = VARIANTS.get(takes, "a network that also needs another picture")
        raise ValueError(f"the network takes {takes} channels per token and makes {makes}: it is {what}. FLUX.1 dev and schnell "
                         "can be read")
    if takes % AREA or makes % AREA:
        raise ValueError(f"the network takes {takes} channels per token and makes {makes}, which are no multiples of {AREA}: tokens are "
                         f"packed from {PATCH}x{PATCH} latent pixels")
    return {"in_channels": takes // AREA, "out_channels": makes // AREA}


LAYOUTS = {
    "diffusers": Layout(r"(.*?)single_transformer_blocks\.0\.proj_mlp\.weight", lambda config: DIFFUSERS_RULES),
    "original": Layout(r"(.*?)double_blocks\.0\.img_attn\.qkv\.weight", lambda config: ORIGINAL_RULES, infer=infer),
}

FIXED = {"patch_size": 1}       # FluxPipeline packs the latents, so that the network's patches are single tokens

# our field -> the published field, and the value that diffusers assumes for a config.json without it
FIELDS = {
    "heads": ("num_attention_heads", 24),
    "double_layers": ("num_layers", 19),
    "single_layers": ("num_single_layers", 38),
    "context_dim": ("joint_attention_dim", 4096),
    "pooled_dim": ("pooled_projection_dim", 768),
    "guidance": ("guidance_embeds", False),
}

KNOWN = {published for published, _ in FIELDS.values()} | {"in_channels", "out_channels", "attention_head_dim", "axes_dims_rope"}


def to_config(config: FluxConfig) -> dict:
    """The config.json with which diffusers' FluxTransformer2DModel opens the network."""
    same = config.out_channels == config.in_channels
    return {
        "_class_name": CLASS,
        **{published: getattr(config, ours) for ours, (published, _) in FIELDS.items()},
        "patch_size": 1,
        "in_channels": AREA * config.in_channels,
        "out_channels": None if same else AREA * config.out_channels,
        "attention_head_dim": config.width // config.heads,
        "axes_dims_rope": list(config.rope_axes),
    }


def from_config(config: dict) -> FluxConfig:
    """A published config.json -> our config. ValueError for what FluxConfig cannot express."""
    _refuse_others({str(config.get("_class_name")): None})
    check(config, CLASS, FIXED, KNOWN)
    values = {ours: config.get(published, default) for ours, (published, default) in FIELDS.items()}
    channels, out_channels = config.get("in_channels", 64), config.get("out_channels")
    return FluxConfig(
        **values, **_latent_channels(channels, channels if out_channels is None else out_channels),
        width=values["heads"] * config.get("attention_head_dim", 128), rope_axes=tuple(config.get("axes_dims_rope", FluxConfig.rope_axes)))
