"""Stable Diffusion's U-Net in its two published layouts: diffusers' (`unet/` of a model folder) and CompVis'.

One field of the published config misleads: `attention_head_dim` holds the *number* of heads (8 in SD 1; 5, 10, 20, 20 in
SD 2).

CompVis counts blocks and resamplings through all levels of one side (input_blocks.0, .1, ...), so that the number in a name
depends on the number of blocks in a level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tinyldm.models.unet import UNetConfig
from tinyldm.vendor_loaders.layout import Layout, Rules, Shape

CLASS = "UNet2DConditionModel"

# Both layouts use the same names inside a transformer.
TRANSFORMER = [
    (r"\.block\.", ".transformer_blocks.0."),
    (r"\.self_attention\.", ".attn1."),
    (r"\.cross_attention\.", ".attn2."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.feed_forward\.proj\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.out\.", ".ff.net.2."),
]

UNET_RULES = [
    (r"^(down|up)\.", r"\1_blocks."),
    (r"^middle\.", "mid_block."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^(down|up)(_blocks\.\d+)\.resample\.", r"\1\2.\1samplers.0."),
    *TRANSFORMER,
]


def compvis_rules(config: UNetConfig) -> Rules:
    """Rules to the names that follow `model.diffusion_model.` in a single-file checkpoint."""
    # The number of the first block of a level. A level of `down` has `depth` blocks and a downsampling, and conv_in is
    # number 0; a level of `up` has depth + 1 blocks, and its upsampling shares the number of the last of them.
    first_in = lambda match: 1 + int(match[1]) * (config.depth + 1)
    first_out = lambda match: int(match[1]) * (config.depth + 1)
    attended = config.attention[::-1]
    return [
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"(?<!block)\.norm1\.", ".in_layers.0."),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"(?<!block)\.norm2\.", ".out_layers.0."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut\.", ".skip_connection."),
        (r"^down\.(\d+)\.resnets\.(\d+)\.", lambda m: f"input_blocks.{first_in(m) + int(m[2])}.0."),
        (r"^down\.(\d+)\.attentions\.(\d+)\.", lambda m: f"input_blocks.{first_in(m) + int(m[2])}.1."),
        (r"^down\.(\d+)\.resample\.conv\.", lambda m: f"input_blocks.{first_in(m) + config.depth}.0.op."),
        (r"^middle\.resnets\.0\.", "middle_block.0."),
        (r"^middle\.attentions\.0\.", "middle_block.1."),
        (r"^middle\.resnets\.1\.", "middle_block.2."),
        (r"^up\.(\d+)\.resnets\.(\d+)\.", lambda m: f"output_blocks.{first_out(m) + int(m[2])}.0."),
        (r"^up\.(\d+)\.attentions\.(\d+)\.", lambda m: f"output_blocks.{first_out(m) + int(m[2])}.1."),
        (r"^up\.(\d+)\.resample\.",
         lambda m: f"output_blocks.{first_out(m) + config.depth}.{1 + attended[int(m[1])]}."),
        *TRANSFORMER,
    ]


def infer(shapes: Mapping[str, Shape]) -> UNetConfig:
    """The config of CompVis weights. They do not tell the number of heads, but Stable Diffusion 1 has 8 at every level, and
    Stable Diffusion 2, recognised by Linear instead of 1x1 convolutions around its transformers, one per 64 channels."""
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks.")}
    downsamplings = [i for i in sorted(blocks) if f"input_blocks.{i}.0.op.weight" in shapes]
    depth = (downsamplings[0] if downsamplings else len(blocks)) - 1
    first = [1 + i * (depth + 1) for i in range(len(downsamplings) + 1)]      # the number of the first block of each level
    widths = tuple(shapes[f"input_blocks.{i}.0.out_layers.0.weight"][0] for i in first)
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        widths=widths,
        depth=depth,
        attention=tuple(f"input_blocks.{i}.1.proj_in.weight" in shapes for i in first),
        heads=tuple(width // 64 if linear else 8 for width in widths),
        context_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        linear_projection=linear,
        upcast_attention=linear,              # SD 2.1 needs it in float16; it does not harm 2.0
    )


LAYOUTS = {
    "diffusers": Layout(r"(.*?)time_embedding\.linear_1\.weight", lambda config: UNET_RULES),
    "CompVis": Layout(r"(.*?)time_embed\.0\.weight", compvis_rules, infer=infer),
}

# Published fields for which our U-Net has one value only. It is diffusers' default too: a config may omit any of them.
FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}

# Published fields that from_config reads, or that have no effect while the fields in FIXED keep their values.
KNOWN = {"addition_embed_type_num_heads", "addition_time_embed_dim", "attention_head_dim", "block_out_channels",
         "class_embeddings_concat", "cross_attention_dim", "down_block_types", "in_channels", "layers_per_block",
         "norm_num_groups", "out_channels", "projection_class_embeddings_input_dim",
         "reverse_transformer_layers_per_block", "sample_size", "up_block_types", "upcast_attention",
         "use_linear_projection"}


def to_config(config: UNetConfig) -> dict:
    """The config.json with which diffusers' UNet2DConditionModel opens the network."""
    down, up = _block_types(config.attention)
    return FIXED | {
        "_class_name": CLASS,
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.depth,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": scalar(config.heads),
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "upcast_attention": config.upcast_attention,
        "norm_num_groups": config.groups,
    }


