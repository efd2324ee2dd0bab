"""The MMDiT of Stable Diffusion 3 and 3.5 in its two published layouts: diffusers' (`transformer/` of a model folder) and Stability's.

They differ in more than names. Stability's files fuse queries, keys and values. Both have the same two vectors in the last
modulation, and in that of the text in the last block: shift before scale in Stability's files, scale before shift in diffusers'.
Files with the wrong order load without an error and draw noise.

Stability's layout has a prefix (model.diffusion_model.) in the published files and in most finetunes, but not in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tinyldm.models.mmdit import MMDiTConfig
from tinyldm.vendor_loaders.layout import Layout, Rules, Shape, count_blocks
from tinyldm.vendor_loaders.two_streams import AROUND, STREAMS
from tinyldm.vendor_loaders.unet import check, sample_size

CLASS = "SD3Transformer2DModel"


def diffusers_rules(config: MMDiTConfig) -> Rules:
    last = config.layers - 1
    return [
        *AROUND,
        (r"^patch_in\.", "pos_embed.proj."),
        (r"^positions$", "pos_embed.pos_embed"),
        (r"^blocks\.", "transformer_blocks."),
        (rf"(\.{last})\.text\.modulation\.(.*)", r"\1.norm1_context.linear.\2@swap"),
        *STREAMS,
    ]


ORIGINAL_RULES = [
    (r"^patch_in\.", "x_embedder.proj."),
    (r"^positions$", "pos_embed"),
    (r"^time_in\.linear_1\.", "t_embedder.mlp.0."),
    (r"^time_in\.linear_2\.", "t_embedder.mlp.2."),
    (r"^pooled_in\.", "y_embedder.mlp."),
    (r"^context_in\.", "context_embedder."),
    (r"^final_modulation\.", "final_layer.modulation."),
    (r"^patch_out\.", "final_layer.linear."),
    (r"^blocks\.", "joint_blocks."),
    (r"\.image\.", ".x_block."),
    (r"\.text\.", ".context_block."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    *[(rf"\.to_{name}\.(.*)", rf".qkv.\1@{i}/3") for i, name in enumerate("qkv")],
    (r"\.to_out\.", ".proj."),
    (r"\.([qk])_norm\.", r".ln_\1."),
    (r"(joint_blocks.*)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"(joint_blocks.*)\.mlp\.2\.", r"\1.mlp.fc2."),
]


def infer(shapes: Mapping[str, Shape]) -> MMDiTConfig:
    """The config of weights in Stability's layout. They do not tell the size of pictures in training, which is 1024 px in all of
    them. ValueError for a ControlNet, which has such blocks too."""
    if control := next((name for name in shapes if "control" in name), None):
        raise ValueError(f"the weights are those of a ControlNet ({control}), which steers a Stable Diffusion 3 and draws nothing alone")
    width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
    layers = count_blocks(shapes, r"joint_blocks\.(\d+)\.")
    max_positions = math.isqrt(shapes["pos_embed"][1])
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    return MMDiTConfig(
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        patch=patch,
        width=width,
        layers=layers,
        heads=width // (norm[0] if norm else 64),
        context_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
        qk_norm=norm is not None,
        dual_layers=tuple(i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes),
        max_positions=max_positions,
        sample_size=min(MMDiTConfig.sample_size, max_positions * patch),
    )


LAYOUTS = {
    "diffusers": Layout(r"(.*?)pos_embed\.pos_embed", diffusers_rules),
    "original": Layout(r"(.*?)joint_blocks\.0\.context_block\.attn\.qkv\.weight", lambda config: ORIGINAL_RULES, infer=infer),
}

FIXED: dict = {}                # there are no published fields for which our network has one value only

# our field -> the published field, and the value that diffusers assumes for a config.json without it
FIELDS = {
    "in_channels": ("in_channels", 16),
    "patch": ("patch_size", 2),
    "layers": ("num_layers", 18),
    "heads": ("num_attention_heads", 18),
    "context_dim": ("joint_attention_dim", 4096),
    "pooled_dim": ("pooled_projection_dim", 2048),
    "max_positions": ("pos_embed_max_size", 96),
}

KNOWN = {published for published, _ in FIELDS.values()} | {"attention_head_dim", "caption_projection_dim", "dual_attention_layers",
                                                           "out_channels", "qk_norm", "sample_size"}


def to_config(config: MMDiTConfig) -> dict:
    """The config.json with which diffusers' SD3Transformer2DModel opens the network."""
    return {
        "_class_name": CLASS,
        **{published: getattr(config, ours) for ours, (published, _) in FIELDS.items()},
        "sample_size": config.sample_size,
        "out_channels": config.out_channels,
        "attention_head_dim": config.width // config.heads,
        "caption_projection_dim": config.width,
        "dual_attention_layers": list(config.dual_layers),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def from_config(config: dict) -> MMDiTConfig:
    """A published config.json -> our config. ValueError for what MMDiTConfig cannot express."""
    check(config, CLASS, FIXED, KNOWN)
    values = {ours: config.get(published, default) for ours, (published, default) in FIELDS.items()}
    width, norm, size = values["heads"] * config.get("attention_head_dim", 64), config.get("qk_norm"), sample_size(config, 128)
    if (found := config.get("caption_projection_dim", 1152)) != width:
        raise ValueError(f"{CLASS} config has caption_projection_dim={found}: only the width of the blocks, {width}, fits them")
    if norm not in (None, "rms_norm"):
        raise ValueError(f"{CLASS} config has qk_norm={norm!r}: only null or 'rms_norm' can be expressed here")
    for name, value in (("sample_size", size), ("pos_embed_max_size", values["max_positions"])):
        if not isinstance(value, int):
            raise ValueError(f"{CLASS} config has {name}={value!r}: only one number can be expressed here")
    out_channels = config.get("out_channels", 16)
    return MMDiTConfig(**values, width=width, sample_size=size, qk_norm=norm is not None,
                       out_channels=values["in_channels"] if out_channels is None else out_channels,
                       dual_layers=tuple(sorted(set(config.get("dual_attention_layers") or ()))))
