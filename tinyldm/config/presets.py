"""Presets: rows of settings by their names on the command line."""

from __future__ import annotations

from typing import Any

from tinyldm.config.fields import Config, make_config
from tinyldm.lookup import lookup

TINY = dict(
    autoencoder="taesd", vae=dict(latent_channels=8, width=48, blocks=(0, 2, 2, 2)), vae_steps=1900,
    vae_latents=dict(noise=0.1),        # the decoder learns from slightly wrong latents, as a network draws them
    text=dict(width=128, layers=2, heads=4, mlp_width=512, context_length=24, activation="gelu"),
    unet=dict(widths=(64, 128), depth=1, attention=(True, True), heads=(2, 4), groups=8), max_steps=750,
)
WEEK = dict(
    data=["hf://datasets/jackyhate/text-to-image-2M/data_512_2M/data_{000000..000045}.tar"],
    vae_weights="stabilityai/sd-vae-ft-mse", text_weights="laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    resolution=256, stages={"256": 0.79, "512": 0.21}, batch_size=512, grad_accum=4, warmup_steps=1500, ema_decay=0.9999,
    caption_dropout=0.1, lr=2e-4, muon_lr=5e-4, weight_decay=0.01, decay=0.2, max_steps=0, budget="7d",
    save_every=1000, sample_every=2000, val_every=1000, val_samples=1024, log_every=100, cfg=5.0, pictures=4_600_000,
)


def published_vae(channels: int, widths: tuple[int, ...]) -> dict:
    """Settings of CompVis/latent-diffusion (arXiv:2112.10752; configs/autoencoder, main.py), on one GPU: 12 pictures x 2 micro-batches,
    a learning rate of 4.5e-6 per picture; 246,803 steps are those of Stable Diffusion's kl-f8 (its model card), 50,001 of them without
    the adversarial loss. --vae-lpips must say where the weights of LPIPS are."""
    return dict(resolution=384, vae_crop=256, autoencoder="kl", vae=dict(latent_channels=channels, widths=widths), vae_latents={},
                vae_batch_size=24, vae_optimizer="adamw", vae_lr=1.08e-4, vae_decay=0.0, vae_steps=246_803, vae_pictures=200_000,
                vae_val_every=2500,
                vae_loss=dict(l1=1.0, mse=0.0, kl=1e-6, lpips=1.0, gan=0.5),
                vae_gan=dict(kind="hinge", start=0.2, warmup=0.0, width=64, layers=3, norm="batch", lr=1.08e-4))


VAE_PRESETS: dict[str, dict] = {        # --vae-preset: laid over the row of --preset
    "cifar10": dict(
        resolution=32, autoencoder="kl", vae=dict(latent_channels=4, widths=(32, 64, 64), depth=1, groups=8, middle_attention=False),
        vae_latents={}, vae_batch_size=16, vae_steps=3000, vae_pictures=60_000, vae_val_every=100, val_samples=256),
    "kl-f4": published_vae(3, (128, 256, 512)),
    "kl-f8": published_vae(4, (128, 256, 512, 512)),
    # Its levels of 16 x 16 have attention after every block as well (attn_resolutions), which VAEConfig does not have.
    "kl-f16": published_vae(16, (128, 128, 256, 256, 512)),
}
PRESETS: dict[str, dict] = {
    "tiny": TINY,
    "tiny_dit": TINY | dict(
        network="dit", dit=dict(patch=1, width=192, layers=6, heads=4, mlp_width=768, time_dim=128),
        lr=2e-3, muon_lr=2e-3, max_steps=1000),
    "tiny_mmdit": TINY | dict(
        network="mmdit", net=dict(patch=1, width=96, layers=6, heads=3, qk_norm=True, max_positions=16),
        lr=4e-3, muon_lr=5e-3, max_steps=1800),
    "5090_week": WEEK | dict(network="dit", dit=dict(width=1024, layers=16, heads=16), grad_accum=8),
    "5090_week_unet": WEEK | dict(
        network="unet", unet=dict(widths=(192, 384, 768, 768), heads=(3, 6, 12, 12)), utilisation=0.4),
}

# Where --network names another than the preset's: the preset whose network, of a size that fits, takes its place, with its learning rates
# and steps.
OTHER_NETWORK = {("tiny", "dit"): "tiny_dit", ("tiny", "mmdit"): "tiny_mmdit",
                 ("tiny_dit", "unet"): "tiny", ("tiny_dit", "mmdit"): "tiny_mmdit",
                 ("tiny_mmdit", "unet"): "tiny", ("tiny_mmdit", "dit"): "tiny_dit",
                 ("5090_week", "unet"): "5090_week_unet", ("5090_week_unet", "dit"): "5090_week"}
TINY_FLUX = dict(net=dict(width=128, heads=4, double_layers=3, single_layers=6, rope_axes=(8, 12, 12)), lr=2e-3, muon_lr=2e-3)

TINY_VAES = {"kl": dict(latent_channels=8, widths=(16, 32, 64, 96), depth=1, groups=8, middle_attention=False)}


def preset_row(preset: str, network: str | None = None, autoencoder: str | None = None) -> dict[str, Any]:
    """A preset's settings, with a network and an autoencoder of other kinds where they are asked for: of sizes that fit the preset, where
    it has them, else of the published ones. ValueError for a preset that is not there."""
    row = lookup(PRESETS, preset, "preset")
    if network not in (None, row.get("network", "unet")):
        fitting = PRESETS.get(OTHER_NETWORK.get((preset, network), ""), {})
        fitting = TINY_FLUX if network == "flux" and preset.startswith("tiny") else fitting
        row = {name: value for name, value in row.items() if name != "net"} | fitting | {"network": network}
    if autoencoder not in (None, row.get("autoencoder", "kl")):
        row = row | {"autoencoder": autoencoder, "vae": TINY_VAES.get(autoencoder, {}) if preset.startswith("tiny") else {}}
    return row | {"preset": preset}


def preset_config(preset: str, **changes: Any) -> Config:
    """A preset's configuration, with changes by their flat names. ValueError for a preset that is not there."""
    return make_config(**preset_row(preset) | changes)
