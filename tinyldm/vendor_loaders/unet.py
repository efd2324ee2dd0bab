"""Stable Diffusion's U-Net (1, 2 and XL) in its two published layouts: diffusers' (`unet/` of a model folder) and CompVis'.

One field of the published config misleads: `attention_head_dim` holds the *number* of heads (8 in SD 1; 5, 10, 20, 20 in
SD 2; 5, 10, 20 in SDXL).

CompVis counts blocks and resamplings through all levels of one side (input_blocks.0, .1, ...), so that the number in a name
depends on the number of blocks in a level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from tinyldm.models.layers import TOLD_CHANNELS
from tinyldm.models.unet import SIZE_CHANNELS, SIZES, UNetConfig
from tinyldm.vendor_loaders.layout import Layout, Rules, Shape

CLASS = "UNet2DConditionModel"

# Both layouts use the same names inside a transformer.
TRANSFORMER = [
    (r"\.blocks\.", ".transformer_blocks."),
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
    (r"^time_embedding\.told\.guidance\.", "time_embedding.cond_proj."),
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
        (r"^time_embedding\.told\.guidance\.", "time_embed.cond_proj."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
        (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"(resnets\.\d+)\.norm1\.", r"\1.in_layers.0."),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"(resnets\.\d+)\.norm2\.", r"\1.out_layers.0."),
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


# U-Nets that would load, or nearly, and then draw nothing sensible: (inputs of label_emb, width of the text features, width of the
# first level) -> what they are. The others are found by the tensors and the fields that they have in addition: see OTHERS.
REFINER = (2560, 1280, 384)
UNCLIP = "Stable unCLIP's, which draws variations of a picture: there the label is the picture's embedding"
LABELS = {REFINER: "Stable Diffusion XL's refiner, which finishes pictures that the base model has begun: draw with the base model alone",
          (2048, 1024, 320): UNCLIP, (1536, 1024, 320): UNCLIP}
PRUNED = "one number of blocks per level, the last also in the middle, can be expressed here (SSD-1B and Segmind-Vega are pruned)"
OTHERS = {"label_emb.weight": "an upscaler's, which takes the noise level of a small picture that it enlarges"}


def infer(shapes: Mapping[str, Shape]) -> UNetConfig:
    """The config of CompVis weights. They do not tell the number of heads, but Stable Diffusion 1 has 8 at every level, and 2
    and XL, recognised by Linear instead of 1x1 convolutions around their transformers, one per 64 channels. ValueError, with its name
    where that is known, for a U-Net that UNetConfig cannot express."""
    if reason := next((reason for name, reason in OTHERS.items() if name in shapes), None):
        raise ValueError(f"the U-Net is {reason}")
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks.")}
    downsamplings = [i for i in sorted(blocks) if f"input_blocks.{i}.0.op.weight" in shapes]
    depth = (downsamplings[0] if downsamplings else len(blocks)) - 1
    first = [1 + i * (depth + 1) for i in range(len(downsamplings) + 1)]      # the number of the first block of each level
    widths = tuple(shapes[f"input_blocks.{i}.0.out_layers.0.weight"][0] for i in first)
    attention = tuple(f"input_blocks.{i}.1.proj_in.weight" in shapes for i in first)
    layers = _layers_of(shapes, first, depth, attention)
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    context_dim = shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    label = shapes.get("label_emb.0.0.weight")
    if label and (reason := LABELS.get((label[1], context_dim, widths[0]))):
        raise ValueError(f"the U-Net is {reason}")
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        widths=widths,
        depth=depth,
        attention=attention,
        heads=tuple(width // 64 if linear else 8 for width in widths),
        context_dim=context_dim,
        linear_projection=linear,
        upcast_attention=linear and not label,              # SD 2.1 needs it in float16; it does not harm 2.0
        transformer_layers=() if set(layers) == {1} else layers,
        pooled_dim=label[1] - SIZES * SIZE_CHANNELS if label else None,
        told=("guidance",) * ("time_embed.cond_proj.weight" in shapes),
    )


def _layers_of(shapes: Mapping[str, Shape], first: list[int], depth: int, attention: tuple[bool, ...]) -> tuple[int, ...]:
    """Blocks per transformer and level of CompVis weights. first: the number of the first input block of each level. ValueError where
    the transformers of a level, or the last level's and the middle's, have different numbers of blocks."""
    found: dict[str, int] = {}                  # such as "input_blocks.4" -> blocks of the transformer there
    for name in shapes:
        if match := re.match(r"((?:input|output)_blocks\.\d+|middle_block)\.1\.transformer_blocks\.(\d+)\.", name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    layers = [found.get(f"input_blocks.{i}", 1) for i in first]
    if not attention[-1]:
        layers[-1] = found.get("middle_block", 1)
    expected = {"middle_block": layers[-1]}
    for level, number in enumerate(first):
        if attention[level]:
            start = (len(first) - 1 - level) * (depth + 1)
            places = [f"input_blocks.{number + j}" for j in range(depth)] + [f"output_blocks.{start + j}" for j in range(depth + 1)]
            expected |= dict.fromkeys(places, layers[level])
    if wrong := sorted(place for place in found.keys() | expected.keys() if found.get(place) != expected.get(place)):
        raise ValueError(f"the transformer in {wrong[0]} has {found.get(wrong[0], 0)} blocks, not {expected.get(wrong[0], 0)}: {PRUNED}, "
                         f"or the file is incomplete")
    return tuple(layers)


LAYOUTS = {
    "diffusers": Layout(r"(.*?)time_embedding\.linear_1\.weight", lambda config: UNET_RULES),
    "CompVis": Layout(r"(.*?)time_embed\.0\.weight", compvis_rules, infer=infer),
}

# Published fields for which our U-Net has one value only. It is diffusers' default too: a config may omit any of them.
FIXED = {
    "act_fn": "silu",
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
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# What a U-Net is that has another value in one of these fields.
REASONS = {
    "class_embed_type": f"the U-Net is {UNCLIP}",
    "num_class_embeds": f"the U-Net is {OTHERS['label_emb.weight']}",
    "encoder_hid_dim_type": "it projects its text features, as Kolors does, or also takes pictures",
    "encoder_hid_dim": "it projects its text features, as Kolors does, or also takes pictures",
    "mid_block_type": PRUNED,
}

# Published fields that from_config reads, or that have no effect while the fields in FIXED keep their values.
KNOWN = {"addition_embed_type", "addition_embed_type_num_heads", "addition_time_embed_dim", "attention_head_dim", "block_out_channels",
         "class_embeddings_concat", "cross_attention_dim", "down_block_types", "in_channels", "layers_per_block",
         "norm_num_groups", "out_channels", "projection_class_embeddings_input_dim", "time_cond_proj_dim", "told",
         "reverse_transformer_layers_per_block", "sample_size", "transformer_layers_per_block", "up_block_types",
         "upcast_attention", "use_linear_projection"}


def to_config(config: UNetConfig) -> dict:
    """The config.json with which diffusers' UNet2DConditionModel opens the network."""
    down, up = _block_types(config.attention)
    added = {} if config.pooled_dim is None else {
        "addition_embed_type": "text_time", "addition_time_embed_dim": SIZE_CHANNELS,
        "projection_class_embeddings_input_dim": config.pooled_dim + SIZES * SIZE_CHANNELS}
    own = {"told": others} if (others := [name for name in config.told if name != "guidance"]) else {}      # only tinyldm knows these
    return FIXED | added | own | {
        "time_cond_proj_dim": TOLD_CHANNELS if "guidance" in config.told else None,
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
        "transformer_layers_per_block": scalar(config.transformer_layers or (1,)),
    }


