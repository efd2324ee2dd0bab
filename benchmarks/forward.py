"""Times forward passes of Stable Diffusion 1's networks, ours and diffusers' or transformers', with the same weights in one process.

    python benchmarks/forward.py [--scale full|small] [--rounds 7]

U-Net: 32x32 latents, batch 2; VAE: decoding to 256x256; text: CLIP ViT-L/14's, 8 captions of 77 tokens. Each is timed with
torch's default attention, which sample.py uses, and without flash attention, which on a CPU means plain matrix products, as train.py
uses them there, and on a GPU another fused kernel. The switch is torch's own, so it also applies to the peer. The two take turns;
medians.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from tinyldm.device import pick_device, prefer_plain_attention
from tinyldm.folders.rename import export_renamed
from tinyldm.folders.save import written_rules
from tinyldm.model import architecture
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig

Forward = Callable[[], Tensor]
FULL = {"U-Net": UNetConfig(), "VAE decode": VAEConfig(), "text": CLIPTextConfig()}
SMALL = {"U-Net": replace(FULL["U-Net"], widths=(64, 128, 256, 256)),
         "VAE decode": replace(FULL["VAE decode"], widths=(32, 64, 128, 128)),
         "text": replace(FULL["text"], width=192, heads=3, mlp_width=768)}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def unet(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> tuple[Forward, Forward]:
    from diffusers import UNet2DConditionModel
    with torch.device("meta"):
        one, two = UNet(config), UNet2DConditionModel.from_config(architecture(UNet).to_config(config))
    same(fresh(one, device, dtype), two)
    x, t = torch.randn(2, config.in_channels, 32, 32), torch.tensor([600.0, 600.0])
    x, t, context = (a.to(device, dtype) for a in (x, t, torch.randn(2, 77, config.context_dim)))
    return lambda: one(x, t, Cond(context)), lambda: two(x, t, context).sample


def vae(config: VAEConfig, device: torch.device, dtype: torch.dtype) -> tuple[Forward, Forward]:
    from diffusers import AutoencoderKL as Theirs
    with torch.device("meta"):
        one, two = AutoencoderKL(config), Theirs.from_config(architecture(AutoencoderKL).to_config(config))
    same(fresh(one, device, dtype), two)
    z = torch.randn(1, config.latent_channels, 256 // config.downscale, 256 // config.downscale).to(device, dtype)
    return lambda: one.decode(z), lambda: two.decode(z).sample


def text(config: CLIPTextConfig, device: torch.device, dtype: torch.dtype) -> tuple[Forward, Forward]:
    from transformers import CLIPTextConfig as TheirConfig
    from transformers import CLIPTextModel
    one, two = CLIPText(config), CLIPTextModel(TheirConfig(**architecture(CLIPText).to_config(config)))
    same(fresh(one, device, dtype), two, drop="text_model.")
    ids = torch.randint(1, 40_000, (8, config.context_length), device=device)
    ids[:, -1] = config.eos_token_id
    return lambda: one(ids).hidden, lambda: two(ids).last_hidden_state


PAIRS = {"U-Net": unet, "VAE decode": vae, "text": text}


@torch.no_grad()
def fresh(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights that keep activations near unit scale, none of them zero."""
    for name, p in module.to_empty(device="cpu").named_parameters():
        if p.dim() > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return module.eval().requires_grad_(False).to(device, dtype)


def same(ours: nn.Module, theirs: nn.Module, drop: str = "") -> None:
    """Give the peer our weights, on a CPU the very same memory. drop: a prefix that its class leaves out."""
    weights = export_renamed(ours.state_dict(), written_rules(ours))
    if drop and not any(name.startswith(drop) for name in theirs.state_dict()):
        weights = {name.removeprefix(drop): w for name, w in weights.items()}
    theirs.load_state_dict(weights, assign=True)
    theirs.eval().requires_grad_(False).to(next(ours.parameters()).device)


def seconds(forward: Forward, device: torch.device) -> float:
    begun = time.perf_counter()
    forward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def medians(one: Forward, two: Forward, rounds: int, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of ours and theirs; which one runs first alternates."""
    times: list[list[float]] = [[], []]
    for i in range(rounds + 1):
        for which in (0, 1)[::1 - 2 * (i % 2)]:
            took = seconds((one, two)[which], device)
            if i:                                               # the first round is a warm-up
                times[which].append(1e3 * took)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = pick_device()
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {args.scale} size, ms\n")
    print("| forward | default attention: tinyldm | peer | ratio | no flash attention: tinyldm | peer | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for name, config in (FULL if args.scale == "full" else SMALL).items():
        for dtype in TOLERANCE:
            torch.manual_seed(0)
            one, two = PAIRS[name](config, device, dtype)
            with torch.inference_mode():
                a, b = one().float(), two().float()
                if (error := ((a - b).norm() / b.norm()).item()) > TOLERANCE[dtype]:
                    raise SystemExit(f"{name}: the outputs differ by {error:.1e} of their norm, so times do not compare")
                torch.backends.cuda.enable_flash_sdp(True)
                default = medians(one, two, args.rounds, device)
                prefer_plain_attention()
                plain = medians(one, two, args.rounds, device)
                torch.backends.cuda.enable_flash_sdp(True)
            cells = " | ".join(f"{ours:.0f} | {peer:.0f} | {ours / peer:.2f}" for ours, peer in (default, plain))
            print(f"| {name}, {str(dtype).removeprefix('torch.')} | {cells} |", flush=True)
            del one, two
            gc.collect()


if __name__ == "__main__":
    main()
