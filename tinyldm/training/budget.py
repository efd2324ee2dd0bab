"""The plan of a run, before anything is loaded or written: parameters, FLOPs, memory, hours, disk.

The networks are built on the meta device: shapes without tensors, so any machine plans a run of any size in
seconds. FLOPs are those of matrix products and convolutions, two per multiply-add; training is counted as three
forward passes. Weights, gradients, optimizer and EMA follow exactly from the parameters. Activations are an
estimate (see Kept), and hours are projections from a share of the GPU's peak: the output marks both.
GB are 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tinyldm.config import Config, build
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.training.optim import muon_matrices

RESERVE = 1.5e9        # estimate: CUDA context, kernels' workspaces, fragmentation
EAGER = 1.5            # estimate: without torch.compile, autograd keeps this much more (norms and casts not fused)
ENCODE_MFU = 0.4       # estimate: convolutions of the VAE's encoder
GPU_FIELDS = ("mfu", "gpu_tflops", "gpu_gb")


# ---------------------------------------------------------------- what runs: networks on the meta device


@dataclass(frozen=True)
class Networks:
    net: nn.Module
    text: CLIPText
    vae: AutoencoderKL
    text_trained: bool
    vae_trained: bool


def meta_networks(config: Config) -> Networks:
    """The networks that train.py would build or load; published weights are taken to be those of Stable Diffusion 1."""
    vae = VAEConfig() if config.vae_weights else build(VAEConfig, config.vae, "--vae")
    text = (CLIPTextConfig(activation="gelu") if config.text_weights
            else build(CLIPTextConfig, config.text | {"vocab_size": config.vocab_size}, "--text"))
    channels = dict(in_channels=vae.latent_channels, out_channels=vae.latent_channels, context_dim=text.width)
    with torch.device("meta"):
        net = (DiT(build(DiTConfig, config.dit | channels, "--dit")) if config.network == "dit"
               else UNet(build(UNetConfig, config.unet | channels, "--unet")))
        return Networks(net, CLIPText(text), AutoencoderKL(vae), not config.text_weights, not config.vae_weights)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def latent_shape(networks: Networks, resolution: int) -> tuple[int, int, int]:
    config = networks.vae.config
    if resolution % config.downscale:
        raise ValueError(f"resolution {resolution} is not a multiple of {config.downscale}, the VAE's downscale: "
                         f"use {max(1, resolution // config.downscale) * config.downscale}")
    side = resolution // config.downscale
    return config.latent_channels, side, side


def forward_net(networks: Networks, resolution: int, batch: int = 1) -> Tensor:
    context = empty(batch, networks.text.config.context_length, networks.text.config.width)
    return networks.net(empty(batch, *latent_shape(networks, resolution)), empty(batch), Cond(context))


def forward_text(networks: Networks, batch: int = 1) -> Tensor:
    return networks.text(empty(batch, networks.text.config.context_length, dtype=torch.long)).hidden


def encode(networks: Networks, resolution: int, batch: int = 1) -> Tensor:
    return networks.vae.encode(empty(batch, 3, resolution, resolution)).mean


def decode(networks: Networks, resolution: int, batch: int = 1) -> Tensor:
    return networks.vae.decode(empty(batch, *latent_shape(networks, resolution)))


# ---------------------------------------------------------------- counting


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def count_flops(forward: Callable[..., Tensor], *args) -> int:
    """FLOPs of a forward pass on the meta device. There attention runs as two matrix products and is counted;
    among CPU tensors it is one fused operation that the counter does not know, and counts as nothing."""
    with FlopCounterMode(display=False) as counter:
        forward(*args)
    return counter.get_total_flops()


class Saves(torch.autograd.Function):
    """Stands for an operation of which only the shape it returns and the tensors it keeps for backward matter."""

    @staticmethod
    def forward(ctx, out: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return out


class Kept(TorchFunctionMode):
    """Counts the bytes that forward passes inside it, on the meta device, keep for the backward pass. An estimate.

    Autocast and fused attention do not exist on the meta device, so both are acted out: products run in `dtype`,
    every tensor is cast once; attention keeps q, k, v, its output and one number per query; a norm keeps its
    input. Pointwise operations are recomputed in the backward pass, from the outputs of products, which are kept.
    That is how torch.compile's partitioner chooses.
    """

    products = (F.linear, F.conv2d)
    norms = (F.group_norm, F.layer_norm, F.rms_norm)

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.dtype, self.running = dtype, None
        self.casts: dict[Tensor, Tensor] = {}
        self.kept: dict[int, Tensor] = {}            # storage -> a tensor that keeps it alive, so that no id returns
        self.products_out: dict[int, Tensor] = {}
        self.hooks = saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def __enter__(self):
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.running, kwargs = function, kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = (self.cast(x) for x in args[:3])
            b, heads, n, _ = q.shape
            out = empty(b, n, heads, v.shape[-1], dtype=v.dtype).transpose(1, 2)      # as the fused kernels lay it out
            return Saves.apply(out, q, k, v, out, empty(b, heads, n))
        if function in self.norms:
            with torch.no_grad():
                out = function(args[0].float(), *args[1:], **kwargs)
            return Saves.apply(out, args[0])
        if function not in self.products:
            return function(*args, **kwargs)
        out = function(*(self.cast(x) for x in args), **{key: self.cast(x) for key, x in kwargs.items()})
        self.products_out[storage(out)] = out
        return out

    def cast(self, x):
        if not isinstance(x, Tensor) or x.dtype == self.dtype or not x.is_floating_point():
            return x
        if x not in self.casts:
            self.casts[x] = x.to(self.dtype)
        return self.casts[x]

    def pack(self, x: Tensor) -> Tensor:
        anchor = (*self.products, *self.norms, F.scaled_dot_product_attention)
        if self.running in anchor or storage(x) in self.products_out:
            self.kept[storage(x)] = x
        return x

    def activations(self) -> int:
        """Bytes kept, without the parameters and without their casts."""
        weights = {storage(p) for p in self.casts if isinstance(p, nn.Parameter)}
        weights |= {storage(copy) for p, copy in self.casts.items() if isinstance(p, nn.Parameter)}
        return sum(x.untyped_storage().nbytes() for at, x in self.kept.items()
                   if at not in weights and not isinstance(x, nn.Parameter))

    def weight_copies(self) -> int:
        return sum(copy.untyped_storage().nbytes() for p, copy in self.casts.items() if isinstance(p, nn.Parameter))


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
