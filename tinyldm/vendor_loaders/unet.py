"""Stable Diffusion's U-Net in diffusers' layout (`unet/` of a model folder): names and config.json.

Where the published config misleads: `attention_head_dim` holds the *number* of heads (8 in SD 1; 5, 10, 20,
20 in SD 2). `upcast_attention` (SD 2.1) is about float16 arithmetic, not about the network, and is not read.
"""

from __future__ import annotations

from tinyldm.models.unet import UNetConfig

CLASS = "UNet2DConditionModel"

UNET_RULES = [
    (r"^(down|up)\.", r"\1_blocks."),
    (r"^middle\.", "mid_block."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^(down|up)(_blocks\.\d+)\.resample\.", r"\1\2.\1samplers.0."),
    (r"\.block\.", ".transformer_blocks.0."),
    (r"\.self_attention\.", ".attn1."),
    (r"\.cross_attention\.", ".attn2."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.feed_forward\.proj\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.out\.", ".ff.net.2."),
]

# What this network always is. The values are diffusers' defaults too, so a config may leave any of them out.
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

# Read below, or without meaning while the fields above keep their values.
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
        "norm_num_groups": config.groups,
    }


def from_config(config: dict) -> UNetConfig:
    """A published config.json -> ours. ValueError for what UNetConfig cannot express."""
    check(config, CLASS, FIXED, KNOWN)
    widths = tuple(config.get("block_out_channels", UNetConfig.widths))
    default_down, default_up = _block_types(UNetConfig.attention)
    down, up = list(config.get("down_block_types", default_down)), list(config.get("up_block_types", default_up))
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
    if (down, up) != _block_types(attention):
        raise ValueError(f"U-Net blocks {down} and {up} cannot be expressed: down takes DownBlock2D and "
                         f"CrossAttnDownBlock2D, up their mirror image")
    heads = config.get("attention_head_dim", 8)
    context_dim = scalar(config.get("cross_attention_dim", 1280))
    depth, size = scalar(config.get("layers_per_block", 2)), scalar(config.get("sample_size"))
    for name, value in (("cross_attention_dim", context_dim), ("layers_per_block", depth), ("sample_size", size or 64)):
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
        groups=config.get("norm_num_groups", 32),
        sample_size=size or 64,
    )


def check(config: dict, class_name: str, fixed: dict, known: set[str]) -> None:
    """ValueError unless config is of this class, agrees with the fixed fields and has no unknown ones switched on."""
    if (found := config.get("_class_name", class_name)) != class_name:
        raise ValueError(f"config.json describes a {found}, not a {class_name}: is it the folder of another model?")
    for name, value in config.items():
        if name.startswith("_") or name in known:
            continue
        if name in fixed and scalar(value) != fixed[name]:
            raise ValueError(f"{class_name} config has {name}={value!r}: only {fixed[name]!r} can be expressed here")
        if name not in fixed and value not in (None, False):
            raise ValueError(f"{class_name} config has the unknown field {name}={value!r}: is it of a newer version?")


def scalar(value):
    """[8, 8, 8] -> 8: published configs give one number, or a list with one per level."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[0] if value and all(item == value[0] for item in value) else list(value)


def _block_types(attention: tuple[bool, ...]) -> tuple[list[str], list[str]]:
    down = ["CrossAttnDownBlock2D" if attended else "DownBlock2D" for attended in attention]
    up = ["CrossAttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(attention)]
    return down, up
