"""Times forward passes, ours and diffusers' or transformers', with the same weights in one process: the networks of Stable Diffusion 1,
and narrower ones of SDXL's, Stable Diffusion 3.5's and FLUX's shapes.

    python benchmarks/forward.py [--scale full|small] [--rounds 7]

U-Net: 32x32 latents, batch 2; VAE: decoding to 256x256; text: CLIP ViT-L/14's, 8 captions of 77 tokens; SDXL U-Net: 0.6 of its
widths, as the U-Net; MMDiT: 3.5 medium's blocks, 768 wide with 3 + 3 of them, 32x32 latents and 154 tokens of text; FLUX: 768 wide
with 3 + 6 blocks, 32x32 latents and 128 tokens of text; T5: version 1.1's base and two of XXL's layers, 2 captions of 256 tokens.
Each is timed with torch's default attention, which sample.py uses, and without flash attention, which on a CPU means plain matrix
products, as train.py uses them there, and on a GPU another fused kernel. The switch is torch's own, so it also applies to the peer.
The two take turns; medians.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from tinyldm.cli import need
from tinyldm.device import pick_device
from tinyldm.folders.rename import export_renamed
from tinyldm.folders.save import written_rules
from tinyldm.model import architecture
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.flux import PATCH, Flux, FluxConfig
from tinyldm.models.layers import Cond
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.t5 import T5, T5Config
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig

Forward = Callable[[], Tensor]
FULL = {"U-Net": UNetConfig(), "VAE decode": VAEConfig(), "text": CLIPTextConfig(),
        "SDXL U-Net": UNetConfig(widths=(192, 384, 768), attention=(False, True, True), heads=(3, 6, 12), context_dim=2048,
                                 linear_projection=True, transformer_layers=(1, 2, 10), pooled_dim=1280),
        "MMDiT": MMDiTConfig(width=768, layers=6, heads=12, qk_norm=True, dual_layers=(0, 1, 2)),
        "FLUX": FluxConfig(width=768, heads=6, double_layers=3, single_layers=6, guidance=True),
        "T5 base": T5Config(width=768, layers=12, heads=12, mlp_width=2048),
        "T5 XXL, 2 layers": T5Config(layers=2, vocab_size=1000)}
SMALL = {"U-Net": replace(FULL["U-Net"], widths=(64, 128, 256, 256)),
         "VAE decode": replace(FULL["VAE decode"], widths=(32, 64, 128, 128)),
         "text": replace(FULL["text"], width=192, heads=3, mlp_width=768),
         "SDXL U-Net": replace(FULL["SDXL U-Net"], widths=(64, 128, 256), heads=(1, 2, 4)),
         "MMDiT": replace(FULL["MMDiT"], width=256, heads=4),
         "FLUX": replace(FULL["FLUX"], width=256, heads=2),
         "T5 base": replace(FULL["T5 base"], width=256, heads=4, mlp_width=768)}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def unet(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> tuple[Forward, Forward]:
    from diffusers import UNet2DConditionModel
    with torch.device("meta"):
        one, two = UNet(config), UNet2DConditionModel.from_config(architecture(UNet).to_config(config))
    same(fresh(one, device, dtype), two)
    x, t = torch.randn(2, config.in_channels, 32, 32), torch.tensor([600.0, 600.0])
    x, t, context = (a.to(device, dtype) for a in (x, t, torch.randn(2, 77, config.context_dim)))
    if config.pooled_dim is None:
        return lambda: one(x, t, Cond(context)), lambda: two(x, t, context).sample
    pooled, sizes = torch.randn(2, config.pooled_dim).to(device, dtype), torch.tensor([[256.0, 256, 0, 0, 256, 256]] * 2, device=device)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return (lambda: one(x, t, Cond(context, pooled=pooled, extra={"sizes": sizes})),
            lambda: two(x, t, context, added_cond_kwargs=added).sample)


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


def mmdit(config: MMDiTConfig, device: torch.device, dtype: torch.dtype) -> tuple[Forward, Forward]:
    from diffusers import SD3Transformer2DModel
    with torch.device("meta"):
        one, two = MMDiT(config), SD3Transformer2DModel.from_config(architecture(MMDiT).to_config(config))
    one = fresh(one, device, dtype)
    one.positions.normal_()
    same(one, two)
    x, context, pooled = (torch.randn(*shape).to(device, dtype) for shape in (
        (1, config.in_channels, 32, 32), (1, 154, config.context_dim), (1, config.pooled_dim)))
    t, cond = torch.tensor([600.0], device=device).to(dtype), Cond(context, pooled=pooled)
    return lambda: one(x, t, cond), lambda: two(x, context, pooled, t).sample


def flux(config: FluxConfig, device: torch.device, dtype: torch.dtype) -> tuple[Forward, Forward]:
    from diffusers import FluxPipeline, FluxTransformer2DModel
    with torch.device("meta"):
        one, two = Flux(config), FluxTransformer2DModel.from_config(architecture(Flux).to_config(config))
    same(fresh(one, device, dtype), two)
    side, tokens = 32, 128
    x, context, pooled = (torch.randn(*shape).to(device, dtype) for shape in (
        (1, config.in_channels, side, side), (1, tokens, config.context_dim), (1, config.pooled_dim)))
    t, guidance = torch.tensor([500.0], device=device), torch.tensor([4.0], device=device)          # which bfloat16 holds
    cond = Cond(context, pooled=pooled, extra={"guidance": guidance})
    places = FluxPipeline._prepare_latent_image_ids(1, side // PATCH, side // PATCH, device, dtype)
    origin = torch.zeros(tokens, 3, device=device, dtype=dtype)

    def theirs() -> Tensor:
        packed = FluxPipeline._pack_latents(x, *x.shape)
        out = two(packed, context, pooled, t / 1000, places, origin, guidance).sample
        return FluxPipeline._unpack_latents(out, 8 * side, 8 * side, 8)

    return lambda: one(x, t, cond), theirs


def t5(config: T5Config, device: torch.device, dtype: torch.dtype) -> tuple[Forward, Forward]:
    from transformers import T5Config as TheirConfig
    from transformers import T5EncoderModel
    with torch.device("meta"):
        one, two = T5(config), T5EncoderModel(TheirConfig(**architecture(T5).to_config(config)))
    one = fresh(one, device, dtype)
    one.token_embedding.weight.mul_(config.width**0.5)
    for layer in one.layers:
        layer.q.weight.div_(config.head_dim**0.5)           # logits of unit scale, as trained ones are: nothing divides them
    same(one, two, tied={"encoder.embed_tokens.weight": "shared.weight"})
    ids = torch.randint(2, 1000, (2, 256), device=device)
    ids[:, -1] = config.eos_token_id
    return lambda: one(ids).hidden, lambda: two(ids).last_hidden_state


PAIRS = {"U-Net": unet, "SDXL U-Net": unet, "VAE decode": vae, "text": text, "MMDiT": mmdit, "FLUX": flux, "T5 base": t5,
         "T5 XXL, 2 layers": t5}


@torch.no_grad()
def fresh(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights that keep activations near unit scale, none of them zero."""
    for name, p in module.to_empty(device="cpu").named_parameters():
        if p.dim() > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return module.eval().requires_grad_(False).to(device, dtype)


def same(ours: nn.Module, theirs: nn.Module, drop: str = "", tied: Mapping[str, str] = MappingProxyType({})) -> None:
    """Give the peer our weights, on a CPU the very same memory. drop: a prefix that its class leaves out. tied: further names of
    tensors -> those that they have in a file."""
    weights = export_renamed(ours.state_dict(), written_rules(ours))
    if drop and not any(name.startswith(drop) for name in theirs.state_dict()):
        weights = {name.removeprefix(drop): w for name, w in weights.items()}
    theirs.load_state_dict(weights | {name: weights[other] for name, other in tied.items()}, assign=True)
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
    need("diffusers", "transformers")
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
                torch.backends.cuda.enable_flash_sdp(False)
                plain = medians(one, two, args.rounds, device)
                torch.backends.cuda.enable_flash_sdp(True)
            cells = " | ".join(f"{ours:.0f} | {peer:.0f} | {ours / peer:.2f}" for ours, peer in (default, plain))
            print(f"| {name}, {str(dtype).removeprefix('torch.')} | {cells} |", flush=True)
            del one, two
            gc.collect()


if __name__ == "__main__":
    main()
