"""Times one training step of the `tiny` networks, ours and diffusers' at the same widths, taking turns in one process.

    python benchmarks/training_step.py [--batch-size 64] [--rounds 15]

Forward and backward in bf16 autocast where the machine computes it natively. Medians and their ratio, ours / theirs.
"""

from __future__ import annotations

import argparse
import statistics
import time

from tinyldm.cli import need

need("diffusers", "transformers")

import diffusers
import torch

from tinyldm.config import PRESETS
from tinyldm.device import autocast, pick_device
from tinyldm.lookup import build_dataclass
from tinyldm.models.layers import Cond, prefer_plain_attention
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.vendor_loaders import unet as unets
from tinyldm.vendor_loaders import vae as vaes


def pairs(batch_size: int, device: torch.device) -> dict:
    """name -> (our step, their step), each a function without arguments."""
    row = PRESETS["tiny"]
    width = row["text"]["width"]
    vae_config = build_dataclass(VAEConfig, row["vae"], "vae")
    channels = dict(in_channels=vae_config.latent_channels, out_channels=vae_config.latent_channels, context_dim=width)
    unet_config = build_dataclass(UNetConfig, row["unet"] | channels, "unet")
    ours, our_vae = UNet(unet_config).to(device), AutoencoderKL(vae_config).to(device)
    theirs = diffusers.UNet2DConditionModel.from_config(unets.to_config(unet_config)).to(device)
    their_vae = diffusers.AutoencoderKL.from_config(vaes.to_config(vae_config)).to(device)
    x = torch.randn(batch_size, vae_config.latent_channels, 64 // vae_config.downscale, 64 // vae_config.downscale)
    t, context = torch.rand(batch_size) * 1000, torch.randn(batch_size, 24, width)
    pixels = torch.rand(8, 3, 64, 64) * 2 - 1
    x, t, context, pixels = (tensor.to(device) for tensor in (x, t, context, pixels))
    return {
        "U-Net": (ours, lambda: ours(x, t, Cond(context)), theirs, lambda: theirs(x, t, context).sample),
        "VAE": (our_vae, lambda: our_vae.decode(our_vae.encode(pixels).mean),
                their_vae, lambda: their_vae.decode(their_vae.encode(pixels).latent_dist.mean).sample),
    }


def step(module: torch.nn.Module, forward, device: torch.device) -> float:
    begun = time.perf_counter()
    with autocast(device):
        out = forward()
    out.float().square().mean().backward()
    module.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = pick_device()
    for fused in (True, False):
        torch.backends.cuda.enable_flash_sdp(fused)             # the peer's, and on GPUs ours
        if not fused:
            prefer_plain_attention()
        without = "plain products (what train.py does on a CPU)" if device.type == "cpu" else "another fused kernel (flash attention off)"
        print(f"attention: {'torch default (fused)' if fused else without}")
        for name, (our_module, our_forward, their_module, their_forward) in pairs(args.batch_size, device).items():
            times = [(step(our_module, our_forward, device), step(their_module, their_forward, device))
                     for _ in range(args.rounds)]
            one, two = (statistics.median(column) for column in zip(*times[2:]))
            print(f"  {name:6} tinyldm {1e3 * one:6.0f} ms, diffusers {1e3 * two:6.0f} ms, ratio {one / two:.2f}")


if __name__ == "__main__":
    main()
