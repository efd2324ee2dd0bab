"""Cases of `sample` and `encode`: forward passes of networks, beside diffusers' and transformers'."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.bench.compare import TOLERANCE, Case, Options, Work, with_compiled
from benchmarks.bench.pairs import (
    CLIP_L,
    CLIP_SMALL,
    CLIP_TINY,
    KL8,
    KL8_SMALL,
    KL8_TINY,
    PAIRS,
    SD1,
    SD1_SMALL,
    SD1_TINY,
    Row,
    forward_flops,
    make_inputs,
    our_network,
    their_network,
)
from tinyldm.device import DTYPES
from tinyldm.models.flux import FluxConfig
from tinyldm.models.mmdit import MMDiTConfig
from tinyldm.models.t5 import T5Config
from tinyldm.models.taesd import TAESDConfig
from tinyldm.models.unet import UNetConfig

# The transformers have their published blocks, but fewer and narrower ones, so that a CPU computes them in seconds.
SDXL = UNetConfig(widths=(192, 384, 768), attention=(False, True, True), heads=(3, 6, 12), context_dim=2048, linear_projection=True,
                  transformer_layers=(1, 2, 10), pooled_dim=1280)
SD3 = MMDiTConfig(width=768, layers=6, heads=12, qk_norm=True, dual_layers=(0, 1, 2))
FLUX = FluxConfig(width=768, heads=6, double_layers=3, single_layers=6, guidance=True)
T5_BASE = T5Config(width=768, layers=12, heads=12, mlp_width=2048)
ROWS = {
    "sample": [
        Row("U-Net of SD 1.5", "unet", SD1, {"full": ({}, 2, 32), "small": (SD1_SMALL, 2, 32), "tiny": (SD1_TINY, 1, 8)}),
        Row("U-Net of SDXL, 0.6 wide", "unet", SDXL, {
            "full": ({}, 2, 32), "small": (dict(widths=(64, 128, 256), heads=(1, 2, 4)), 2, 32),
            "tiny": (dict(widths=(32, 32, 64), heads=(1, 1, 1), depth=1, transformer_layers=(1, 1, 1), context_dim=64), 1, 8)}),
        Row("MMDiT of SD 3.5 medium, 768 wide", "mmdit", SD3, {
            "full": ({}, 1, 32), "small": (dict(width=256, heads=4), 1, 32),
            "tiny": (dict(width=64, heads=1, layers=2, dual_layers=(0,), context_dim=64, pooled_dim=32), 1, 8)}),
        Row("FLUX, 768 wide", "flux", FLUX, {
            "full": ({}, 1, 32), "small": (dict(width=256, heads=2), 1, 32),
            "tiny": (dict(width=128, heads=1, double_layers=1, single_layers=1, context_dim=64, pooled_dim=32), 1, 8)}),
    ],
    "encode": [
        Row("CLIP ViT-L text, 77 tokens", "clip", CLIP_L, {"full": ({}, 8, 77), "small": (CLIP_SMALL, 8, 77), "tiny": (CLIP_TINY, 2, 77)}),
        Row("T5 v1.1 base, 256 tokens", "t5", T5_BASE, {
            "full": ({}, 2, 256), "small": (dict(width=256, heads=4, mlp_width=768), 2, 256),
            "tiny": (dict(width=64, heads=1, mlp_width=128, layers=2, vocab_size=1000), 2, 16)}),
        Row("T5 v1.1 XXL, 2 of 24 layers", "t5", T5Config(layers=2, vocab_size=1000), {
            "full": ({}, 2, 256), "small": (dict(width=1024, heads=16, mlp_width=2560), 2, 256),
            "tiny": (dict(width=128, heads=2, mlp_width=256), 2, 16)}),
        Row("VAE of SD 1.5, encode 256 px", "encode", KL8, {"full": ({}, 1, 256), "small": (KL8_SMALL, 1, 256), "tiny": (KL8_TINY, 1, 32)}),
        Row("VAE of SD 1.5, decode 256 px", "decode", KL8, {"full": ({}, 1, 256), "small": (KL8_SMALL, 1, 256), "tiny": (KL8_TINY, 1, 32)}),
        Row("TAESD, encode and decode 256 px", "taesd", TAESDConfig(), {
            "full": ({}, 4, 256), "small": (dict(width=32), 4, 256), "tiny": (dict(width=16), 1, 32)}),
    ],
}


def build(row: Row, options: Options, theirs: bool, compiled: bool) -> Work:
    device, dtype, pair = torch.device(options.device), DTYPES[options.dtype], PAIRS[row.kind]
    net = our_network(row, options.scale, device, dtype)
    call = pair.ours
    if theirs:
        net, call = their_network(row, net), pair.theirs
    call = torch.compile(call, dynamic=False) if compiled else call
    inputs = make_inputs(row, options.scale, device, dtype)
    return Work(torch.inference_mode()(lambda: call(net, inputs)), device)


def cases(options: Options) -> list[Case]:
    made = []
    for row in ROWS[options.command]:
        sides = with_compiled(options, "tinyldm", partial(build, row, options, False))
        if options.peer != "none":
            sides += with_compiled(options, PAIRS[row.kind].library, partial(build, row, options, True), peer=True)
        made.append(Case(f"{row.name}, {options.dtype}", sides, partial(forward_flops, row, options.scale), TOLERANCE[options.dtype]))
    return made