def from_config(config: dict) -> UNetConfig:
    """A published config.json -> our config. ValueError for what UNetConfig cannot express."""
    check(config, CLASS, FIXED, KNOWN, REASONS)
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
    pooled_dim = _pooled_dim(config)
    if pooled_dim is not None and (pooled_dim + SIZES * SIZE_CHANNELS, context_dim, widths[0]) == REFINER:
        raise ValueError(f"the U-Net is {LABELS[REFINER]}")
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
        transformer_layers=_layers(config, attention),
        pooled_dim=pooled_dim,
        told=_told(config),
    )


def _layers(config: Mapping, attention: tuple[bool, ...]) -> tuple[int, ...]:
    """transformer_layers of a published config, where it is one number, or a list with a number per level, or a list of lists with
    a number per transformer. ValueError where the transformers of a level differ."""
    levels = range(len(attention))
    stated = config.get("transformer_layers_per_block", 1)
    down = [scalar(number) for number in stated] if isinstance(stated, (list, tuple)) else [stated for _ in levels]
    up = [scalar(number) for number in config.get("reverse_transformer_layers_per_block") or down[::-1]]
    same = len(down) == len(up) == len(levels) and all(down[i] == up[-1 - i] for i in levels if attention[i])
    if not same or not all(isinstance(number, int) for number in down):
        raise ValueError(f"U-Net config has transformer_layers_per_block={stated}: {PRUNED}")
    layers = tuple(1 if number == 0 and not attended else number for number, attended in zip(down, attention))
    return () if set(layers) == {1} else layers


def _told(config: Mapping) -> tuple[str, ...]:
    """The numbers that the network of a published config is told: a latent consistency model's the guidance scale."""
    width = config.get("time_cond_proj_dim")
    if width not in (None, TOLD_CHANNELS):
        raise ValueError(f"U-Net config has time_cond_proj_dim={width}: only {TOLD_CHANNELS}, as in latent consistency models, can be "
                         "expressed here")
    return (*["guidance"] * (width is not None), *config.get("told", ()))


def _pooled_dim(config: Mapping) -> int | None:
    """pooled_dim of a published config. ValueError for conditions that are neither SDXL's nor none."""
    kind = config.get("addition_embed_type")
    if kind is None:
        return None
    each, inputs = config.get("addition_time_embed_dim"), config.get("projection_class_embeddings_input_dim")
    if kind != "text_time" or each != SIZE_CHANNELS or not isinstance(inputs, int):
        raise ValueError(f"U-Net config has addition_embed_type={kind!r} with addition_time_embed_dim={each} and "
                         f"projection_class_embeddings_input_dim={inputs}: only 'text_time' with {SIZE_CHANNELS}, as in Stable "
                         "Diffusion XL, can be expressed here")
    return inputs - SIZES * SIZE_CHANNELS


def check(config: dict, class_name: str, fixed: dict, known: set[str], reasons: Mapping[str, str] = MappingProxyType({})) -> None:
    """ValueError for a config of another class, with another value of a fixed field, or with an unknown field that is set.
    A class name with "Flax" before it is the same network: the Flax branches of hub repositories have the same fields.
    reasons: what a network is that has another value in one of the fixed fields."""
    if (found := config.get("_class_name", class_name)).removeprefix("Flax") != class_name:
        raise ValueError(f"config.json describes a {found}, not a {class_name}: is it the folder of another model?")
    for name, value in config.items():
        if name.startswith("_") or name in known:
            continue
        if name in fixed and scalar(value) != fixed[name]:
            reason = reasons.get(name, f"only {fixed[name]!r} can be expressed here")
            raise ValueError(f"{class_name} config has {name}={value!r}: {reason}")
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
