"""Cases of `train`: forward pass, backward pass and AdamW's step, beside diffusers'. The outputs that are compared are the gradients.

Our side is set up as train.py does it: plain attention, freed memory that is kept, deterministic algorithms and channels-last weights on
CPUs; compile_network under --compile. The peer's is diffusers as it comes, but with AdamW's fused kernel, which its own scripts do not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.bench.compare import TOLERANCE, Case, Options, Side, Work, with_compiled
from benchmarks.bench.pairs import KL8_TINY, PAIRS, Inputs, Row, forward_flops, make_inputs, our_network, their_names, their_network
from tinyldm.config import PRESETS, make_config
from tinyldm.device import autocast, deterministic, keep_freed_memory
from tinyldm.lookup import build_dataclass
from tinyldm.model import NETWORKS, architecture
from tinyldm.models.layers import prefer_plain_attention
from tinyldm.models.mmdit import MMDiTConfig
from tinyldm.models.taesd import TAESDConfig
from tinyldm.models.unet import UNetConfig
from tinyldm.models.vae import VAEConfig
from tinyldm.training.optim import make_optimizers
from tinyldm.training.second_stage import compile_network

LR, BETAS, DECAY = 1e-4, (0.9, 0.95), 0.01
BACKWARD = 2              # of the rounding that outputs have, in gradients
PRESET = PRESETS["tiny"]
CHANNELS = dict.fromkeys(("in_channels", "out_channels"), PRESET["vae"]["latent_channels"])
TINY_UNET = build_dataclass(UNetConfig, PRESET["unet"] | CHANNELS | {"context_dim": PRESET["text"]["width"]}, "unet")
TINY_VAE = build_dataclass(TAESDConfig, PRESET["vae"], "vae")
NARROW = dict(widths=(32, 64), attention=(True, True), heads=(1, 2), depth=1)
THREE_LEVELS = UNetConfig(widths=(128, 256, 384), attention=(True, True, True), heads=(2, 4, 6))
ROWS = [
    Row("U-Net 128/256/384", "unet", THREE_LEVELS, {"full": ({}, 32, 16), "small": ({}, 4, 16), "tiny": (NARROW, 1, 8)}),
    Row("U-Net of the preset tiny", "unet", TINY_UNET, {"full": ({}, 64, 8), "small": ({}, 16, 8), "tiny": ({}, 1, 4)}),
    Row("MMDiT, 384 wide", "mmdit", MMDiTConfig(width=384, layers=6, heads=6, qk_norm=True, context_dim=768, pooled_dim=768),
        {"full": ({}, 16, 32), "small": ({}, 2, 32), "tiny": (dict(width=64, heads=1, layers=2, context_dim=32, pooled_dim=32), 1, 8)}),
    Row("VAE of the preset tiny (TAESD)", "taesd", TINY_VAE, {"full": ({}, 8, 64), "small": ({}, 2, 64), "tiny": (dict(width=16), 1, 32)}),
    Row("VAE, KL", "autoencode", VAEConfig(widths=(32, 64, 96), depth=1, latent_channels=8),
        {"full": ({}, 8, 64), "small": ({}, 2, 64), "tiny": (KL8_TINY, 1, 32)}),
]


def as_train_py(options: Options) -> None:
    """What train.py sets for its process."""
    if options.device == "cpu":
        prefer_plain_attention(), keep_freed_memory(), deterministic()


def build_ours(row: Row, options: Options, compiled: bool, blocks: bool = False) -> Work:
    """blocks: compile the repeated blocks alone."""
    device = torch.device(options.device)
    net = our_network(row, options.scale, device, torch.float32).train().requires_grad_(True)
    last = architecture(net).memory_format if device.type == "cpu" else torch.contiguous_format
    net.to(memory_format=last)
    config = make_config(optimizer="adamw", lr=LR, weight_decay=DECAY, compile_blocks=blocks)
    optimizers = make_optimizers(dict(net.named_parameters()), (), config.optimisation, betas=BETAS)
    call = partial(PAIRS[row.kind].ours, net)
    if compiled:            # train.py compiles denoising networks, and no autoencoder that it trains
        denoises = row.kind in NETWORKS
        call = partial(PAIRS[row.kind].ours, compile_network(net, config)) if denoises else torch.compile(call, dynamic=False)
    named = lambda tensors: tensors
    if options.peer != "none":
        with torch.device("meta"):
            named = partial(their_names, net, PAIRS[row.kind].peer(architecture(net).to_config(net.config)))
    inputs = make_inputs(row, options.scale, device, torch.float32)
    inputs = {name: x.contiguous(memory_format=last) if name == "pixels" else x for name, x in inputs.items()}
    return work(net, call, inputs, optimizers, options, named)


def build_theirs(row: Row, options: Options, compiled: bool) -> Work:
    device = torch.device(options.device)
    net = their_network(row, our_network(row, options.scale, device, torch.float32)).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    call = partial(PAIRS[row.kind].theirs, net)
    inputs = make_inputs(row, options.scale, device, torch.float32)
    return work(net, torch.compile(call, dynamic=False) if compiled else call, inputs, [optimizer], options, lambda tensors: tensors)


def work(net: nn.Module, call: Callable[[Inputs], Tensor], inputs: Inputs, optimizers: Iterable[torch.optim.Optimizer], options: Options,
         named: Callable[[Inputs], Inputs]) -> Work:
    """A training step of a network, whose output is as large as its input. named: changes the names of gradients to those that both sides
    have."""
    device = torch.device(options.device)
    torch.manual_seed(2)
    target = torch.randn(next(x for x in inputs.values() if x.dim() == 4).shape).to(device)

    def backward() -> None:
        with autocast(device, options.dtype):
            out = call(inputs)
        (out.float() - target).square().mean().backward()

    def step() -> None:
        backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def gradients() -> Tensor:
        backward()
        found = named({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        net.zero_grad()
        return torch.cat([found[name].flatten() for name in sorted(found)])

    return Work(step, device, gradients)


def cases(options: Options) -> list[Case]:
    if options.dtype == "fp16":
        raise ValueError("--dtype fp16: training computes in float32 or, under autocast, in bfloat16: use fp32 or bf16")
    made = []
    for row in ROWS:
        sides = with_compiled(options, "tinyldm", partial(build_ours, row, options), settings=partial(as_train_py, options))
        if options.compile and row.kind in NETWORKS:
            blocks = partial(build_ours, row, options, True, True)
            sides.append(Side("tinyldm compiled by blocks", blocks, settings=partial(as_train_py, options)))
        if options.peer != "none":
            sides += with_compiled(options, "diffusers", partial(build_theirs, row, options), peer=True)
        flops = lambda row=row: 3 * forward_flops(row, options.scale)
        made.append(Case(f"{row.name}, {options.dtype}", sides, flops, BACKWARD * TOLERANCE[options.dtype]))
    return made