def from_config(config: dict) -> UNetConfig:
    """A published config.json -> our config. ValueError for what UNetConfig cannot express."""
    check(config, CLASS, FIXED, KNOWN)
    widths = tuple(config.get("block_out_channels", UNetConfig.widths))
    default_down, default_up = _block_types(UNetConfig.attention)
    down, up = list(config.get("down_block_types", default_down)), list(config.get("up_block_types", default_up))
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
    if (down, up) != _block_types(attention):
        raise ValueError(f"U-Net config has down_block_types={down} and up_block_types={up}: only DownBlock2D and "
                         f"CrossAttnDownBlock2D, mirrored on the way up, can be expressed here")
    heads = config.get("attention_head_dim", 8)
    context_dim = scalar(config.get("cross_attention_dim", 1280))
    depth, size = scalar(config.get("layers_per_block", 2)), sample_size(config, UNetConfig.sample_size)
    if isinstance(size, int) and _before_0_9(config):
        size = max(size, 64)        # every pipeline of diffusers corrects this error of old configs
    for name, value in (("cross_attention_dim", context_dim), ("layers_per_block", depth)):
        if not isinstance(value, int):
            raise ValueError(f"U-Net config has {name}={config[name]}: only one number for all levels can be expressed")
    return UNetConfig(
        in_channels=config.get("in_channels", 4),
        out_channels=config.get("out_channels", 4),
        widths=widths,
        depth=depth,
        attention=attention,
        heads=(heads,) * len(widths) if isinstance(heads, int) else tuple(heads),
        context_dim=context_dim,
        linear_projection=config.get("use_linear_projection", False),
        upcast_attention=bool(config.get("upcast_attention")),
        groups=config.get("norm_num_groups", 32),
        sample_size=size,
    )


def check(config: dict, class_name: str, fixed: dict, known: set[str]) -> None:
    """ValueError for a config of another class, with another value of a fixed field, or with an unknown field that is set.
    A class name with "Flax" before it is the same network: the Flax branches of hub repositories have the same fields."""
    if (found := config.get("_class_name", class_name)).removeprefix("Flax") != class_name:
        raise ValueError(f"config.json describes a {found}, not a {class_name}: is it the folder of another model?")
    for name, value in config.items():
        if name.startswith("_") or name in known:
            continue
        if name in fixed and scalar(value) != fixed[name]:
            raise ValueError(f"{class_name} config has {name}={value!r}: only {fixed[name]!r} can be expressed here")
        if name not in fixed and value not in (None, False):
            raise ValueError(f"{class_name} config has the unknown field {name}={value!r}: is it of a newer version?")


def sample_size(config: Mapping, default: int) -> int | tuple[int, int]:
    """A config's sample_size: the side of a square, or (height, width). ValueError for anything else."""
    size = scalar(config.get("sample_size"))
    if size is None:
        return default
    sides = size if isinstance(size, list) else [size]
    if not 1 <= len(sides) <= 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"config.json has sample_size={config['sample_size']!r}: it must be one number, or [height, width]")
    return tuple(size) if isinstance(size, list) else size


def _before_0_9(config: Mapping) -> bool:
    """Whether diffusers before version 0.9 wrote the config. It says so from the first release on."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    return version is not None and (int(version[1]), int(version[2])) < (0, 9)


def scalar(value):
    """[8, 8, 8] -> 8, and [5, 10] as it is: in published configs a field holds one number, or a list with one per level."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[0] if value and all(item == value[0] for item in value) else list(value)


def _block_types(attention: tuple[bool, ...]) -> tuple[list[str], list[str]]:
    """down_block_types and up_block_types of a U-Net whose levels have cross-attention where `attention` says so."""
    down = ["CrossAttnDownBlock2D" if attended else "DownBlock2D" for attended in attention]
    up = ["CrossAttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(attention)]
    return down, up
