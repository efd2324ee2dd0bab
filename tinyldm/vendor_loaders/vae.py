"""Stable Diffusion's autoencoder in its two published layouts: diffusers' (`vae/` of a model folder) and CompVis'.

In diffusers files from before 2023 (SD 1 among them) the layers of the middle attention are called query, key, value and
proj_attn, and config.json lacks scaling_factor, which was 0.18215. CompVis counts the levels of the decoder from the finest
to the coarsest, and stores the matrices of the attention as 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping

from tinyldm.models.vae import VAEConfig
from tinyldm.vendor_loaders.layout import Layout, Rules, Shape
from tinyldm.vendor_loaders.unet import check, sample_size, scalar

CLASS = "AutoencoderKL"

VAE_RULES = [
    (r"\.(down|up)\.", r".\1_blocks."),
    (r"\.middle\.", ".mid_block."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.(down|up)(_blocks\.\d+)\.resample\.", r".\1\2.\1samplers.0."),
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attention\.", "."),
    (r"\.to_out\.", ".to_out.0."),
]

OLD_NAMES = [(rf"\.attentions\.0\.{old}\.", f".attentions.0.{new}.")
             for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))]

# Number of latent channels -> the scaling and shift factor to assume for weights without a config.json: 4 channels are taken
# for Stable Diffusion 1 and 2. (SDXL has 4 too, and 0.13025: load it from its diffusers folder.)
SCALING = {4: (0.18215, 0.0)}


def compvis_rules(config: VAEConfig) -> Rules:
    """Rules to the names that follow `first_stage_model.` in a single-file checkpoint; a file with the VAE alone has no prefix."""
    finest = len(config.widths) - 1
    return [
        (r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{finest - int(match[1])}."),
        (r"\.(down|up)\.(\d+)\.resnets\.", r".\1.\2.block."),
        (r"\.(down|up)(\.\d+)\.resample\.", r".\1\2.\1sample."),
        (r"\.middle\.resnets\.0\.", ".mid.block_1."),
        (r"\.middle\.resnets\.1\.", ".mid.block_2."),
        (r"\.middle\.attentions\.0\.norm\.", ".mid.attn_1.norm."),
        (r"\.middle\.attentions\.0\.attention\.to_([qkv])\.(\w+)$", r".mid.attn_1.\1.\2@1x1"),
        (r"\.middle\.attentions\.0\.attention\.to_out\.(\w+)$", r".mid.attn_1.proj_out.\1@1x1"),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
    ]


def infer(shapes: Mapping[str, Shape], scaling: tuple[float, float] | None = None) -> VAEConfig:
    """The config of CompVis weights. scaling: scaling and shift factor, where something else tells them. ValueError where it is None and
    autoencoders with different ones have the same tensors."""
    count = lambda text: sum(text.format(i) in shapes for i in range(16))
    levels, channels = count("encoder.down.{}.block.0.norm1.weight"), shapes["decoder.conv_in.weight"][1]
    if scaling is None and channels not in SCALING:
        raise ValueError(f"an autoencoder of {channels} latent channels without a config.json: its scaling factor cannot be told "
                         f"from the weights (those of SD 3 and FLUX.1 differ in nothing else); use its diffusers folder")
    scale, shift = scaling or SCALING[channels]
    return VAEConfig(
        latent_channels=channels,
        widths=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        depth=count("encoder.down.0.block.{}.norm1.weight"),
        middle_attention="encoder.mid.attn_1.norm.weight" in shapes,
        quant_convs="quant_conv.weight" in shapes,
        scaling_factor=scale,
        shift_factor=shift,
    )


# Leaves out the discriminator, LPIPS and the moving average, which checkpoints of the autoencoder's training hold beside it.
TRAINING = [(r"^(loss|model_ema)\..*", "")]

LAYOUTS = {
    "diffusers": Layout(r"(.*?)encoder\.down_blocks\.0\.resnets\.0\.norm1\.weight", lambda config: VAE_RULES,
                        lambda config: OLD_NAMES),
    "CompVis": Layout(r"(.*?)encoder\.down\.0\.block\.0\.norm1\.weight", compvis_rules, lambda config: TRAINING, infer),
}

# Published fields for which our autoencoder has one value only.
FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "latents_mean": None, "latents_std": None}

OTHER_SCALE = "its latents are standardised by a mean and a standard deviation per channel, as Playground 2.5's are for EDM's process"
REASONS = {"latents_mean": OTHER_SCALE, "latents_std": OTHER_SCALE}

# Published fields that from_config accepts. It ignores force_upcast: no autoencoder works in float16 here, which the one of SDXL
# overflows, and the variants of it that do not (force_upcast is false there) give the same pictures in float32.
KNOWN = {"block_out_channels", "down_block_types", "force_upcast", "latent_channels", "layers_per_block",
         "mid_block_add_attention", "norm_num_groups", "sample_size", "scaling_factor", "shift_factor",
         "up_block_types", "use_post_quant_conv", "use_quant_conv"}


def to_config(config: VAEConfig) -> dict:
    """The config.json with which diffusers' AutoencoderKL opens the network."""
    levels = len(config.widths)
    return FIXED | {
        "_class_name": CLASS,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.depth,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.middle_attention,
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "sample_size": config.sample_size,
        "force_upcast": True,
    }


def from_config(config: dict) -> VAEConfig:
    """A published config.json -> our config. ValueError for what VAEConfig cannot express."""
    check(config, CLASS, FIXED, KNOWN, REASONS)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if scalar(config.get(name, kind)) != kind:
            raise ValueError(f"autoencoder config has {name}={config[name]}: only {kind} can be expressed here")
    quant, post_quant = config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)
    if quant != post_quant:
        raise ValueError(f"autoencoder config has use_quant_conv={quant} but use_post_quant_conv={post_quant}: "
                         f"only both or neither can be expressed here")
    return VAEConfig(
        latent_channels=config.get("latent_channels", 4),
        widths=tuple(config.get("block_out_channels", (64,))),
        depth=config.get("layers_per_block", 1),
        groups=config.get("norm_num_groups", 32),
        middle_attention=config.get("mid_block_add_attention", True),
        quant_convs=quant,
        scaling_factor=config.get("scaling_factor", 0.18215),
        shift_factor=config.get("shift_factor") or 0.0,
        sample_size=sample_size(config, 32),
    )
